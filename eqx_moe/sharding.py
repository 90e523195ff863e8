"""Which device holds which part of a model: axis names, a table of rules over parameter paths, and the plan they make.

A mesh has any of three axes. `data` splits the rows of a batch, and in training the weights and the optimizer's state
too (ZeRO-3, Rajbhandari et al. 2020, alias FSDP); `expert` splits the rows and the stacks of experts; `tensor` splits
heads, hidden layers of feed-forward parts and the vocabulary (Megatron-LM, Shoeybi et al. 2019). A weight stands at its
path (`layers.3.moe.experts.gate`); nothing here knows a module.

Meshes may have Auto or Explicit axes. Inside, axes are always Auto: XLA's partitioner fills in what the rules leave
open.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

AXES = ("data", "expert", "tensor")
DATA, EXPERT, TENSOR = AXES

#: In a rule: the axis `tensor`, but only in whole heads.
HEADS = "heads"

#: The end of a weight's path -> what splits each of its dimensions. Leading dimensions that a rule does not have (the
#: layers of a stack) stay whole. Every weight of every family must be named here.
RULES: dict[str, tuple[str | None, ...]] = {
    "embed.weight": (TENSOR, DATA),
    "head.weight": (TENSOR, DATA),
    "norm.weight": (None,),
    "attention_norm.weight": (None,),
    "ffn_norm.weight": (None,),
    "attention.q.weight": (HEADS, DATA),
    "attention.k.weight": (HEADS, DATA),
    "attention.v.weight": (HEADS, DATA),
    "attention.q_a.weight": (None, DATA),
    "attention.kv_a.weight": (None, DATA),
    "attention.kv_b.weight": (HEADS, DATA),
    "attention.q.bias": (HEADS,),
    "attention.k.bias": (HEADS,),
    "attention.v.bias": (HEADS,),
    "attention.q_norm.weight": (None,),
    "attention.k_norm.weight": (None,),
    "attention.q_a.bias": (None,),
    "attention.q_a_norm.weight": (None,),
    "attention.kv_a.bias": (None,),
    "attention.kv_a_norm.weight": (None,),
    "attention.sinks": (None,),
    "attention.o.weight": (DATA, HEADS),
    "attention.o.bias": (None,),
    "mlp.gate.weight": (TENSOR, DATA),
    "mlp.up.weight": (TENSOR, DATA),
    "mlp.down.weight": (DATA, TENSOR),
    "mlp.gate.bias": (TENSOR,),
    "mlp.up.bias": (TENSOR,),
    "mlp.down.bias": (None,),
    "moe.router.weight": (None, DATA),
    "moe.router.bias": (None,),
    "moe.router.selection_bias": (None,),
    "moe.experts.gate": (EXPERT, TENSOR, DATA),
    "moe.experts.up": (EXPERT, TENSOR, DATA),
    "moe.experts.down": (EXPERT, DATA, TENSOR),
    "moe.experts.gate_bias": (EXPERT, TENSOR),
    "moe.experts.up_bias": (EXPERT, TENSOR),
    "moe.experts.down_bias": (EXPERT, None),
    "moe.shared.gate.weight": (TENSOR, DATA),
    "moe.shared.up.weight": (TENSOR, DATA),
    "moe.shared.down.weight": (DATA, TENSOR),
}

AnyMesh = Mesh | AbstractMesh
Tree = TypeVar("Tree")


@overload
def check_mesh(mesh: Mesh) -> Mesh: ...
@overload
def check_mesh(mesh: AbstractMesh) -> AbstractMesh: ...
def check_mesh(mesh: AnyMesh) -> AnyMesh:
    """The same devices and axes, with axes of the type Auto. An axis that a mesh lacks counts as one of size 1.

    Raises:
        ValueError: an axis that is not of `AXES`.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(
            f"`mesh` must be a mesh, as `jax.make_mesh((2, 4), ('data', 'expert'))` gives it; got {mesh!r}."
        )
    unknown = sorted(set(mesh.axis_names) - set(AXES), key=str)
    if unknown:
        raise ValueError(
            f"`mesh` must have axes among {AXES}; got {unknown} among its {len(mesh.axis_names)} axes "
            f"{mesh.axis_names}. Name them otherwise, as in `jax.make_mesh(shape, {AXES})`."
        )
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_devices(mesh: AnyMesh) -> Mesh:
    """As `check_mesh`, for what is to lie on the devices: a mesh without any raises `ValueError` too."""
    mesh = check_mesh(mesh)
    if isinstance(mesh, AbstractMesh):
        raise ValueError(
            f"`mesh` must have devices, for arrays to lie on; got {mesh}, which has shapes alone. These suffice for a "
            "plan: `eqx_moe.plan_sharding`, `eqx_moe.train.plan_step`."
        )
    return mesh


