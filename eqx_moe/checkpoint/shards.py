"""Finding a checkpoint's tensors: one model.safetensors, or shards that an index lists."""

import contextlib
import io
import itertools
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, NoReturn

import numpy as np

from eqx_moe.checkpoint.boxes import Box, extent, lengths, pieces, size, strides, stroke
from eqx_moe.checkpoint.files import exists, listing, open_plain, plain_name
from eqx_moe.checkpoint.header import Entry, read_header
from eqx_moe.checkpoint.jsonfile import read_json
from eqx_moe.errors import CheckpointError, quote
from eqx_moe.sizes import cores

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Says that the files of a save are being moved into place, see `eqx_moe.checkpoint.replacing`.
JOURNAL = ".eqx_moe.journal"
#: The files of weights that `save_leaves` writes, and others have written in their place (DeepSeek: `of-000163`).
WEIGHTS = re.compile(r"model(-[0-9]{5,6}-of-[0-9]{5,6})?\.safetensors|" + re.escape(INDEX))
#: An error lists no more than these: 100,000 sentences would take more memory than a small model.
MOST_PROBLEMS = 5_000
_DOING = "finding the weights"
_MAX_THREADS = 8
_SCRATCH = 1 << 20  # bytes read at a time, with those that are left out
_TRIES, _PAUSE = 20, 0.1  # seconds


def threads() -> int:
    """How many may read or write at a time. One core copies no faster than it is handed memory pages, so more help."""
    if not hasattr(os, "preadv"):
        return 1
    return min(_MAX_THREADS, cores())


