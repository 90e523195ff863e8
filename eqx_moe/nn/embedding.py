"""Token embeddings."""

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqx_moe.nn.init import normal


class Embedding(eqx.Module):
    """A row per token id."""

    weight: Float[Array, "vocab hidden"]

    def __init__(self, vocab: int, hidden: int, *, std: float, dtype: DTypeLike, key: PRNGKeyArray):
        self.weight = normal(key, (vocab, hidden), std, dtype)

    def __call__(self, tokens: Int[Array, "*batch seq"]) -> Float[Array, "*batch seq hidden"]:
        """An id outside the vocabulary gives NaN. (JAX's own indexing would clamp it, or count from the end.)"""
        vocab = self.weight.shape[0]
        tokens = jnp.where(tokens < 0, vocab, tokens)
        return jnp.take(self.weight, tokens, axis=0, mode="fill", fill_value=jnp.nan)
