"""Choosing the next token from logits."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key


class Sampling(eqx.Module):
    """How to choose. `temperature` and `top_p` are traced, so that trying another value compiles nothing."""

    temperature: Float32[Array, ""] | None
    top_p: Float32[Array, ""] | None
    top_k: int | None = eqx.field(static=True)

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None):
        """Temperature 0 is greedy, and then the other two say nothing."""
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"`temperature` must be finite and at least 0 (0 is greedy); got {temperature}.")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` must be None or an integer, at least 1; got {top_k!r}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be None or in (0, 1]; got {top_p}.")
        greedy = temperature == 0
        self.temperature = None if greedy else jnp.asarray(temperature, jnp.float32)
        self.top_p = None if greedy or top_p is None else jnp.asarray(top_p, jnp.float32)
        self.top_k = None if greedy else top_k


def choose(logits: Float[Array, "batch vocab"], sampling: Sampling, keys: Key[Array, " batch"]) -> Int[Array, " batch"]:
    """One token id per row: the most probable, or a draw from the distribution that temperature, top-k and top-p leave.

    top-p keeps the smallest set of most probable tokens whose probabilities reach p (Holtzman et al. 2020), after
    top-k. Every row draws from its own key.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        logits = jnp.where(_kept(logits, sampling), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits)


def _kept(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Bool[Array, "batch vocab"]:
    """Which tokens top-k and top-p leave. The most probable always stays; of equals the lower id comes first."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    kept = jnp.ones(logits.shape, bool)
    if sampling.top_k is not None:
        kept &= jnp.arange(logits.shape[-1]) < sampling.top_k
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept &= before < sampling.top_p
        kept = kept.at[:, 0].set(True)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
