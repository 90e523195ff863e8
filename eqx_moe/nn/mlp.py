"""The dense gated feed-forward network."""

import equinox as eqx
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from eqx_moe.nn.gating import SWIGLU
from eqx_moe.nn.linear import Linear


class MLP(eqx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

    gate: Linear
    up: Linear
    down: Linear

    def __init__(self, hidden: int, ffn: int, *, bias: bool = False, std: float, dtype: DTypeLike, key: PRNGKeyArray):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = Linear(hidden, ffn, bias=bias, std=std, dtype=dtype, key=gate_key)
        self.up = Linear(hidden, ffn, bias=bias, std=std, dtype=dtype, key=up_key)
        self.down = Linear(ffn, hidden, bias=bias, std=std, dtype=dtype, key=down_key)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        return self.down(SWIGLU(self.gate(x), self.up(x)))