def check_experts(mesh: AnyMesh, experts: int, path: str | None = None) -> None:
    """Raises `ValueError` if the axis `expert` does not divide the experts of a block (those of the stack `path`)."""
    ways = mesh.shape.get(EXPERT, 1)
    if experts % ways:
        raise ValueError(
            f"`mesh` must have an axis {EXPERT!r} that divides the number of experts; got {ways} devices along it for "
            f"{experts} experts{f' ({path})' if path else ''}. Take a divisor of {experts}."
        )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one weight goes. `notes` says of each dimension that stays whole against its rule, why."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> PartitionSpec:
        return self.sharding.spec

    @property
    def bytes_per_device(self) -> int:
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, Placement]):
    """Weight path -> `Placement`. `str` gives it as a table."""

    mesh: AnyMesh
    placements: Mapping[str, Placement]

    def __getitem__(self, path: str) -> Placement:
        return self.placements[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.placements)

    def __len__(self) -> int:
        return len(self.placements)

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        return {path: placement.sharding for path, placement in self.items()}

    @property
    def bytes_per_device(self) -> int:
        return sum(placement.bytes_per_device for placement in self.values())

    @property
    def total_bytes(self) -> int:
        return sum(math.prod(placement.shape) * placement.dtype.itemsize for placement in self.values())

    def __str__(self) -> str:
        """A line for every weight; layers whose weights are placed alike share one."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for path, placement in self.items():
            row = (_without_layer(path), *_cells(placement))
            groups.setdefault(row, []).append(placement.bytes_per_device)
        rows = [("weight", "shape", "dtype", "split by", "bytes per device", "notes")]
        for (path, shape, dtype, spec, notes), sizes in groups.items():
            count = f"{len(sizes)} x " if len(sizes) > 1 else ""
            rows.append((count + path, shape, dtype, spec, f"{sum(sizes):,}", notes))
        total = f"{self.total_bytes:,} in all"
        rows.append(("all", total, "", "", f"{self.bytes_per_device:,}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["mesh: " + ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())]
        for *cells, notes in rows:
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join([*padded, notes]).rstrip())
        return "\n".join(lines)


def plan(leaves: Mapping[str, Any], mesh: AnyMesh, head_sizes: Mapping[str, int]) -> Plan:
    """Where each weight of a model goes.

    Args:
        leaves: path -> array or `jax.ShapeDtypeStruct`.
        mesh: an `AbstractMesh` will do: no device is needed for a plan.
        head_sizes: path of each linear map that is made of heads -> the size of these, which are never split.

    Raises:
        ValueError: an unknown axis; experts that the axis `expert` does not divide; a weight that no rule names.
    """
    mesh = check_mesh(mesh)
    return Plan(mesh, {path: _place(path, leaf, mesh, head_sizes) for path, leaf in leaves.items()})


def _place(path: str, leaf: Any, mesh: AnyMesh, head_sizes: Mapping[str, int]) -> Placement:
    suffix = next((suffix for suffix in RULES if path == suffix or path.endswith("." + suffix)), None)
    if suffix is None:
        raise ValueError(f"No rule of `eqx_moe.sharding.RULES` says how to split the weight {path!r}.")
    rule, shape = RULES[suffix], tuple(leaf.shape)
    assert len(shape) >= len(rule), (path, shape)
    rule = (None,) * (len(shape) - len(rule)) + rule
    spec: list[str | None] = []
    notes: list[str] = []
    for dimension, (entry, size) in enumerate(zip(rule, shape, strict=True)):
        unit = head_sizes[path.rsplit(".", 1)[0]] if entry == HEADS else 1
        axis = TENSOR if entry == HEADS else entry
        ways = mesh.shape.get(axis, 1)
        if (size // unit) % ways == 0:
            spec.append(axis if ways > 1 else None)
            continue
        if axis == EXPERT:
            check_experts(mesh, size, path)
        spec.append(None)
        what = f"{size // unit} heads" if entry == HEADS else f"dimension {dimension} of {size}"
        notes.append(f"{axis}={ways} does not divide {what}")
    return Placement(shape, np.dtype(leaf.dtype), NamedSharding(mesh, PartitionSpec(*spec)), tuple(notes))


def _cells(placement: Placement) -> tuple[str, str, str, str]:
    shape = " x ".join(map(str, placement.shape))
    spec = ", ".join(axis or "-" for axis in placement.spec)
    return shape, placement.dtype.name, spec, "; ".join(placement.notes)


def _without_layer(path: str) -> str:
    return ".".join("*" if piece.isdecimal() else piece for piece in path.split("."))


# --- In a program ----------------------------------------------------------------------------------------------------


def rows_axes(mesh: AnyMesh | None, rows: int) -> tuple[str, ...]:
    """The axes that split so many rows of a batch: `data` and `expert`, or those of the two that divide them."""
    axes = () if mesh is None else tuple(axis for axis in (DATA, EXPERT) if mesh.shape.get(axis, 1) > 1)
    for some in (axes, axes[:1], axes[1:]):
        if mesh is not None and rows % math.prod(mesh.shape[axis] for axis in some) == 0:
            return some
    return ()


def expert_split(mesh: AnyMesh, rows: int, length: int) -> int | None:
    """Which axis of a batch of tokens, [rows, length], the axis `expert` splits for a MoE block: rows if it divides
    those that `data` leaves, else the sequence if it divides that, else none."""
    data, expert = (mesh.shape.get(axis, 1) for axis in (DATA, EXPERT))
    if EXPERT not in mesh.shape:
        return None
    rows = rows // data if rows % data == 0 else rows
    return 0 if rows % expert == 0 else 1 if length % expert == 0 else None


def rows_sharding(mesh: AnyMesh, rows: int, *others: str | None) -> NamedSharding:
    """The rows of a batch split over `rows_axes`; `others` say what splits the dimensions after the first."""
    return NamedSharding(mesh, PartitionSpec(rows_axes(mesh, rows) or None, *others))


def heads_sharding(mesh: Mesh | None, rows: int, heads: int) -> NamedSharding | None:
    """Where queries, or keys or values, go: [rows, heads, length, head_dim]."""
    if mesh is None:
        return None
    whole = heads % mesh.shape.get(TENSOR, 1) or TENSOR not in mesh.shape
    return rows_sharding(mesh, rows, None if whole else TENSOR)


def split_rows(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same values, the first axis of every array split over `data` and `expert`. For traced arrays."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows_sharding(mesh, x.shape[0])), tree)


def sum_over_rows(
    function: Callable[..., Float[Array, ""]], mesh: Mesh | None, weight: Array, *rows: Shaped[Array, "rows ..."]
) -> Float[Array, ""]:
    """`function(weight, *rows)`, which is a sum over rows: each device takes its own of them. For traced arrays.

    XLA would add up the devices' gradients of the weight in each turn of a loop inside the function; here they are
    added once, after it, in float32. The axis `tensor` is left to XLA.
    """
    axes = rows_axes(mesh, rows[0].shape[0])
    if not axes:
        return function(weight, *rows)

    def local(weight, *rows):
        # Sums over devices in bfloat16 would lose digits, and XLA's CPU back end (jax 0.10) dies of some of them.
        whole = jax.lax.pcast(weight.astype(jnp.float32), axes, to="varying").astype(weight.dtype)
        return jax.lax.psum(function(whole, *rows), axes)

    specs = (PartitionSpec(), *(PartitionSpec(axes) for _ in rows))
    shared = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(axes))
    return shared(weight, *rows)


def replicate(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same values, whole on every device. For traced arrays."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec())), tree)


def gather_weights(
    tree: Tree, mesh: Mesh | None, *, at: str, head_sizes: Mapping[str, int] = MappingProxyType({})
) -> Tree:
    """A part of a model, at the path `at`, with its weights gathered along `data` for where they are used.

    Said of the weights, because XLA would else choose by itself what to move, and sometimes moves activations.
    Gradients leave as the weights came in, split along `data`. Inside a scan over layers that rematerialises them, one
    layer is whole at a time; where layers are written out one after the other, XLA chooses the order, and the backward
    pass keeps what was gathered.
    """
    if mesh is None:
        return tree

    def gather(path: Any, leaf: Any) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        return _gather(_place(f"{at}.{_dotted(path)}", leaf, mesh, head_sizes).sharding, leaf)

    return jax.tree_util.tree_map_with_path(gather, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(split: NamedSharding, weight: Array) -> Array:
    return jax.lax.with_sharding_constraint(weight, without_data(split))


def _gather_fwd(split: NamedSharding, weight: Array) -> tuple[Array, None]:
    return _gather(split, weight), None


def _gather_bwd(split: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    # Whole first: else XLA computes with activations split as the gradient shall be, and moves these.
    gradient = jax.lax.with_sharding_constraint(gradient, without_data(split))
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def without_data(sharding: NamedSharding) -> NamedSharding:
    """The same, whole along `data`: how a model generates."""
    spec = PartitionSpec(*(None if axis == DATA else axis for axis in sharding.spec))
    return NamedSharding(sharding.mesh, spec)


def like_weights(tree: Any, plan: Plan) -> Any:
    """A `NamedSharding` for every array of an optimizer's state: that of the weight at whose path it ends if it has the
    weight's shape, else whole on every device."""

    def sharding(path: Any, leaf: Any) -> NamedSharding | None:
        if not eqx.is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct):
            return None
        pieces = _dotted(path).split(".")
        for start in range(len(pieces)):
            placement = plan.get(".".join(pieces[start:]))
            if placement is not None and placement.shape == tuple(leaf.shape):
                return placement.sharding
        return NamedSharding(plan.mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def check_surroundings(tokens: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The tokens of a model with a mesh, where such a model can run.

    Raises:
        ValueError: under `vmap`; where `jax.set_mesh` has set Explicit axes.
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "A model with a mesh runs with Auto axes; `jax.set_mesh` has set Explicit ones here. Leave it out (the "
            "model knows its mesh), or set `eqx_moe.sharding.check_mesh(mesh)`, the same with Auto axes."
        )
    return _refuse_vmap(tokens)


@jax.custom_batching.custom_vmap
def _refuse_vmap(tokens: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    return tokens


@_refuse_vmap.def_vmap
def _(axis_size: int, in_batched: Any, tokens: Any) -> Any:
    raise ValueError(
        f"A model with a mesh cannot run under `vmap` (here over {axis_size} rows): its rows are split over devices. "
        "Give it the rows as a batch: `model(tokens)` takes tokens [batch, seq]."
    )


# --- From the host ---------------------------------------------------------------------------------------------------


def put(tree: Tree, mesh: Mesh | None, *, rows: bool = False) -> Tree:
    """Arrays from the host or from one device onto all devices of a mesh: whole, or with `rows` their first axis split.

    In a program of several processes each gives the same whole arrays, and keeps what its devices need.
    """
    if mesh is None:
        return tree

    def place(x: Any) -> Any:
        sharding = rows_sharding(mesh, x.shape[0]) if rows else NamedSharding(mesh, PartitionSpec())
        if isinstance(x, Tracer):
            return jax.lax.with_sharding_constraint(x, sharding)
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if isinstance(x, jax.Array) and (x.is_fully_addressable == sharding.is_fully_addressable):
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
