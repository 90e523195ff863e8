"""Root-mean-square normalisation."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class RMSNorm(eqx.Module):
    """`x / rms(x) * weight` over the last axis (Zhang and Sennrich 2019).

    Statistics are float32; the quotient is rounded to the dtype of `x` *before* the weight multiplies it, as in
    transformers' `LlamaRMSNorm`. The order shows in bfloat16.
    """

    weight: Float[Array, " size"]
    eps: float = eqx.field(static=True)

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        self.weight = jnp.ones(size, dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight.astype(x.dtype)