class Stored(NamedTuple):
    """A tensor in an open file. `path` is the file's, for errors.

    With `decode`, which fills an array as `read` does, `entry` is that of the decoded tensor, as if a file of its own
    had its bytes.
    """

    file: io.FileIO
    path: str
    entry: Entry
    decode: Callable[[Box, np.ndarray], None] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.entry.stop - self.entry.start

    def read(self, box: Box, target: np.ndarray) -> None:
        """Fills a contiguous array, of a box's shape and of the dtype in the file, with the values of the box.

        Of the file it reads no more than these and what lies closely between them. Threads may share a file.
        """
        if self.decode is not None:
            self.decode(box, target)
            return
        if not target.size:
            return
        shape, itemsize = self.entry.shape, target.itemsize
        outer, _ = stroke(box, shape, itemsize)
        inner = box[outer:]
        rows = target.reshape(math.prod(map(len, box[:outer])), *lengths(inner))
        for number, index in enumerate(itertools.product(*box[:outer])):
            self._read_closely((*index, *(along.start for along in inner)), inner, rows[number, ...])

    def _read_closely(self, first: tuple[int, ...], box: Box, target: np.ndarray) -> None:
        """Fills an array with the values of a box of the last axes, of which `first` is the first."""
        steps, itemsize, shape = strides(self.entry.shape), target.itemsize, self.entry.shape[len(first) - len(box) :]
        start = self.entry.start + sum(map(math.prod, zip(first, steps, strict=True))) * itemsize
        if extent(box, shape) == size(box):
            read_into(self.file, self.path, start, target)
            return
        scratch = np.empty(min(_SCRATCH // itemsize, extent(box, shape)), target.dtype)
        for piece in pieces(tuple(range(len(along)) for along in box), shape, scratch.size):
            at = sum(along.start * step for along, step in zip(piece, strides(shape), strict=True))
            values = scratch[: extent(piece, shape)]
            read_into(self.file, self.path, start + at * itemsize, values)
            part = target[tuple(slice(along.start, along.stop) for along in piece)]
            part[...] = np.lib.stride_tricks.as_strided(
                values, lengths(piece), [step * itemsize for step in strides(shape)], writeable=False
            )


@contextlib.contextmanager
def open_weights(folder: pathlib.Path) -> Iterator[dict[str, Stored]]:
    """All tensors of a folder by name, headers and index checked; the files stay open, so that what is read is what was
    checked.

    Raises:
        CheckpointError: ST-* and IDX-* codes; ST-CHANGED on leaving, if a file was written to meanwhile.
    """
    with contextlib.ExitStack() as stack:
        weight_map, shards = _open_all(folder)
        for file in shards.values():
            stack.enter_context(file)
        before = {shard: _version(file) for shard, file in shards.items()}
        paths = {shard: str(folder / shard) for shard in shards}
        entries = {shard: read_header(file, paths[shard]) for shard, file in shards.items()}
        if weight_map is not None:
            check_index(weight_map, entries, str(folder / INDEX))
        yield {
            tensor: Stored(shards[shard], paths[shard], entry)
            for shard, tensors in entries.items()
            for tensor, entry in tensors.items()
        }
        for shard, file in shards.items():
            if _version(file) != before[shard]:
                changed_while_reading(paths[shard])


def read_into(file: io.FileIO, path: str, start: int, target: np.ndarray) -> None:
    """Fills a contiguous array with what an open file has from the byte `start` on; threads may share the file.

    Raises:
        CheckpointError: ST-CHANGED if the file ends before.
    """
    view = target.reshape(-1).view(np.uint8).data
    while view:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [view], start)
        else:  # Windows, where `threads` is 1.
            file.seek(start)
            count = file.readinto(view)
        if not count:
            changed_while_reading(path)
        view = view[count:]
        start += count


def weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The file that says which tensors there are: the index, or model.safetensors."""
    return folder / (INDEX if exists(folder / INDEX) else SINGLE)


def changed_while_reading(path: str) -> NoReturn:
    raise CheckpointError(
        code="ST-CHANGED",
        doing="reading weights",
        file=path,
        expected="a file that stays as it is",
        found="another size or modification time than when its header was read",
        fix="load again when nothing writes to the folder",
    )


def _open_all(folder: pathlib.Path) -> tuple[dict[str, str] | None, dict[str, io.FileIO]]:
    """The index and the open shards, all of one save: opened anew while another process moves new ones into place."""
    for _ in range(_TRIES):
        with contextlib.ExitStack() as stack:
            weight_map = _weight_map(folder)
            shards = {
                shard: stack.enter_context(open_plain(folder / shard, code="ST-FILE", doing=_DOING))
                for shard in (sorted(set(weight_map.values())) if weight_map is not None else [SINGLE])
            }
            if not exists(folder / JOURNAL) and all(_is_at(file, folder / shard) for shard, file in shards.items()):
                stack.pop_all()
                return weight_map, shards
        time.sleep(_PAUSE)
    changed_while_reading(str(folder))


def _is_at(file: io.FileIO, path: pathlib.Path) -> bool:
    return exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def _version(file: io.FileIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _weight_map(folder: pathlib.Path) -> dict[str, str] | None:
    """Which shard each tensor lies in; None if there is one file and no index."""
    if not exists(folder / INDEX):
        if not exists(folder / SINGLE):
            _no_weights(folder)
        return None
    weight_map = read_json(folder / INDEX, "index").get("weight_map")

    def refuse(code: str, item: str, expected: str, found: str, fix: str) -> NoReturn:
        raise CheckpointError(
            code=code, doing=_DOING, file=str(folder / INDEX), item=item, expected=expected, found=found, fix=fix
        )

    again = "download or export the index again"
    if not isinstance(weight_map, dict) or not weight_map:
        refuse("IDX-MAP", "weight_map", "an object that maps every tensor to its file", quote(weight_map), again)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            refuse("IDX-MAP", tensor, "the name of a file", quote(shard), again)
    # A hundred thousand tensors lie in a few files: what is asked of a file is asked once.
    shards = {shard: tensor for tensor, shard in reversed(weight_map.items())}
    for shard, tensor in reversed(shards.items()):
        if not plain_name(shard) or not shard.endswith(".safetensors"):
            expected = "the name of a .safetensors file in the same folder, without a path"
            refuse("IDX-PATH", tensor, expected, quote(shard), again)
    absent = sorted(shard for shard in shards if not exists(folder / shard))
    if absent:
        found = f"{', '.join(map(quote, absent[:10]))} missing, {len(absent)} in all; there are: {listing(folder)}"
        refuse("IDX-SHARD", absent[0], "every shard that the index lists", found, "download the missing shards")
    if exists(folder / SINGLE) and SINGLE not in weight_map.values():
        fix = f"remove {SINGLE} if the shards are the model, else {INDEX}"
        refuse(
            "IDX-AMBIGUOUS", SINGLE, "one model in the folder", "shards with an index, and a single file beside", fix
        )
    return weight_map


def _no_weights(folder: pathlib.Path) -> NoReturn:
    names = [entry.name for entry in folder.iterdir()]
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [
        name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and name != "training_args.bin"
    ]
    code, fix = "ST-WEIGHTS", "check the folder's name, or download the weights"
    if shards:
        code, fix = "IDX-SHARD", f"download {INDEX}; a single file must be called {SINGLE}"
    elif pickles:
        code = "ST-PICKLE"
        fix = (
            "pickled weights can run code and are never read; convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise CheckpointError(
        code=code,
        doing=_DOING,
        file=str(folder),
        item=sorted(shards or pickles or [SINGLE])[0],
        expected=f"{SINGLE}, or {INDEX} and its shards",
        found=listing(folder),
        fix=fix,
    )


def check_index(weight_map: Mapping[str, str], entries: Mapping[str, Mapping[str, Entry]], index: str) -> None:
    """Refuses shards (their tensors by name) that have others than the index lists for them: IDX-MISMATCH."""

    def differences() -> Iterator[tuple[str, str]]:
        for tensor, shard in weight_map.items():
            if tensor not in entries[shard]:
                places = [quote(other) for other, tensors in entries.items() if tensor in tensors]
                yield tensor, f"listed in {quote(shard)}, is in {' and '.join(places) or 'no shard'}"
        for shard, tensors in entries.items():
            for tensor in tensors:
                if tensor not in weight_map:
                    yield tensor, f"in {quote(shard)}, not listed"
                elif weight_map[tensor] != shard and tensor in entries[weight_map[tensor]]:
                    yield tensor, f"in {quote(shard)} and in {quote(weight_map[tensor])}"

    problems = list(itertools.islice(differences(), MOST_PROBLEMS))
    if problems:
        tensor, found = problems[0]
        raise CheckpointError(
            code="IDX-MISMATCH",
            doing=_DOING,
            file=index,
            item=tensor,
            expected="an index that lists exactly the tensors of its shards",
            found=found,
            fix="download the index and the shards of one and the same version",
            problems=tuple(f"{quote(tensor)}: {found}" for tensor, found in problems),
        )
