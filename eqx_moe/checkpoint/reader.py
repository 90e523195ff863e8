"""Reading a model's weights: everything is checked first, then each stack is read into the place where it stays."""

import math
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float

from eqx_moe.checkpoint.dtypes import WEIGHT_DTYPES, cast, target_dtype, weight_dtype
from eqx_moe.checkpoint.matching import match
from eqx_moe.checkpoint.names import Name, Tensor
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.shards import Stored, open_weights
from eqx_moe.errors import CheckpointError, quote

# `jax.device_put` takes a host buffer over without a copy if it starts at a multiple of 64 bytes (on CPU).
_ALIGNMENT = 64
_CHUNK = 1 << 22  # elements cast or bytes compared at a time


def load_leaves(
    folder: str | os.PathLike,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    layouts: Mapping[str, tuple[Name, ...]],
    *,
    skipped: Mapping[str, str],
    tied: tuple[tuple[str, str], ...] = (),
    dtype: str = "auto",
    keep_fp32: tuple[str, ...] = (),
    shardings: Mapping[str, Sharding] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Reads the leaves of a model (path -> shape) from a folder of safetensors files.

    The host holds the model (where it is also the device) and one leaf, or the few that share tensors on disk. With
    `shardings` no device holds more than its parts. In a program of several processes each reads the same files, but
    leaves out the entries of a stack (experts, say) that none of its devices holds.

    Args:
        leaves: their dtypes are not looked at.
        layouts: name tables, of which the one that fits the files best is held against them.
        skipped: templates of tensors that may be there and are left out -> the reason.
        tied: (second name, name) of tensors that may be stored twice, and then must be equal bit for bit.
        dtype: "auto" keeps every tensor as it is stored; else the name of the dtype to which all are cast.
        keep_fp32: templates of leaf paths that become float32 whatever other dtype is named.
        shardings: path -> where the leaf goes; None puts all on the default device.

    Raises:
        CheckpointError: ST-* and IDX-* codes, see `eqx_moe.errors`; no data is read before all headers are found right.
        ValueError: the dtype is no float dtype; the name table does not fit the leaves.
    """
    folder = pathlib.Path(folder)
    named = None if dtype == "auto" else weight_dtype(dtype)
    with open_weights(folder) as opened:
        stored = decoded(opened)
        tensors = match(folder, leaves, layouts, stored, skipped=skipped, tied=tied, one_dtype=named is None)
        for name, original in tied:
            if name in stored:
                check_equal(stored[name], stored[original], name, original)
        # Leaves that share tensors (gate and up, packed) are read together, each tensor once.
        groups: dict[tuple[str, ...], list[Tensor]] = {}
        for tensor in tensors.values():
            groups.setdefault(tuple(part.leaf for part in tensor.parts), []).append(tensor)
        result: dict[str, jax.Array] = {}
        for paths, group in groups.items():
            kept = _entries_here(paths, group, leaves, shardings)
            buffers = {}
            for path in paths:
                target = target_dtype(path, WEIGHT_DTYPES[stored[group[0].name].entry.dtype], named, keep_fp32)
                buffers[path] = aligned_empty((len(kept), *leaves[path].shape[1:]), target)
            for tensor in group:
                index = tensor.parts[0].index
                if index and index[0] not in kept:
                    continue
                here = (index[0] - kept.start, *index[1:]) if index else ()
                places = [buffers[part.leaf][(*here, ...)] for part in tensor.parts]
                _read_tensor(tensor, stored[tensor.name], places)
            for path in paths:
                buffer = buffers.pop(path)
                result[path] = (
                    jax.device_put(buffer)
                    if shardings is None
                    else _put(buffer, kept.start, leaves[path].shape, shardings[path])
                )
    return {path: result[path] for path in leaves}


def _entries_here(
    paths: tuple[str, ...],
    group: list[Tensor],
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, Sharding] | None,
) -> range:
    """Which entries of their first axis this process needs: all, but of stacks only what its devices hold."""
    whole = range(leaves[paths[0]].shape[0])
    if shardings is None or not group[0].parts[0].index:
        return whole
    slices = [
        index[0].indices(len(whole))
        for path in paths
        for index in shardings[path].addressable_devices_indices_map(leaves[path].shape).values()
        if index is not None
    ]
    return range(min(start for start, _, _ in slices), max(stop for _, stop, _ in slices))


def _put(buffer: np.ndarray, start: int, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """The leaf whose entries from `start` on are in the buffer, each device's part copied to it."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, stop, _ = index[0].indices(shape[0])
        view = buffer[(slice(first - start, stop - start), *index[1:])]
        if view.shape == buffer.shape:
            return buffer
        # Apart from the buffer: a CPU device takes over what it is given, and would keep all of the buffer alive.
        apart = aligned_empty(view.shape, view.dtype)
        apart[...] = view
        return apart

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _read_tensor(tensor: Tensor, stored: Stored, places: list[np.ndarray]) -> None:
    """Reads one tensor from beginning to end, its parts each into its (contiguous) place."""
    start, itemsize = stored.entry.start, WEIGHT_DTYPES[stored.entry.dtype].itemsize
    rows = [place.reshape(tensor.runs, -1) for place in places]
    for run in range(tensor.runs):
        for row in rows:
            read_values(stored, start, row[run], tensor.name)
            start += row.shape[1] * itemsize


def read_values(stored: Stored, start: int, target: np.ndarray, name: str) -> None:
    """Reads a piece of a tensor from the byte `start` of its file into a flat array, cast to that one's dtype.

    Raises:
        CheckpointError: ST-RANGE if a value does not fit.
    """
    source = WEIGHT_DTYPES[stored.entry.dtype]
    if source == target.dtype:
        stored.read_into(start, target)
        return
    scratch = np.empty(min(target.size, _CHUNK), source)
    for first in range(0, target.size, _CHUNK):
        piece = target[first : first + _CHUNK]
        values = scratch[: piece.size]
        stored.read_into(start + first * source.itemsize, values)
        if not cast(values, piece):
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
    """Two tensors that config.json ties must be equal bit for bit; `CheckpointError` with code ST-TIED."""
    for start in range(0, stored.size, _CHUNK):
        pieces = [np.empty(min(_CHUNK, stored.size - start), np.uint8) for _ in range(2)]
        for each, piece in zip((stored, original), pieces, strict=True):
            each.read_into(each.entry.start + start, piece)
        if not np.array_equal(pieces[0], pieces[1]):
            first = start + int(np.argmax(pieces[0] != pieces[1]))
            raise CheckpointError(
                code="ST-TIED",
                doing="reading weights",
                file=stored.path,
                item=name,
                expected=f"the bytes of {quote(original_name)}, to which config.json ties it",
                found=f"a first difference at byte {first}",
                fix="set tie_word_embeddings to false if the model has a head of its own, else remove the tensor",
            )
