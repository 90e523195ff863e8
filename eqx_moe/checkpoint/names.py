"""The name-table engine: which tensors on disk make up which leaves of a model, written once and read both ways.

A table is a tuple of `Name`s:

    Name("layers.{l}.attention.q.weight", "model.layers.{l}.self_attn.q_proj.weight")
    Name("layers.{l}.moe.experts.gate", "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight")
    Name(("layers.{l}.moe.experts.gate", "layers.{l}.moe.experts.up"), "model.layers.{l}.mlp.experts.gate_up_proj")

A placeholder that is missing on our side numbers the entries of the leaf's first axis: it is a stack of the tensors.
Several leaves on our side are concatenated along axis -2 of the tensor, in that order.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np


@dataclass(frozen=True)
class Name:
    """One row of a name table: a template of leaf paths, and the template of the tensors that hold them."""

    ours: str | tuple[str, ...]
    theirs: str


@dataclass(frozen=True)
class Part:
    """What one leaf has in one tensor: the entry `index` of its stack, or with `()` the whole leaf."""

    leaf: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk: its parts, concatenated along axis -2 where there are several."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def runs(self) -> int:
        """How often its parts take turns in its bytes: once for every place on the axes before -2."""
        return math.prod(self.shape[:-2]) if len(self.parts) > 1 else 1


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
    tensors: dict[str, Tensor] = {}
    named: dict[str, Name] = {}
    slots: set[tuple[str, tuple[int, ...]]] = set()
    for row in names:
        for tensor in _expand(row, leaves):
            if tensor.name in tensors:
                raise ValueError(f"The name table names the tensor {tensor.name!r} twice.")
            tensors[tensor.name] = tensor
            for part in tensor.parts:
                if named.setdefault(part.leaf, row) is not row or (part.leaf, part.index) in slots:
                    raise ValueError(f"The name table names the leaf {part.leaf!r} twice.")
                slots.add((part.leaf, part.index))
    unnamed = [path for path in leaves if path not in named]
    if unnamed:
        raise ValueError(f"The name table does not name the leaves {unnamed}.")
    order = {path: i for i, path in enumerate(leaves)}
    return {
        tensor.name: tensor
        for tensor in sorted(tensors.values(), key=lambda t: (order[t.parts[0].leaf], t.parts[0].index))
    }


def _expand(row: Name, leaves: Mapping[str, Any]) -> list[Tensor]:
    templates = (row.ours,) if isinstance(row.ours, str) else row.ours
    placeholders = re.findall(r"\{(\w+)\}", row.theirs)
    pattern = matcher(templates[0])
    stacked = [name for name in placeholders if name not in pattern.groupindex]
    tensors = []
    for found in filter(None, map(pattern.fullmatch, leaves)):
        numbers = found.groupdict()
        paths = [template.format(**numbers) for template in templates]
        absent = [path for path in paths if path not in leaves]
        if absent:
            raise ValueError(f"{row} joins {paths}, but the model has no {absent}.")
        shapes = [tuple(leaves[path].shape) for path in paths]
        depth = len(stacked)
        if len({shape[:-2] + shape[-1:] for shape in shapes}) > 1 or min(map(len, shapes)) < depth + 2 * (
            len(paths) > 1
        ):
            raise ValueError(f"{row} cannot join leaves of the shapes {shapes}.")
        for index in itertools.product(*map(range, shapes[0][:depth])):
            parts = tuple(Part(p, index, shape[depth:]) for p, shape in zip(paths, shapes, strict=True))
            name = row.theirs.format(**numbers, **dict(zip(stacked, index, strict=True)))
            tensors.append(Tensor(name, _joined([part.shape for part in parts]), parts))
    if not tensors:
        raise ValueError(f"{row} names nothing in the model.")
    return tensors


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    first = shapes[0]
    return first if len(shapes) == 1 else (*first[:-2], sum(shape[-2] for shape in shapes), first[-1])


def _is_weight(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct | np.ndarray)


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
