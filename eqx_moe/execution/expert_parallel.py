"""Experts spread over a mesh of devices."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from eqx_moe.execution.base import AbstractExecution, ExpertFunction, Routing
from eqx_moe.execution.grouped import Grouped
from eqx_moe.sharding import DATA, EXPERT, TENSOR, check_mesh

#: The names (`jax.ad_checkpoint.checkpoint_name`) of what collectives bring to the experts and back.
DISPATCHED, COMBINED = "moe_dispatched", "moe_combined"

#: A policy for `jax.checkpoint`: what came out of a collective is kept, so that the backward pass sends nothing twice.
save_collectives = jax.checkpoint_policies.save_only_these_names(DISPATCHED, COMBINED)

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class ExpertParallel(AbstractExecution):
    """Each device along the mesh's axis `expert` holds and runs its share of the experts.

    Rows of the batch are split over `data` and `expert` as far as they divide; if `expert` does not divide them, it
    splits the sequence; else its devices have the same tokens. An expert's matrices are split over `tensor` along ffn
    where that divides it, and repeated where not.

    `ring`: the devices along `expert` gather each other's tokens, run their own experts on them, and scatter the sums.
    Partial sums are added in the dtype of `x`.

    `inner` is how one device runs its experts. An axis that the mesh lacks counts as one of size 1.
    """

    mesh: Mesh
    method: str = "ring"
    inner: AbstractExecution = Grouped()

    def __post_init__(self):
        object.__setattr__(self, "mesh", check_mesh(self.mesh))
        if self.method != "ring":
            raise ValueError(f"`method` must be one of ['ring']; got {self.method!r}.")
        if isinstance(self.inner, ExpertParallel):
            raise ValueError("`inner` must be an execution for one device; got an `ExpertParallel` in another.")

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        routing: Routing,
        experts: ExpertFunction,
        mask: Bool[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq hidden"], Int[Array, ""]]:
        mesh = _like_input(self.mesh, x)
        placement = _Placement.of(mesh, x.shape[0], x.shape[1], experts)
        inputs = (x, routing.experts, routing.weights, mask, experts)
        tokens = placement.tokens
        specs = (tokens, tokens, tokens, tokens, placement.experts)
        explicit = AxisType.Explicit in mesh.axis_types
        if explicit:
            inputs = jax.tree.map(lambda leaf, spec: jax.reshard(leaf, NamedSharding(mesh, spec)), inputs, specs)

        def local(x, chosen, weights, mask, experts):
            return _ring(self.inner, placement, x, Routing(chosen, weights), experts, mask)

        y, drops = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(tokens, PartitionSpec()))(*inputs)
        # With Explicit axes an output has to lie as what it is added to.
        return (jax.reshard(y, NamedSharding(mesh, jax.typeof(x).sharding.spec)) if explicit else y), drops


@dataclasses.dataclass(frozen=True)
class _Placement:
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
    tensor_shards: int

    @classmethod
    def of(cls, mesh: Mesh, batch: int, seq: int, experts: ExpertFunction) -> "_Placement":
        data, expert, tensor = (mesh.shape.get(axis, 1) for axis in (DATA, EXPERT, TENSOR))
        if experts.num_experts % expert:
            raise ValueError(
                f"`mesh` must have an axis {EXPERT!r} that divides the number of experts; got {expert} devices along "
                f"it for {experts.num_experts} experts."
            )
        name = {axis: axis if axis in mesh.shape else None for axis in (EXPERT, TENSOR)}
        specs = experts.partition(name[EXPERT], name[TENSOR])
        split_over_tensor = TENSOR in mesh.shape and _divides(specs, experts, tensor)
        if not split_over_tensor:
            specs = experts.partition(name[EXPERT], None)
        along_data = (DATA,) if DATA in mesh.shape and batch % data == 0 else ()
        along_expert = (EXPERT,) if EXPERT in mesh.shape else ()
        rows = batch // data if along_data else batch
        split = None
        if along_expert:
            split = 0 if rows % expert == 0 else 1 if seq % expert == 0 else None
        return cls(
            tokens=PartitionSpec(along_data + (along_expert if split == 0 else ()), along_expert if split == 1 else ()),
            experts=specs,
            split=split,
            data=along_data,
            expert=along_expert,
            tensor=(TENSOR,) if split_over_tensor else (),
            tensor_shards=tensor if split_over_tensor else 1,
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
        return _sum(drops, self.data + self.expert + self.tensor) // self.tensor_shards


def _sum(value: Float[Array, "..."] | Int[Array, ""], axes: tuple[str, ...]):
    return lax.psum(value, axes) if axes else value


def _axes_of(spec: PartitionSpec) -> set[str]:
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return {axis for entry in entries for axis in entry if axis is not None}


def _divides(specs: PyTree[PartitionSpec], experts: ExpertFunction, tensor: int) -> bool:
    """Whether every axis that is to be split over `tensor` can be."""

    def leaf(spec, value):
        return all(size % tensor == 0 for entry, size in zip(spec, value.shape, strict=False) if entry == TENSOR)

    return all(jax.tree.leaves(jax.tree.map(leaf, specs, experts)))


def _like_input(mesh: Mesh, x: Array) -> Mesh:
    """The mesh with axes of the type that the caller works with: Explicit if `x` is placed so, or the context says so.

    Auto and Explicit do not mix: with the wrong type, JAX refuses either the call or the cotangent of its result.
    """
    seen = (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
    if any(AxisType.Explicit in other.axis_types for other in seen):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    return mesh


def _ring(inner: AbstractExecution, placement: _Placement, x, routing: Routing, experts: ExpertFunction, mask):
    """All arrays are this device's part. Gather over `expert`, run the own experts, scatter the sums."""
    tokens = placement.tokens
    experts = placement.vary(experts, placement.experts).share(placement.tensor_shards)
    arrays = placement.vary((x, routing.experts, routing.weights, mask), (tokens, tokens, tokens, tokens))
    if placement.split is not None:
        arrays = lax.all_gather(arrays, EXPERT, axis=placement.split, tiled=True)
    x, chosen, weights, mask = checkpoint_name(arrays, DISPATCHED)
    visits = placement.local_choices(chosen, experts.num_experts)
    y, drops = inner(x, Routing(visits, weights), experts, mask)
    if placement.split is None:
        y = _sum(y, placement.expert + placement.tensor)
    else:
        y = lax.psum_scatter(y, EXPERT, scatter_dimension=placement.split, tiled=True)
        y = _sum(y, placement.tensor)
    return checkpoint_name(y, COMBINED), placement.sum_drops(drops, x)
