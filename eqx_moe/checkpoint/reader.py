"""Reading a model's weights: everything is checked first, then each stack is read into the place where it stays, or
used from where it lies in the file."""

import concurrent.futures
import functools
import itertools
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float

from eqx_moe.checkpoint.checksums import verify_checksums
from eqx_moe.checkpoint.dtypes import WEIGHT_DTYPES, cast, target_dtype, weight_dtype
from eqx_moe.checkpoint.header import ALIGNMENT
from eqx_moe.checkpoint.mapping import may_be_mapped
from eqx_moe.checkpoint.matching import match
from eqx_moe.checkpoint.names import Name, Skipped, Tensor, matcher
from eqx_moe.checkpoint.progress import progress
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.shards import Stored, open_weights, threads
from eqx_moe.errors import CheckpointError, quote

_PIECE = 1 << 24  # bytes that a thread reads, or that are compared, at a time
_BLOCK = 1 << 20  # elements cast or looked at, at a time
_LEAST_MAPPED = 1 << 20  # bytes of a leaf; for less, a map saves nothing
_LEAST_SHARED_OUT = 1 << 22  # bytes of what is read at once; for less, threads cost more than they bring


def load_leaves(
    folder: str | os.PathLike,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    layouts: Mapping[str, tuple[Name, ...]],
    *,
    skipped: Iterable[Skipped],
    tied: tuple[tuple[str, str], ...] = (),
    dtype: str = "auto",
    keep_fp32: tuple[str, ...] = (),
    finite: tuple[str, ...] = (),
    verify: bool = False,
    shardings: Mapping[str, Sharding] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Reads the leaves of a model (path -> shape) from a folder of safetensors files.

    A leaf whose bytes lie in one file just as the model wants them is not read but mapped, on a local disk under Linux
    (see `eqx_moe.checkpoint.mapping`); on CPU the array then *is* the file. For the others the host holds the model
    (where it is also the device) and one leaf, or the few that share tensors on disk. With `shardings` no device holds
    more than its parts. In a program of several processes each opens the same files, but reads of a leaf only the span
    along its first axis that its own devices hold.

    Args:
        leaves: their dtypes are not looked at.
        layouts: name tables, of which the one that fits the files best is held against them.
        skipped: tensors that may be there and are left out.
        tied: (second name, name) of tensors that may be stored twice, and then must be equal bit for bit.
        dtype: "auto" keeps every tensor as it is stored; else the name of the dtype to which all are cast.
        keep_fp32: templates of leaf paths that become float32 whatever other dtype is named.
        finite: templates of leaf paths without NaN and infinity; tensors of one dimension (norms, biases) are always
            looked at.
        verify: reads every byte, holds it against the checksums that `save_leaves` wrote, and wants all values finite.
        shardings: path -> where the leaf goes; None puts all on the default device.

    Raises:
        CheckpointError: ST-*, IDX-* and SUM-* codes, see `eqx_moe.errors`; no data is read before all headers are found
            right.
        ValueError: the dtype is no float dtype; the name table does not fit the leaves.
    """
    folder = pathlib.Path(folder)
    named = None if dtype == "auto" else weight_dtype(dtype)
    checked = [matcher(template) for template in finite]
    with open_weights(folder) as opened:
        stored = decoded(opened)
        tensors = match(folder, leaves, layouts, stored, skipped=skipped, tied=tied, one_dtype=named is None)
        if verify:
            verify_checksums(folder, opened)
        for name, original in tied:
            if name in stored:
                check_equal(stored[name], stored[original], name, original)
        # Leaves that share tensors (gate and up, packed) are read together, each tensor once.
        groups: dict[tuple[str, ...], list[Tensor]] = {}
        for tensor in tensors.values():
            groups.setdefault(tuple(part.leaf for part in tensor.parts), []).append(tensor)
        result: dict[str, jax.Array] = {}
        size = sum(stored[name].size for name in tensors)
        maps: dict[str, mmap.mmap | None] = {}
        with concurrent.futures.ThreadPoolExecutor(threads()) as pool, progress("loading", size) as bar:
            for paths, group in groups.items():
                kept = _span(group[0], leaves, shardings)
                source = WEIGHT_DTYPES[stored[group[0].name].entry.dtype]
                targets = {path: target_dtype(path, source, named, keep_fp32) for path in paths}
                mapped = _mapped(paths, group, stored, leaves, targets, maps)
                if mapped is not None:
                    kept, buffers = None, {paths[0]: mapped}
                    bar.update(mapped.nbytes)
                else:
                    buffers = {
                        path: aligned_empty((shape[0] if kept is None else len(kept), *shape[1:]), targets[path])
                        for path in paths
                        for shape in [leaves[path].shape]
                    }
                    pieces = [p for tensor in group for p in _read_tensor(tensor, stored[tensor.name], buffers, kept)]
                    for read in _run(pool, pieces):
                        bar.update(read)
                for tensor in group:
                    looked_at = verify or len(tensor.shape) == 1
                    if looked_at or any(pattern.fullmatch(path) for pattern in checked for path in paths):
                        _check_finite(tensor, stored[tensor.name], buffers, kept)
                for path in paths:
                    buffer = buffers.pop(path)
                    result[path] = (
                        jax.device_put(buffer)
                        if shardings is None
                        else _put(buffer, kept.start if kept else 0, leaves[path].shape, shardings[path])
                    )
            # A copy to an accelerator reads from the files until it is done.
            jax.block_until_ready(result)
    return {path: result[path] for path in leaves}


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _run(pool: concurrent.futures.Executor, pieces: list[tuple[int, Callable[[], None]]]) -> Iterator[int]:
    """Runs what reads so many bytes each, spread over threads if it is much; yields the bytes as they are read."""
    if sum(size for size, _ in pieces) < _LEAST_SHARED_OUT:
        for size, read in pieces:
            read()
            yield size
        return
    running = [(size, pool.submit(read)) for size, read in pieces]
    for size, done in running:
        done.result()
        yield size


def _span(
    tensor: Tensor, leaves: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, Sharding] | None
) -> range | None:
    """What this process needs of the leaves that share a tensor, along their first axis; None is all."""
    if shardings is None:
        return None
    if not (tensor.parts[0].index or tensor.lead) and (tensor.strided or len(tensor.parts) > 1):
        return None  # a part of the leaves is no piece of the tensor
    paths = [part.leaf for part in tensor.parts]
    slices = [
        index[0].indices(leaves[path].shape[0])
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
        # A map costs no memory, so that any part of it may keep all of it alive.
        if view.shape == buffer.shape or (not buffer.flags.writeable and view.flags.c_contiguous):
            return view
        # Apart from the buffer: a CPU device takes over what it is given, and would keep all of the buffer alive.
        apart = aligned_empty(view.shape, view.dtype)
        apart[...] = view
        return apart

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def _mapped(
    paths: tuple[str, ...],
    tensors: list[Tensor],
    all_stored: Mapping[str, Stored],
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    targets: Mapping[str, np.dtype],
    maps: dict[str, mmap.mmap | None],
) -> np.ndarray | None:
    """A leaf as a view of its file, if its tensors lie there as the model has them: in one dtype, one after another.

    `maps` keeps the maps of files, None for those that may not be mapped.
    """
    stored = [all_stored[tensor.name] for tensor in tensors]
    path, first = paths[0], stored[0]
    if len(paths) > 1 or tensors[0].strided or first.entry.start % ALIGNMENT:
        return None
    if sum(each.size for each in stored) < _LEAST_MAPPED:
        return None
    if any(WEIGHT_DTYPES[each.entry.dtype] != targets[path] or each.decode is not None for each in stored):
        return None
    for one, other in itertools.pairwise(stored):
        if other.file is not one.file or other.entry.start != one.entry.stop:
            return None
    if first.path not in maps:
        mappable = may_be_mapped(first.path)
        maps[first.path] = mmap.mmap(first.file.fileno(), 0, access=mmap.ACCESS_READ) if mappable else None
    opened = maps[first.path]
    if opened is None:
        return None
    shape = leaves[path].shape
    return np.frombuffer(opened, targets[path], math.prod(shape), first.entry.start).reshape(shape)


def _read_tensor(
    tensor: Tensor, stored: Stored, buffers: Mapping[str, np.ndarray], kept: range | None
) -> Iterator[tuple[int, Callable[[], None]]]:
    """What reads one tensor, its parts each into its place in the leaves' buffers: how many bytes, and a function."""
    index = tensor.parts[0].index
    if index and kept is not None and index[0] not in kept:
        return
    start, itemsize = stored.entry.start, WEIGHT_DTYPES[stored.entry.dtype].itemsize
    places = _places(tensor, buffers, kept)
    if tensor.strided:
        size = stored.size // math.prod(tensor.shape[: tensor.lead])
        skipped = kept.start if kept is not None and not index else 0
        for entry in np.ndindex(*places[0].shape[: tensor.lead]):
            theirs = (entry[0] + skipped, *entry[1:]) if entry else ()
            yield size, functools.partial(_read_strided, tensor, stored, theirs, entry, places)
        return
    runs = tensor.runs
    if not index and kept is not None:  # the buffers have a span of the tensor's own first axis
        start += kept.start * stored.size // tensor.shape[0]
        runs = runs // tensor.shape[0] * len(kept) if len(places) > 1 else 1
    rows = [place.reshape(runs, -1) for place in places]
    for run in range(runs):
        for row in rows:
            for first in range(0, row.shape[1], _PIECE // itemsize):
                piece = row[run, first : first + _PIECE // itemsize]
                size = piece.size * itemsize
                yield size, functools.partial(read_values, stored, start, piece, tensor.name)
                start += size


def _places(tensor: Tensor, buffers: Mapping[str, np.ndarray], kept: range | None) -> list[np.ndarray]:
    """Where the parts of a tensor lie in the buffers of its leaves."""
    index = tensor.parts[0].index
    here = (index[0] - (kept.start if kept else 0), *index[1:]) if index else ()
    return [buffers[part.leaf][(*here, ...)] for part in tensor.parts]


def _read_strided(
    tensor: Tensor, stored: Stored, theirs: tuple[int, ...], ours: tuple[int, ...], places: list[np.ndarray]
) -> None:
    """Reads the entry `theirs` of a strided tensor into the entry `ours` of each of its places."""
    for place, part in zip(places, read_entry(tensor, stored, theirs, places[0].dtype), strict=True):
        place[ours] = part


def read_entry(tensor: Tensor, stored: Stored, index: tuple[int, ...], dtype: np.dtype) -> list[np.ndarray]:
    """The parts of the entry `index` of a tensor's first `lead` axes, as views of one new array."""
    shape = tensor.shape[tensor.lead :]
    values = np.empty(math.prod(shape), dtype)
    number = int(np.ravel_multi_index(index, tensor.shape[: tensor.lead])) if index else 0
    size = values.size * WEIGHT_DTYPES[stored.entry.dtype].itemsize
    read_values(stored, stored.entry.start + number * size, values, tensor.name)
    return tensor.views(values.reshape(shape))


def read_values(stored: Stored, start: int, target: np.ndarray, name: str) -> None:
    """Reads a piece of a tensor from the byte `start` of its file into a flat array, cast to that one's dtype.

    Raises:
        CheckpointError: ST-RANGE if a value does not fit.
    """
    source = WEIGHT_DTYPES[stored.entry.dtype]
    if source == target.dtype:
        stored.read_into(start, target)
        return
    scratch = np.empty(min(target.size, _BLOCK), source)
    for first in range(0, target.size, _BLOCK):
        block = target[first : first + _BLOCK]
        values = scratch[: block.size]
        stored.read_into(start + first * source.itemsize, values)
        if not cast(values, block):
            raise CheckpointError(
                code="ST-RANGE",
                doing="reading weights",
                file=stored.path,
                item=name,
                expected=f"values that fit in {target.dtype}, at most {np.finfo(np.float16).max:g}",
                found=f"{np.nanmax(np.abs(values.astype(np.float32))):g}",
                fix="load in bfloat16 or float32",
            )


def _check_finite(tensor: Tensor, stored: Stored, buffers: Mapping[str, np.ndarray], kept: range | None) -> None:
    index = tensor.parts[0].index
    if index and kept is not None and index[0] not in kept:
        return
    for place in _places(tensor, buffers, kept):
        flat = place.reshape(-1)
        for first in range(0, flat.size, _BLOCK):
            odd = np.flatnonzero(~np.isfinite(flat[first : first + _BLOCK]))
            if odd.size:
                at = tuple(map(int, np.unravel_index(first + odd[0], place.shape)))
                raise CheckpointError(
                    code="ST-VALUE",
                    doing="reading weights",
                    file=stored.path,
                    item=tensor.name,
                    expected="finite values",
                    found=f"{place[at]} at {at}",
                    fix="download the file again; if it came so, the training that wrote it had failed",
                )


def check_equal(stored: Stored, original: Stored, name: str, original_name: str) -> None:
    """Two tensors that config.json ties must be equal bit for bit; `CheckpointError` with code ST-TIED."""
    for start in range(0, stored.size, _PIECE):
        pieces = [np.empty(min(_PIECE, stored.size - start), np.uint8) for _ in range(2)]
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
