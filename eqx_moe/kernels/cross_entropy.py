"""Cross-entropy of labels from hidden states and the unembedding, without all the logits at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

# The label of a place that is not counted, as in Hugging Face and torch.
IGNORE = -100

# Logits held at a time, at most: 64 MiB in float32.
_MAX_LOGITS = 1 << 24


def cross_entropy_oracle(
    hidden: Float[Array, "tokens hidden"], unembedding: Float[Array, "vocab hidden"], labels: Int[Array, " tokens"]
) -> Float32[Array, " tokens"]:
    """What `cross_entropy` computes, from all logits at once. The definition to test against."""
    logits = jnp.einsum("th,vh->tv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    counted = labels != IGNORE
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(counted, labels, 0)[:, None], axis=-1)[:, 0]
    known = (labels >= 0) & (labels < unembedding.shape[0])
    return jnp.where(counted, jnp.where(known, nll, jnp.nan), 0.0)


def cross_entropy(
    hidden: Float[Array, "tokens hidden"], unembedding: Float[Array, "vocab hidden"], labels: Int[Array, " tokens"]
) -> Float32[Array, " tokens"]:
    """Negative log-likelihood of each label, in nats; 0 where the label is -100.

    The labels belong to the hidden states of the same row: nothing is shifted here. Another label outside the
    vocabulary gives NaN, never a clamped one. Rows are taken some at a time, as many as keep their logits below 64
    MiB, and the backward pass computes the logits again, so that memory does not grow with tokens x vocabulary.
    """
    tokens, vocab = hidden.shape[0], unembedding.shape[0]
    rows = max(1, _MAX_LOGITS // vocab)
    if tokens <= rows:
        return _rows(hidden, unembedding, labels)
    chunks = -(-tokens // rows)
    rows = -(-tokens // chunks)
    padding = chunks * rows - tokens
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, rows, -1)
    labels = jnp.pad(labels, (0, padding), constant_values=IGNORE).reshape(chunks, rows)
    chunk = jax.checkpoint(lambda part: _rows(part[0], unembedding, part[1]), prevent_cse=False)
    return jax.lax.map(chunk, (hidden, labels)).reshape(-1)[:tokens]


def _rows(hidden, unembedding, labels):
    logits = jnp.einsum("th,vh->tv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # A comparison in place of a gather: its gradient is another comparison, not a scatter.
    mine = labels[:, None] == jnp.arange(logits.shape[-1])
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(mine, logits, 0.0), axis=-1)
    known = (labels >= 0) & (labels < logits.shape[-1])
    return jnp.where(labels == IGNORE, 0.0, jnp.where(known, nll, jnp.nan))
