"""The name-table engine: which tensors on disk make up which leaves of a model, written once and read both ways.

A table is a tuple of `Name`s:

    Name("layers.{l}.attention.q.weight", "model.layers.{l}.self_attn.q_proj.weight")
    Name("layers.{l}.moe.experts.gate", "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight")
    Name(("layers.{l}.moe.experts.gate", "layers.{l}.moe.experts.up"), "model.layers.{l}.mlp.experts.gate_up_proj")

A placeholder that is missing on our side numbers the entries of the leaf's first axis: it is a stack of the tensors.
Several leaves on our side are concatenated along axis -2 of the tensor, in that order. gpt-oss lays its out otherwise:

    Name(("gate", "up"), "gate_up_proj", interleaved=True, transposed=True)
    Name(("gate_bias", "up_bias"), "gate_up_proj_bias", axis=-1, interleaved=True)
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import equinox as eqx
import jax
import numpy as np

from eqx_moe.checkpoint.boxes import Box


@dataclass(frozen=True)
class Name:
    """One row of a name table: a template of leaf paths, and the template of the tensors that hold them.

    `axis` is the one along which several leaves are joined. With `interleaved` they take turns along it, instead of
    following one another. With `transposed` the tensor then has its last two axes exchanged.
    """

    ours: str | tuple[str, ...]
    theirs: str
    axis: int = -2
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Skipped:
    """A template of tensors that files may have and that are left out; `beside`: if the files have this tensor too."""

    theirs: str
    reason: str
    beside: str | None = None


class Part(NamedTuple):
    """What one leaf has in one tensor: the entry `index` of its stack, or with `()` the whole leaf."""

    leaf: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


class Composition(NamedTuple):
    """What tensors of one stack have in common: of which leaves they are made, the shapes of their parts, and the
    tensors' own; and the row of the name table that says how parts are joined where there are several."""

    leaves: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    row: Name


class Tensor(NamedTuple):
    """One tensor on disk. There may be 200,000, so it holds no more than its own name and place in the stack."""

    name: str
    index: tuple[int, ...]
    composition: Composition

    @property
    def shape(self) -> tuple[int, ...]:
        return self.composition.shape

    @property
    def row(self) -> Name:
        return self.composition.row

    @property
    def parts(self) -> tuple[Part, ...]:
        leaves, shapes = self.composition.leaves, self.composition.shapes
        return tuple([Part(leaf, self.index, shape) for leaf, shape in zip(leaves, shapes, strict=True)])

    @property
    def strided(self) -> bool:
        """Whether values of a part lie apart within an entry (see `lead`). Else they lie one after another."""
        return self.row.interleaved or self.row.transposed or self.row.axis > -2

    @property
    def lead(self) -> int:
        """How many of its first axes only number entries that are alike, each with all parts."""
        return max(0, len(self.shape) + min(self.row.axis, -2 if self.row.transposed else -1))

    def box_of(self, number: int, box: Box) -> Box:
        """Where in the tensor a box of the part `number` is; with steps, if parts take turns."""
        result, axis = list(box), len(box) + self.row.axis
        if self.row.interleaved:
            turns = len(self.composition.shapes)
            result[axis] = range(number + turns * box[axis].start, number + turns * box[axis].stop, turns)
        elif number:
            before = sum(shape[axis] for shape in self.composition.shapes[:number])
            result[axis] = range(before + box[axis].start, before + box[axis].stop)
        if self.row.transposed:
            result[-2:] = result[:-3:-1]
        return tuple(result)

    def turned(self, values: np.ndarray) -> np.ndarray:
        """Values of a part as a view with the tensor's order of axes."""
        return values.swapaxes(-1, -2) if self.row.transposed else values

    def joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The values of the whole tensor, or of an entry, from those of its parts."""
        shape = _joined(self.row, [part.shape for part in parts])
        values = np.empty(shape, parts[0].dtype)
        for view, part in zip(self.views(values), parts, strict=True):
            view[...] = part
        return values

    def views(self, values: np.ndarray) -> list[np.ndarray]:
        """Each part as a view of the whole tensor's values, or of those of an entry of its first `lead` axes."""
        axis = self.row.axis
        values, number = self.turned(values), len(self.composition.shapes)
        if self.row.interleaved:
            after = (slice(None),) * (-axis - 1)
            return [values[(..., slice(i, None, number), *after)] for i in range(number)]
        ends = itertools.accumulate(shape[axis] for shape in self.composition.shapes)
        return np.split(values, list(ends)[:-1], axis=axis) if number > 1 else [values]


