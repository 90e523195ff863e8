"""How the arrays of a MoE block lie on a mesh."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from eqx_moe.execution.base import ExpertFunction
from eqx_moe.sharding import DATA, EXPERT, TENSOR, check_experts, expert_split

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of one call lie on the mesh."""

    #: The axes that split the tokens, [batch, seq].
    tokens: PartitionSpec
    #: For each array of the experts the axes that split it.
    experts: PyTree[PartitionSpec]
    #: Which axis of [batch, seq] is split over `expert`; None if each device along it has the same tokens.
    split: int | None
    #: The mesh's axes, or () where the mesh lacks them or where all devices along them do the same.
    data: tuple[str, ...]
    expert: tuple[str, ...]
    tensor: tuple[str, ...]
    expert_shards: int
    tensor_shards: int
    #: Of the whole block.
    num_experts: int

    @classmethod
    def of(cls, mesh: Mesh, batch: int, seq: int, experts: ExpertFunction) -> "Layout":
        data, expert, tensor = (mesh.shape.get(axis, 1) for axis in (DATA, EXPERT, TENSOR))
        check_experts(mesh, experts.num_experts)
        name = {axis: axis if axis in mesh.shape else None for axis in (EXPERT, TENSOR)}
        specs = experts.partition(name[EXPERT], name[TENSOR])
        split_over_tensor = TENSOR in mesh.shape and _divides(specs, experts, tensor)
        if not split_over_tensor:
            specs = experts.partition(name[EXPERT], None)
        along_data = (DATA,) if DATA in mesh.shape and batch % data == 0 else ()
        along_expert = (EXPERT,) if EXPERT in mesh.shape else ()
        split = expert_split(mesh, batch, seq)
        return cls(
            tokens=PartitionSpec(along_data + (along_expert if split == 0 else ()), along_expert if split == 1 else ()),
            experts=specs,
            split=split,
            data=along_data,
            expert=along_expert,
            tensor=(TENSOR,) if split_over_tensor else (),
            expert_shards=expert,
            tensor_shards=tensor if split_over_tensor else 1,
            num_experts=experts.num_experts,
        )

    def vary(self, tree: Tree, specs: PyTree[PartitionSpec]) -> Tree:
        """Marks arrays as different on all devices that do different work; gradients are then summed over these."""
        axes = self.data + self.expert + self.tensor

        def leaf(value, spec):
            missing = tuple(axis for axis in axes if axis not in _axes_of(spec))
            return lax.pcast(value, missing, to="varying") if missing else value

        return jax.tree.map(leaf, tree, specs)

    def local_choices(self, chosen: Int[Array, "*tokens k"], experts: int) -> Int[Array, "*tokens k"]:
        """Indices into the experts of this device, of which there are `experts`; those of others go nowhere."""
        if not self.expert:
            return chosen
        local = chosen - lax.axis_index(EXPERT) * experts
        return jnp.where((local >= 0) & (local < experts), local, experts)

    def sum_drops(self, drops: Int[Array, ""], like: Array) -> Int[Array, ""]:
        """The drops of all devices; `like` is any array that `vary` has marked."""
        drops = drops + jnp.zeros_like(like, shape=(), dtype=drops.dtype)
        # Devices along `tensor` drop the same pairs.
        return sum_over(drops, self.data + self.expert + self.tensor) // self.tensor_shards


def sum_over(value: Float[Array, "..."] | Int[Array, ""], axes: tuple[str, ...]):
    return lax.psum(value, axes) if axes else value


def _axes_of(spec: PartitionSpec) -> set[str]:
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return {axis for entry in entries for axis in entry if axis is not None}


def _divides(specs: PyTree[PartitionSpec], experts: ExpertFunction, tensor: int) -> bool:
    """Whether every axis that is to be split over `tensor` can be."""

    def leaf(spec, value):
        return all(size % tensor == 0 for entry, size in zip(spec, value.shape, strict=False) if entry == TENSOR)

    return all(jax.tree.leaves(jax.tree.map(leaf, specs, experts)))


def like_input(mesh: Mesh, x: Array) -> Mesh:
    """The mesh with axes of the type that the caller works with: Explicit if `x` is placed so, or the context says so.

    Auto and Explicit do not mix: with the wrong type, JAX refuses either the call or the cotangent of its result.
    """
    seen = (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
    if any(AxisType.Explicit in other.axis_types for other in seen):
        return mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    return mesh
