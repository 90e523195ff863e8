"""What training minimises."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray, Shaped

from eqx_moe.kernels.cross_entropy import IGNORE, cross_entropy_sum
from eqx_moe.nn.decoder import Decoder, RouterOutput
from eqx_moe.nn.router_losses import load_balancing_loss
from eqx_moe.sharding import sum_over_rows
from eqx_moe.train.batch import Batch


def next_tokens(batch: Batch) -> Int[Array, "batch seq"]:
    """The label that each place predicts: that of the next place, or -100 where another segment begins."""
    same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] != 0)
    labels = jnp.where(same, batch.labels[:, 1:], IGNORE)
    return jnp.pad(labels, ((0, 0), (0, 1)), constant_values=IGNORE)


def loss(
    model: Decoder, batch: Batch, key: PRNGKeyArray | None = None
) -> tuple[Float32[Array, ""], dict[str, Shaped[Array, ""]]]:
    """The training loss of a batch, and the metrics it is made of.

    It is the mean cross-entropy over the counted tokens, plus `config.router_aux_loss_coef` times the load-balancing
    loss over the tokens that are not padding where the config has that coefficient: what transformers returns as
    `loss` with `output_router_logits=True`. A batch without counted tokens has loss 0.

    Args:
        model: a language model.
        batch: see `Batch`. Ids outside the vocabulary make the loss NaN under jit.
        key: for the router's jitter, in families that have one; None trains without it.

    Returns:
        The loss, and scalars: `loss`, `cross_entropy` (nats a token), `tokens` (how many were counted), and for
        mixture-of-experts models `aux_loss`, the load-balancing loss before its coefficient, `max_violation` (see
        `RouterStats`), the mean over layers, and `drops`, how many (token, expert) pairs all layers left out.
    """
    labels = next_tokens(batch)
    out = model.forward(batch.tokens, segment_ids=batch.segment_ids, key=key)
    nll = sum_over_rows(_nll, model.mesh, model.unembedding, out.hidden, labels)
    tokens = jnp.sum(labels != IGNORE)
    cross_entropy_ = nll / jnp.maximum(tokens, 1)
    metrics = {"cross_entropy": cross_entropy_, "tokens": tokens}
    total = cross_entropy_
    if out.router.logits:
        for name, (value, coefficient) in _router_losses(model.config, out.router, batch.segment_ids != 0).items():
            metrics[name] = value
            if coefficient > 0:
                total = total + jnp.where(tokens > 0, coefficient * value, 0.0)
        metrics["max_violation"] = jnp.mean(jnp.stack([stats.max_violation for stats in out.router.stats]))
        metrics["drops"] = jnp.sum(jnp.stack(out.router.drops))
    return total, {"loss": total, **metrics}


def _nll(
    unembedding: Float[Array, "vocab hidden"], hidden: Float[Array, "batch seq hidden"], labels: Int[Array, "batch seq"]
) -> Float32[Array, ""]:
    return cross_entropy_sum(hidden.reshape(-1, hidden.shape[-1]), unembedding, labels.reshape(-1))


def _router_losses(
    config: Any, router: RouterOutput, mask: Bool[Array, "batch seq"]
) -> dict[str, tuple[Float32[Array, ""], float]]:
    """Each router loss by its name among the metrics, and the config's coefficient for it."""
    k = router.choices[0].shape[-1]
    return {"aux_loss": (load_balancing_loss(router.logits, k, mask), getattr(config, "router_aux_loss_coef", 0.0))}
