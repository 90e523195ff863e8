"""Leaves that are still in their files: what writes them reads them, an entry at a time.

So a checkpoint is written anew in another layout or dtype, however large it is: memory holds what one of the new
tensors has, never the model.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eqx_moe.checkpoint.boxes import lengths, whole
from eqx_moe.checkpoint.dtypes import WEIGHT_DTYPES, target_dtype, weight_dtype
from eqx_moe.checkpoint.filling import check_equal, reads
from eqx_moe.checkpoint.matching import match
from eqx_moe.checkpoint.names import Name, Skipped, Tensor
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.shards import Stored, open_weights


@dataclass(frozen=True)
class Unread:
    """A leaf in open files. `read(index)` gives the entry `index` of its first axes, `read(())` all of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[int, ...]], np.ndarray]


@contextlib.contextmanager
def open_leaves(
    folder: str | os.PathLike,
    leaves: Mapping[str, Any],
    layouts: Mapping[str, tuple[Name, ...]],
    *,
    skipped: Iterable[Skipped],
    tied: tuple[tuple[str, str], ...] = (),
    dtype: str = "auto",
    keep_fp32: tuple[str, ...] = (),
) -> Iterator[dict[str, Unread]]:
    """The leaves of a model (path -> anything with its shape), in a folder of safetensors files that stay open.

    The arguments and the errors are those of `eqx_moe.checkpoint.reader.load_leaves`.
    """
    folder = pathlib.Path(folder)
    with open_weights(folder) as opened:
        stored = decoded(opened)
        tensors = match(folder, leaves, layouts, stored, skipped=skipped, tied=tied, one_dtype=dtype == "auto")
        for name, original in tied:
            if name in stored:
                check_equal(stored[name], stored[original], name, original)
        yield unread(leaves, tensors, stored, dtype=dtype, keep_fp32=keep_fp32)


def unread(
    leaves: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    *,
    dtype: str = "auto",
    keep_fp32: tuple[str, ...] = (),
) -> dict[str, Unread]:
    """The leaves that the tensors make up, which are in `stored` under their names."""
    named = None if dtype == "auto" else weight_dtype(dtype)
    parts: dict[str, dict[tuple[int, ...], _Source]] = {}
    for tensor in tensors.values():
        for number, part in enumerate(tensor.parts):
            parts.setdefault(part.leaf, {})[part.index] = _Source(tensor, number, stored[tensor.name])
    result = {}
    for path, leaf in leaves.items():
        source = next(iter(parts[path].values()))
        target = target_dtype(path, WEIGHT_DTYPES[source.stored.entry.dtype], named, keep_fp32)
        shape = tuple(leaf.shape)
        result[path] = Unread(shape, target, _Leaf(shape, target, parts[path]).read)
    return result


@dataclass(frozen=True)
class _Source:
    """One part of one tensor."""

    tensor: Tensor
    number: int
    stored: Stored

    def read(self, index: tuple[int, ...], target: np.ndarray) -> None:
        """Fills a contiguous array with the entry `index` of the part's first axes."""
        shape = self.tensor.composition.shapes[self.number]
        box = (*(range(i, i + 1) for i in index), *whole(shape[len(index) :]))
        for _, read in reads(self.tensor, self.stored, [(self.number, box, target.reshape(lengths(box)))]):
            read()


@dataclass(frozen=True)
class _Leaf:
    """A leaf, and what has its entries: `()` all of it, or every one of its stack."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sources: Mapping[tuple[int, ...], _Source]

    def read(self, index: tuple[int, ...]) -> np.ndarray:
        depth = len(next(iter(self.sources)))
        target = np.empty(self.shape[len(index) :], self.dtype)
        if len(index) >= depth:
            self.sources[index[:depth]].read(index[depth:], target)
            return target
        for at, source in self.sources.items():
            if at[: len(index)] == index:
                source.read((), target[at[len(index) :]])
        return target
