"""Stacked expert weights and what one expert computes."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from eqx_moe.execution import StackedLinear
from eqx_moe.nn.gating import SWIGLU, AbstractGating
from eqx_moe.nn.init import normal


class Experts(eqx.Module):
    """Gated experts, `down(gating(gate(x), up(x)))`: one matrix of each stack per expert, with biases or without."""

    gate: Float[Array, "experts ffn hidden"]
    up: Float[Array, "experts ffn hidden"]
    down: Float[Array, "experts hidden ffn"]
    gate_bias: Float[Array, "experts ffn"] | None
    up_bias: Float[Array, "experts ffn"] | None
    down_bias: Float[Array, "experts hidden"] | None
    gating: AbstractGating = eqx.field(static=True)

    def __init__(
        self,
        experts: int,
        hidden: int,
        ffn: int,
        *,
        bias: bool = False,
        gating: AbstractGating = SWIGLU,
        std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        """Matrices are normal with standard deviation `std`, biases zero."""
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = normal(gate_key, (experts, ffn, hidden), std, dtype)
        self.up = normal(up_key, (experts, ffn, hidden), std, dtype)
        self.down = normal(down_key, (experts, hidden, ffn), std, dtype)
        self.gate_bias = jnp.zeros((experts, ffn), dtype) if bias else None
        self.up_bias = jnp.zeros((experts, ffn), dtype) if bias else None
        self.down_bias = jnp.zeros((experts, hidden), dtype) if bias else None
        self.gating = gating

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]

    def partition(self, expert: str | None, tensor: str | None) -> "Experts":
        """A `PartitionSpec` in place of each stack: experts over the mesh axis `expert`, ffn over `tensor`."""
        wide, narrow = PartitionSpec(expert, tensor), PartitionSpec(expert, None, tensor)
        specs = eqx.tree_at(lambda e: (e.gate, e.up, e.down), self, (wide, wide, narrow))
        if self.gate_bias is None:
            return specs
        biases = (wide, wide, PartitionSpec(expert))
        return eqx.tree_at(lambda e: (e.gate_bias, e.up_bias, e.down_bias), specs, biases)

    def share(self, parts: int) -> "Experts":
        """One of `parts` shares whose outputs are summed: each adds its part of the last bias."""
        if self.down_bias is None:
            return self
        return eqx.tree_at(lambda e: e.down_bias, self, self.down_bias / parts)

    def __call__(self, x: Float[Array, "*rows hidden"], linear: StackedLinear) -> Float[Array, "*rows hidden"]:
        """Rows through their experts; `linear` knows which expert a row belongs to, and how to multiply."""
        own = jax.tree.map(lambda leaf: leaf.astype(x.dtype), self)
        gated = self.gating(linear(x, own.gate, own.gate_bias), linear(x, own.up, own.up_bias))
        return linear(gated, own.down, own.down_bias)
