"""Linear maps with weights as they lie on disk: `[out, in]`."""

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from eqx_moe.kernels.linear import linear
from eqx_moe.nn.init import normal


class Linear(eqx.Module):
    """`x @ weight.T + bias` over the last axis, in the dtype of `x`."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"] | None

    def __init__(
        self, in_size: int, out_size: int, *, bias: bool = False, std: float, dtype: DTypeLike, key: PRNGKeyArray
    ):
        """Weights are normal with standard deviation `std`, biases zero."""
        self.weight = normal(key, (out_size, in_size), std, dtype)
        self.bias = jnp.zeros(out_size, dtype) if bias else None

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias.astype(x.dtype)
