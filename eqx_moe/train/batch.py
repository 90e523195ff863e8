"""What one training step sees."""

import equinox as eqx
from jaxtyping import Array, Int


class Batch(eqx.Module):
    """Rows of tokens, ready for `loss`.

    `labels` follow Hugging Face: they stand at the same places as `tokens`, -100 is not counted, and the shift by one
    happens inside the loss. `segment_ids` is 0 at padding; a token is never predicted from another segment.
    """

    tokens: Int[Array, "batch seq"]
    segment_ids: Int[Array, "batch seq"]
    labels: Int[Array, "batch seq"]
