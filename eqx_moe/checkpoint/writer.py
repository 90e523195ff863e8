"""Writing a checkpoint: shards planned from shapes, a run of a tensor in memory at a time, all put in place at once."""

import collections
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from tqdm import tqdm

from eqx_moe.checkpoint.checksums import CHECKSUMS, checksums_json
from eqx_moe.checkpoint.dtypes import FORMAT_NAMES, cast, target_dtype, weight_dtype
from eqx_moe.checkpoint.header import ALIGNMENT, write_header
from eqx_moe.checkpoint.names import Name, Tensor, plan
from eqx_moe.checkpoint.progress import progress
from eqx_moe.checkpoint.replacing import Replacing
from eqx_moe.checkpoint.shards import INDEX, SINGLE, WEIGHTS
from eqx_moe.checkpoint.streaming import Unread
from eqx_moe.errors import CheckpointError
from eqx_moe.sizes import parse_size


def save_leaves(
    folder: str | os.PathLike,
    leaves: Mapping[str, Float[Array | np.ndarray, "..."] | Unread],
    names: tuple[Name, ...],
    *,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    keep_fp32: tuple[str, ...] = (),
    other_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the leaves of a model (path -> array) as a folder of safetensors files, beside `other_files`.

    The host holds a leaf at a time; of a leaf that is spread over devices or still in files (`Unread`), what one tensor
    on disk has. If the devices belong to several processes, all must call this: the first writes, the others send, and
    all wait until it is done.

    Killed at any moment, this leaves the earlier model or the new one, whole (`eqx_moe.checkpoint.replacing`). The
    sha256 of the weights' files goes into eqx_moe.json.

    Args:
        max_shard_size: bytes, or a text such as "5GB" (10**9) or "2GiB" (2**30). A tensor is never split.
        dtype: the name of a dtype to cast to; None writes what there is.
        keep_fp32: templates of leaf paths that are written in float32 whatever other dtype is named.

    Raises:
        ValueError: the name table does not fit the leaves; a leaf is no float; a wrong argument.
        CheckpointError: CFG-FOLDER if the folder cannot be one; ST-RANGE if a value does not fit in `dtype`.
        OSError: the disk is full, or the like; the folder then holds the earlier model or the new one.
    """
    contents, size = weight_files(
        leaves, names, max_shard_size=max_shard_size, dtype=dtype, keep_fp32=keep_fp32, place=str(folder)
    )
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(
            code="CFG-FOLDER",
            doing="saving a model",
            file=str(folder),
            expected="a folder, or a name that is free",
            found="a file of that name, or on the way to it",
            fix="give another name",
        ) from error

    alone = is_of_one_process(leaves)
    if alone or jax.process_index() == 0:
        with Replacing(folder) as new, progress("saving", size) as bar:
            sums = {name: new.write(name, _counted(content(), bar)) for name, content in contents.items()}
            for name, content in (other_files or {}).items():
                new.write(name, (content,))
            new.write(CHECKSUMS, (checksums_json({name: sum.result() for name, sum in sums.items()}),))
            there = [entry.name for entry in folder.iterdir() if not entry.is_dir()]
            new.commit([name for name in there if WEIGHTS.fullmatch(name) and name not in sums])
    else:
        # The same gathering in the same order; what it brings is for the first process to write.
        for content in contents.values():
            collections.deque(content(), maxlen=0)
    if not alone:
        multihost_utils.sync_global_devices("eqx_moe.save_leaves")


def weight_files(
    leaves: Mapping[str, Float[Array | np.ndarray, "..."] | Unread],
    names: tuple[Name, ...],
    *,
    max_shard_size: int | str,
    dtype: str | None,
    keep_fp32: tuple[str, ...],
    place: str,
) -> tuple[dict[str, Callable[[], Iterable[bytes | memoryview]]], int]:
    """The files of weights of a model by name, shards and then the index, each as a function that gives its bytes; and
    the bytes of all these files.

    `place` stands for where they go, in errors; the other arguments and the errors are those of `save_leaves`.
    """
    limit = parse_size(max_shard_size, "max_shard_size")
    tensors = plan(names, leaves)
    odd = [path for path, leaf in leaves.items() if leaf.dtype not in FORMAT_NAMES]
    if odd:
        raise ValueError(
            f"Weights are {', '.join(map(str, FORMAT_NAMES))}; the leaf {odd[0]!r} is {leaves[odd[0]].dtype}."
        )
    named = None if dtype is None else weight_dtype(dtype)
    dtypes = {path: target_dtype(path, leaf.dtype, named, keep_fp32) for path, leaf in leaves.items()}
    shards = plan_shards(tensors, dtypes, limit)
    contents: dict[str, Callable[[], Iterable[bytes | memoryview]]] = {}
    data = size = sum(_bytes_of(tensor, dtypes) for tensor in tensors.values())
    for shard, group in shards.items():
        header = write_header({t.name: (FORMAT_NAMES[_dtype(t, dtypes)], t.shape) for t in group.values()})
        contents[shard] = functools.partial(_shard, header, group, leaves, dtypes, f"{place}/{shard}")
        size += len(header)
    if SINGLE not in shards:
        index = _index(shards, data)
        contents[INDEX] = lambda: (index,)
        size += len(index)
    return contents, size


def is_of_one_process(leaves: Mapping[str, Any]) -> bool:
    """Whether this process can read all leaves by itself."""
    return all(leaf.is_fully_addressable for leaf in leaves.values() if isinstance(leaf, jax.Array))


def plan_shards(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, np.dtype], limit: int
) -> dict[str, dict[str, Tensor]]:
    """Which tensors go into which file: in order, a new one when `limit` bytes would be passed.

    What a reader must know to map a leaf as it lies is kept together and aligned: a stack is in one file, if it is not
    larger than `limit`, its tensors one after another. Within a file the leaves of a multiple of 64 bytes come first,
    so that each starts at one, then the others, those of wide dtypes first, so that each starts at a whole element.
    """
    stacks: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in tensors.values():
        stacks.setdefault(tensor.composition.leaves, []).append(tensor)
    files: list[list[list[Tensor]]] = [[]]
    filled = 0
    for stack in stacks.values():
        whole = sum(_bytes_of(tensor, dtypes) for tensor in stack) <= limit
        for unit in [stack] if whole else [[tensor] for tensor in stack]:
            size = sum(_bytes_of(tensor, dtypes) for tensor in unit)
            if files[-1] and filled + size > limit:
                files.append([])
                filled = 0
            files[-1].append(unit)
            filled += size

    def place(unit: list[Tensor]) -> tuple[bool, int, int]:
        size = sum(_bytes_of(tensor, dtypes) for tensor in unit)
        # The largest of the odd ones is first: it is the one that is aligned.
        return (True, -_dtype(unit[0], dtypes).itemsize, -size) if size % ALIGNMENT else (False, 0, 0)

    ordered = [{tensor.name: tensor for unit in sorted(file, key=place) for tensor in unit} for file in files]
    if len(ordered) == 1:
        return {SINGLE: ordered[0]}
    return {f"model-{i:05}-of-{len(ordered):05}.safetensors": group for i, group in enumerate(ordered, 1)}


def _bytes_of(tensor: Tensor, dtypes: Mapping[str, np.dtype]) -> int:
    return math.prod(tensor.shape) * _dtype(tensor, dtypes).itemsize


def _dtype(tensor: Tensor, dtypes: Mapping[str, np.dtype]) -> np.dtype:
    first, *rest = [dtypes[leaf] for leaf in tensor.composition.leaves]
    if any(other != first for other in rest):
        leaves = list(tensor.composition.leaves)
        raise ValueError(f"{leaves} share the tensor {tensor.name!r} and need one dtype; give `dtype`, or cast them.")
    return first


def _index(shards: Mapping[str, Mapping[str, Tensor]], size: int) -> bytes:
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    index = {
        "metadata": {"total_parameters": sum(math.prod(tensor.shape) for tensor in tensors), "total_size": size},
        "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors},
    }
    return json.dumps(index, indent=2).encode() + b"\n"


def _shard(
    header: bytes,
    tensors: Mapping[str, Tensor],
    leaves: Mapping[str, Array | np.ndarray | Unread],
    dtypes: Mapping[str, np.dtype],
    file: str,
) -> Iterator[bytes | memoryview]:
    """The bytes of one file, a part of a tensor at a time."""
    yield header
    paths: tuple[str, ...] = ()
    hosts: dict[str, np.ndarray] = {}
    for tensor in tensors.values():
        if paths != (paths := tensor.composition.leaves):
            hosts.clear()  # before the next ones: elsewhere than on CPU these are copies
            for path in paths:
                if not isinstance(leaf := leaves[path], Unread) and not _is_spread(leaf):
                    hosts[path] = _host(leaf)
        for entry in np.ndindex(*tensor.shape[: tensor.lead]):
            blocks = [_entry_of(leaves[path], hosts.get(path), tensor.index + entry) for path in paths]
            if tensor.strided:
                yield _strided(tensor, blocks, _dtype(tensor, dtypes), file)
                continue
            for path, block in zip(paths, blocks, strict=True):
                yield _bytes(block, dtypes[path], tensor.name, file)


def _entry_of(leaf: Array | np.ndarray | Unread, host: np.ndarray | None, index: tuple[int, ...]) -> np.ndarray:
    """An entry of a leaf, contiguous; `host` has the whole leaf if it is not spread or in files."""
    return assemble(leaf, index) if host is None else np.ascontiguousarray(host[(*index, ...)])


def _counted(pieces: Iterable[bytes | memoryview], bar: tqdm) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        yield piece
        bar.update(len(piece))


def _strided(tensor: Tensor, blocks: list[np.ndarray], dtype: np.dtype, file: str) -> memoryview:
    """The bytes of an entry of a strided tensor; `blocks` are its parts."""
    return tensor.joined([_cast(block, dtype, tensor.name, file) for block in blocks]).reshape(-1).view(np.uint8).data


def _bytes(values: np.ndarray, dtype: np.dtype, name: str, file: str) -> memoryview:
    return _cast(values, dtype, name, file).reshape(-1).view(np.uint8).data


def _cast(values: np.ndarray, dtype: np.dtype, name: str, file: str) -> np.ndarray:
    if values.dtype != dtype:
        source, values = values, np.empty(values.shape, dtype)
        if not cast(source, values):
            raise CheckpointError(
                code="ST-RANGE",
                doing="saving a model",
                file=file,
                item=name,
                expected=f"values that fit in {dtype}",
                found=f"{np.nanmax(np.abs(source.astype(np.float32))):g}",
                fix="save in bfloat16 or float32",
            )
    return values


def _host(leaf: Array | np.ndarray) -> np.ndarray:
    """The values on the host: on CPU in place, elsewhere a copy that the array does not keep, as `np.asarray`'s."""
    try:
        return np.asarray(jax.device_put(leaf, jax.local_devices(backend="cpu")[0]))
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
        return np.asarray(leaf)


def _is_spread(leaf: Array | np.ndarray) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def assemble(leaf: Array | np.ndarray | Unread, index: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """The entry `index` of a leaf that is spread over devices, or in files yet, on the host.

    Where devices of other processes hold parts, all processes take part, and every device gets the whole entry.
    """
    if isinstance(leaf, Unread):
        return leaf.read(index)
    assert isinstance(leaf, jax.Array)
    if not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, NamedSharding), leaf.sharding
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return _host(jax.jit(_entry, out_shardings=whole)(leaf, index).addressable_data(0))
    entry = np.empty(leaf.shape[len(index) :], leaf.dtype)
    for shard in leaf.addressable_shards:
        places, rest = shard.index[: len(index)], shard.index[len(index) :]
        bounds = [place.indices(size) for place, size in zip(places, leaf.shape, strict=False)]
        if shard.replica_id == 0 and all(b[0] <= i < b[1] for i, b in zip(index, bounds, strict=True)):
            here = tuple(i - start for i, (start, _, _) in zip(index, bounds, strict=True))
            entry[rest] = _host(_entry(shard.data, here))
    return entry


@jax.jit
def _entry(leaf: Array, index: tuple[Array, ...]) -> Array:
    return leaf[index]
