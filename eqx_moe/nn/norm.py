"""Root-mean-square normalisation."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class RMSNorm(eqx.Module):
    """`x / rms(x) * weight` over the last axis (Zhang and Sennrich 2019).

    Statistics are float32; the quotient is rounded to the dtype of `x` *before* the weight multiplies it, as in
    transformers' `LlamaRMSNorm`, or with `round_last` after, as in its `GptOssRMSNorm`. The order shows in bfloat16.
    """

    weight: Float[Array, " size"]
    eps: float = eqx.field(static=True)
    round_last: bool = eqx.field(static=True)

    def __init__(self, size: int, *, eps: float, round_last: bool = False, dtype: DTypeLike):
        self.weight = jnp.ones(size, dtype)
        self.eps, self.round_last = eps, round_last

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.round_last:
            return (wide * self.weight.astype(jnp.float32)).astype(x.dtype)
        return wide.astype(x.dtype) * self.weight.astype(x.dtype)