def leaf_paths(tree: Any) -> dict[str, Any]:
    """The arrays (or `ShapeDtypeStruct`s) of a tree by dotted path, in tree order: `layers.0.attention.q.weight`."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if _is_weight(leaf)}


def replace_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with its arrays (or `ShapeDtypeStruct`s) exchanged for those of the same paths.

    `replace_leaves(tree, leaf_paths(tree))` is `tree`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves[_dotted(path)] if _is_weight(leaf) else leaf, tree
    )


def matcher(template: str) -> re.Pattern[str]:
    """The expression that whole names of a template match; each placeholder is a group of digits."""
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(f"(?P<{piece}>[0-9]+)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)), re.ASCII
    )


def plan(names: tuple[Name, ...], leaves: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors on disk of a model, by name, in the order of its leaves, so that a stack's tensors stand together.

    Raises:
        ValueError: the table does not fit the model: a leaf or a tensor named twice, a leaf named never, a row that
            names nothing, parts that cannot be concatenated.
    """
    tensors: dict[str, list[Tensor]] = {path: [] for path in leaves}  # by their first leaf
    named: set[str] = set()
    for row in names:
        for composition, group in _expand(row, leaves):
            for path in composition.leaves:
                if path in named:
                    raise ValueError(f"The name table names the leaf {path!r} twice.")
                named.add(path)
            tensors[composition.leaves[0]] = group
    unnamed = [path for path in leaves if path not in named]
    if unnamed:
        raise ValueError(f"The name table does not name the leaves {unnamed}.")
    result: dict[str, Tensor] = {}
    for group in tensors.values():
        for tensor in group:
            if result.setdefault(tensor.name, tensor) is not tensor:
                raise ValueError(f"The name table names the tensor {tensor.name!r} twice.")
    return result


def _expand(row: Name, leaves: Mapping[str, Any]) -> list[tuple[Composition, list[Tensor]]]:
    """For each leaf, or each few that are joined, their tensors in the order of the stack."""
    templates = (row.ours,) if isinstance(row.ours, str) else row.ours
    placeholders = re.findall(r"\{(\w+)\}", row.theirs)
    pattern = matcher(templates[0])
    stacked = [name for name in placeholders if name not in pattern.groupindex]
    groups = []
    for found in filter(None, map(pattern.fullmatch, leaves)):
        numbers = found.groupdict()
        paths = [template.format(**numbers) for template in templates]
        absent = [path for path in paths if path not in leaves]
        if absent:
            raise ValueError(f"{row} joins {paths}, but the model has no {absent}.")
        shapes = [tuple(leaves[path].shape) for path in paths]
        depth = len(stacked)
        ends = [shape[depth:] for shape in shapes]
        if not _joinable(row, ends, {shape[:depth] for shape in shapes}):
            raise ValueError(f"{row} cannot join leaves of the shapes {shapes}.")
        composition = Composition(tuple(paths), tuple(ends), _joined(row, ends), row)
        group = [
            Tensor(row.theirs.format(**numbers, **dict(zip(stacked, index, strict=True))), index, composition)
            for index in itertools.product(*map(range, shapes[0][:depth]))
        ]
        if group:
            groups.append((composition, group))
    if not groups:
        raise ValueError(f"{row} names nothing in the model.")
    return groups


# These two are called for every leaf, of which there may be 10,000: `EQX_MOE_TYPECHECK` took longer than all the rest.
@no_type_check
def _joinable(row: Name, shapes: list[tuple[int, ...]], stacks: set[tuple[int, ...]]) -> bool:
    least = max(-row.axis if len(shapes) > 1 else 0, 2 if row.transposed else 0)
    if len(stacks) > 1 or min(map(len, shapes)) < least:
        return False
    if len(shapes) == 1:
        return True
    other_axes = {(*shape[: row.axis], *shape[len(shape) + row.axis + 1 :]) for shape in shapes}
    return len(other_axes) == 1 and (len({shape[row.axis] for shape in shapes}) == 1 or not row.interleaved)


@no_type_check
def _joined(row: Name, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    shape = list(shapes[0])
    if len(shapes) > 1:
        shape[row.axis] = sum(each[row.axis] for each in shapes)
    if row.transposed:
        shape[-2:] = shape[:-3:-1]
    return tuple(shape)


def _is_weight(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct | np.ndarray)


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
