"""Tensors into the places of arrays where their values belong: a piece of a file at a time."""

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from eqx_moe.checkpoint.boxes import Box, around, brought, inside, lengths, meeting, pieces, size, united, whole
from eqx_moe.checkpoint.dtypes import DTYPES, WEIGHT_DTYPES, cast
from eqx_moe.checkpoint.names import Tensor
from eqx_moe.checkpoint.shards import Stored
from eqx_moe.errors import CheckpointError, quote

#: Bytes that a thread reads, or that are compared, at a time.
PIECE = 1 << 24
_BLOCK = 1 << 20  # elements cast at a time


def reads(
    tensor: Tensor, stored: Stored, places: Iterable[tuple[int, Box, np.ndarray]]
) -> Iterator[tuple[int, Callable[[], None]]]:
    """What brings boxes of a tensor's parts to their places.

    Args:
        places: (number of a part, box of it, array of the box's shape).

    Yields:
        How many bytes of the tensor a function brings, and the function.
    """
    itemsize = WEIGHT_DTYPES[stored.entry.dtype].itemsize
    wanted = [(tensor.box_of(number, box), tensor.turned(values)) for number, box, values in places]
    wanted = [(box, values) for box, values in wanted if values.size]

    def less_together(one: Box, other: Box) -> bool:
        both, *each = (brought(box, tensor.shape, itemsize) for box in (around(one, other), one, other))
        return both < sum(each)

    # So parts that take turns are read together, each byte once.
    for cover in united((around(box) for box, _ in wanted), less_together):
        for piece in pieces(cover, tensor.shape, PIECE // itemsize):
            targets = []
            for box, values in wanted:
                here = tuple(map(meeting, box, piece))
                if (target := values[here]).size:
                    targets.append((tuple(along[part] for along, part in zip(box, here, strict=True)), target))
            count = sum(target.size for _, target in targets) * itemsize
            yield count, functools.partial(_read_piece, tensor, stored, piece, targets)


def _read_piece(tensor: Tensor, stored: Stored, piece: Box, targets: list[tuple[Box, np.ndarray]]) -> None:
    """Reads a piece of a tensor, of which each of the boxes has its target."""
    first = targets[0][1]
    if first.size == size(piece) and first.flags.c_contiguous:
        read_values(stored, piece, first, tensor.name)
        return
    values = np.empty(lengths(piece), first.dtype)
    read_values(stored, piece, values, tensor.name)
    for box, target in targets:
        target[...] = values[inside(box, piece)]


def read_values(stored: Stored, box: Box, target: np.ndarray, name: str) -> None:
    """Reads a box of a tensor into a contiguous array of its shape, cast to that one's dtype.

    Raises:
        CheckpointError: ST-RANGE if a value does not fit.
    """
    source = WEIGHT_DTYPES[stored.entry.dtype]
    if source == target.dtype:
        stored.read(box, target)
        return
    scratch = np.empty(min(target.size, _BLOCK), source)
    for piece in pieces(box, stored.entry.shape, _BLOCK):
        values = scratch[: size(piece)].reshape(lengths(piece))
        stored.read(piece, values)
        if not cast(values, target[inside(piece, box)]):
            raise CheckpointError(
                code="ST-RANGE",
                doing="reading weights",
                file=stored.path,
                item=name,
                expected=f"values that fit in {target.dtype}, at most {np.finfo(np.float16).max:g}",
                found=f"{np.nanmax(np.abs(values.astype(np.float32))):g}",
                fix="load in bfloat16 or float32",
            )


def check_equal(stored: Stored, original: Stored, name: str, original_name: str) -> None:
    """Two tensors that config.json ties, of one shape and dtype, must be equal bit for bit; `CheckpointError` with code
    ST-TIED."""
    shape, dtype = stored.entry.shape, DTYPES[stored.entry.dtype]
    done = 0
    for piece in pieces(whole(shape), shape, PIECE // dtype.itemsize):
        one, other = (np.empty(lengths(piece), dtype) for _ in range(2))
        stored.read(piece, one)
        original.read(piece, other)
        one, other = one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)
        if not np.array_equal(one, other):
            first = done + int(np.argmax(one != other))
            raise CheckpointError(
                code="ST-TIED",
                doing="reading weights",
                file=stored.path,
                item=name,
                expected=f"the bytes of {quote(original_name)}, to which config.json ties it",
                found=f"a first difference at byte {first}",
                fix="set tie_word_embeddings to false if the model has a head of its own, else remove the tensor",
            )
        done += one.size
