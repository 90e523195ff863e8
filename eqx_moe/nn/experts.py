"""Stacked expert weights and what one expert computes."""

import equinox as eqx
import jax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from eqx_moe.execution import StackedLinear
from eqx_moe.nn.init import normal


class Experts(eqx.Module):
    """SwiGLU experts, one matrix of each stack per expert."""

    gate: Float[Array, "experts ffn hidden"]
    up: Float[Array, "experts ffn hidden"]
    down: Float[Array, "experts hidden ffn"]

    def __init__(self, experts: int, hidden: int, ffn: int, *, std: float, dtype: DTypeLike, key: PRNGKeyArray):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = normal(gate_key, (experts, ffn, hidden), std, dtype)
        self.up = normal(up_key, (experts, ffn, hidden), std, dtype)
        self.down = normal(down_key, (experts, hidden, ffn), std, dtype)

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]

    def partition(self, expert: str | None, tensor: str | None) -> "Experts":
        """A `PartitionSpec` in place of each stack: experts over the mesh axis `expert`, ffn over `tensor`."""
        wide, narrow = PartitionSpec(expert, tensor), PartitionSpec(expert, None, tensor)
        return eqx.tree_at(lambda e: (e.gate, e.up, e.down), self, (wide, wide, narrow))

    def share(self, parts: int) -> "Experts":
        """One of `parts` shares whose outputs are summed. There is no bias to share."""
        return self

    def __call__(self, x: Float[Array, "*rows hidden"], linear: StackedLinear) -> Float[Array, "*rows hidden"]:
        """Rows through their experts; `linear` knows which expert a row belongs to, and how to multiply."""
        gate, up, down = (stack.astype(x.dtype) for stack in (self.gate, self.up, self.down))
        return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)
