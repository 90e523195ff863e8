"""Reading a model's weights: everything is checked first, then each stack is read into the place where it stays, or
used from where it lies in the file."""

import concurrent.futures
import contextlib
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

from eqx_moe.checkpoint.boxes import Box, common, inside, lengths, make_one, size, united, whole
from eqx_moe.checkpoint.checksums import verify_checksums
from eqx_moe.checkpoint.dtypes import WEIGHT_DTYPES, target_dtype, weight_dtype
from eqx_moe.checkpoint.filling import check_equal, reads
from eqx_moe.checkpoint.header import ALIGNMENT
from eqx_moe.checkpoint.mapping import may_be_mapped
from eqx_moe.checkpoint.matching import match
from eqx_moe.checkpoint.names import Name, Skipped, Tensor, matcher
from eqx_moe.checkpoint.progress import progress
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.shards import Stored, open_weights, threads
from eqx_moe.errors import CheckpointError

_BLOCK = 1 << 20  # elements looked at, at a time
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
    opened: Mapping[str, Stored] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Reads the leaves of a model (path -> shape) from a folder of safetensors files.

    A leaf whose bytes lie in one file just as the model wants them is not read but mapped, on a local disk under Linux
    (see `eqx_moe.checkpoint.mapping`); on CPU the array then *is* the file. For the others the host holds the model
    (where it is also the device) and one leaf, or the few that share tensors on disk. With `shardings` no device holds
    more than its parts. In a program of several processes each opens the same files, but of a leaf holds only what its
    own devices do, and reads that alone, but for what lies between in gaps too short to skip (`Stored.read`).

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
        opened: the folder's `open_weights`, for who has opened it anyway.

    Raises:
        CheckpointError: ST-*, IDX-* and SUM-* codes, see `eqx_moe.errors`; no data is read before all headers are found
            right.
        ValueError: the dtype is no float dtype; the name table does not fit the leaves.
    """
    folder = pathlib.Path(folder)
    named = None if dtype == "auto" else weight_dtype(dtype)
    checked = [matcher(template) for template in finite]
    with open_weights(folder) if opened is None else contextlib.nullcontext(opened) as opened:
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
            groups.setdefault(tensor.composition.leaves, []).append(tensor)
        result: dict[str, jax.Array] = {}
        boxes = {
            path: [whole(leaf.shape)] if shardings is None else _boxes(leaf.shape, shardings[path])
            for path, leaf in leaves.items()
        }
        total = sum(
            size(box) * WEIGHT_DTYPES[stored[name].entry.dtype].itemsize
            for name, tensor in tensors.items()
            for _, _, box in _held(tensor, boxes)
        )
        maps: dict[str, mmap.mmap | None] = {}
        with concurrent.futures.ThreadPoolExecutor(threads()) as pool, progress("loading", total) as bar:
            for paths, group in groups.items():
                source = WEIGHT_DTYPES[stored[group[0].name].entry.dtype]
                targets = {path: target_dtype(path, source, named, keep_fp32) for path in paths}
                mapped = _mapped(paths, group, stored, leaves, targets, maps)
                if mapped is not None:
                    buffers = {paths[0]: [mapped[inside(box, whole(mapped.shape))] for box in boxes[paths[0]]]}
                    bar.update(sum(buffer.nbytes for buffer in buffers[paths[0]]))
                else:
                    buffers = {p: [aligned_empty(lengths(box), targets[p]) for box in boxes[p]] for p in paths}
                    places = ((tensor, _places(tensor, boxes, buffers)) for tensor in group)
                    for count in _run(pool, [each for t, there in places for each in reads(t, stored[t.name], there)]):
                        bar.update(count)
                for tensor in group:
                    looked_at = verify or len(tensor.shape) == 1
                    if looked_at or any(pattern.fullmatch(path) for pattern in checked for path in paths):
                        _check_finite(tensor, stored[tensor.name], boxes, buffers)
                for path in paths:
                    result[path] = (
                        jax.device_put(buffers.pop(path)[0])
                        if shardings is None
                        else _put(boxes[path], buffers.pop(path), leaves[path].shape, shardings[path])
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
    try:
        for size, done in running:
            done.result()
            yield size
    finally:  # After an error, or Ctrl-C, the pool would read all the rest before it ends.
        for _, done in running:
            done.cancel()


def _boxes(shape: tuple[int, ...], sharding: Sharding) -> list[Box]:
    """What this process holds of a leaf: as few boxes as it can be, none of them with anything else in it."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    return united((_box(index, shape) for index in parts if index is not None), make_one)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(range(*along.indices(length)) for along, length in zip(index, shape, strict=True))


def _held(tensor: Tensor, boxes: Mapping[str, list[Box]]) -> Iterator[tuple[int, int, Box]]:
    """What of a tensor is held: the number of a part, that of a box of its leaf, and this as a box of the part."""
    for number, leaf in enumerate(tensor.composition.leaves):
        for which, box in enumerate(boxes[leaf]):
            if all(i in along for i, along in zip(tensor.index, box, strict=False)):
                yield number, which, box[len(tensor.index) :]


def _places(
    tensor: Tensor, boxes: Mapping[str, list[Box]], buffers: Mapping[str, list[np.ndarray]]
) -> Iterator[tuple[int, Box, np.ndarray]]:
    """Where what is held of a tensor goes: the number of a part, a box of it, and the place in a buffer of its leaf."""
    for number, which, box in _held(tensor, boxes):
        leaf = tensor.composition.leaves[number]
        entry = (i - along.start for i, along in zip(tensor.index, boxes[leaf][which], strict=False))
        yield number, box, buffers[leaf][which][(*entry, ...)]


def _put(boxes: list[Box], buffers: list[np.ndarray], shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """The leaf of which these boxes are in the buffers, each device's part copied to it."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        box = _box(index, shape)
        held = zip(boxes, buffers, strict=True)
        around, buffer = next((b, values) for b, values in held if common(box, b) == size(box))
        view = buffer[inside(box, around)]
        # A map costs no memory, so that any part of it may keep all of it alive.
        if view.flags.c_contiguous and (view.shape == buffer.shape or not buffer.flags.writeable):
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


def _check_finite(
    tensor: Tensor, stored: Stored, boxes: Mapping[str, list[Box]], buffers: Mapping[str, list[np.ndarray]]
) -> None:
    for _, box, place in _places(tensor, boxes, buffers):
        flat = place.reshape(-1)
        for first in range(0, flat.size, _BLOCK):
            odd = np.flatnonzero(~np.isfinite(flat[first : first + _BLOCK]))
            if odd.size:
                found = np.unravel_index(first + odd[0], place.shape)
                at = tuple(along[i] for along, i in zip(box, map(int, found), strict=True))
                raise CheckpointError(
                    code="ST-VALUE",
                    doing="reading weights",
                    file=stored.path,
                    item=tensor.name,
                    expected="finite values",
                    found=f"{place[found]} at {at}",
                    fix="download the file again; if it came so, the training that wrote it had failed",
                )
