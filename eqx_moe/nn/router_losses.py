"""What keeps the experts busy: losses over what the routers of a model said and chose. All in float32.

Each takes one array per mixture-of-experts layer, as `Output.router` has them. Tokens where `mask` is False are padding
and count nowhere; with none left a loss is zero.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int


def load_balancing_loss(
    logits: tuple[Float32[Array, "*tokens experts"], ...], k: int, mask: Bool[Array, "*tokens"] | None = None
) -> Float32[Array, ""]:
    """`experts * sum_e f_e P_e`: f_e the share of tokens that choose expert e, P_e its mean probability.

    Exactly as transformers 5.23 has it (`load_balancing_loss_func` of `models/mixtral/modeling_mixtral.py`): statistics
    are pooled over layers before the product, and the choices are the k most probable of a softmax, whatever rule the
    router goes by. f sums to k, so that uniform routing gives k.
    """
    _refuse_none(logits)
    experts = logits[0].shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"`k` must be in [1, experts]; got {k=} and {experts=}.")
    shares, probabilities = zip(*(_pooled(layer, _top_k(layer, k), mask) for layer in logits), strict=True)
    return experts * jnp.sum(sum(shares) * sum(probabilities)) / len(logits) ** 2


def switch_load_balancing_loss(
    logits: tuple[Float32[Array, "*tokens experts"], ...],
    choices: tuple[Int[Array, "*tokens k"], ...],
    mask: Bool[Array, "*tokens"] | None = None,
) -> Float32[Array, " layers"]:
    """`experts * sum_e f_e P_e` of each layer: Fedus et al. 2021, equations 4 to 6, before the coefficient alpha.

    f_e is the share of the choices, as the router made them, that fall on expert e; P_e is its mean softmax
    probability. f sums to 1 (the paper has k = 1), so that uniform routing gives 1. The paper adds the losses of all
    layers: take the sum. The mean makes a coefficient mean the same at every depth.
    """
    _refuse_none(logits)
    if len(logits) != len(choices):
        raise ValueError(
            f"`logits` and `choices` must have an array for each layer; got {len(logits)} and {len(choices)} of them."
        )
    losses = []
    for layer, chosen in zip(logits, choices, strict=True):
        experts, k = layer.shape[-1], chosen.shape[-1]
        share, probability = _pooled(layer, chosen, mask)
        losses.append(experts * jnp.sum(share / k * probability))
    return jnp.stack(losses)


def router_z_loss(
    logits: tuple[Float32[Array, "*tokens experts"], ...], mask: Bool[Array, "*tokens"] | None = None
) -> Float32[Array, " layers"]:
    """The mean over tokens of the squared logsumexp of the logits, of each layer: Zoph et al. 2022, equation 5.

    It keeps logits small, where float32 and a softmax are accurate. The coefficient there is 1e-3, and the losses of
    all layers are added: take the sum.
    """
    _refuse_none(logits)
    return jnp.stack([_mean(jax.nn.logsumexp(layer, axis=-1)[..., None] ** 2, mask)[0] for layer in logits])


def _refuse_none(logits) -> None:
    if not logits:
        raise ValueError("`logits` must have an array for each mixture-of-experts layer; got 0, as of a dense model.")


def _top_k(logits, k: int):
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)[1]


def _pooled(logits, choices, mask):
    """For each expert the share of tokens that chose it, which has no gradient, and its mean probability."""
    experts = logits.shape[-1]
    # Counting by a scatter: a one-hot of [tokens, k, experts] would be the largest array of the layer.
    token = jnp.ones(choices.shape[:-1], jnp.float32) if mask is None else mask.astype(jnp.float32)
    count = jnp.zeros(experts, jnp.float32).at[choices].add(token[..., None])
    share = count / jnp.maximum(jnp.sum(token), 1.0)
    return share, _mean(jax.nn.softmax(logits, axis=-1), mask)


def _mean(values, mask):
    """The mean over all axes but the last, of the tokens that count."""
    if mask is None:
        return jnp.mean(values, axis=tuple(range(values.ndim - 1)))
    total = jnp.sum(jnp.where(mask[..., None], values, 0.0), axis=tuple(range(values.ndim - 1)))
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
