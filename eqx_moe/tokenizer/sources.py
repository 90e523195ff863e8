"""Text to count, as chunks: from files, mapped into memory or unpacked, and from iterables of texts."""

import contextlib
import gzip
import importlib
import itertools
import mmap
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np

from eqx_moe.errors import DataError
from eqx_moe.tokenizer.cutting import find_cut

PathLike = str | os.PathLike[str]

_DOING = "counting words"

#: How many bytes are searched for the end of a line at once.
_STEP = 1 << 12


@dataclass(frozen=True)
class Chunk:
    """Documents, or a part of one: `text[bounds[d] : bounds[d + 1]]`.

    `text` is uint8, read-only. `begins`: whether the first of them begins here, and not in an earlier chunk. `size`:
    how far the chunk moves the progress. `origin`: where `text[0]` stands in `file`, unpacked if that is compressed.
    `mapped`: what `text` is mapped by.
    """

    text: np.ndarray
    bounds: np.ndarray
    begins: bool
    size: int
    file: str = ""
    origin: int = 0
    mapped: mmap.mmap | None = None

    @property
    def end(self) -> int:
        """Where the chunk ends in its file's text."""
        return self.origin + int(self.bounds[-1])

    def release(self):
        """Let go of the memory that holds the chunk, if it is mapped: it would be counted as this process's."""
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            start, end = int(self.bounds[0]), int(self.bounds[-1])
            start -= start % mmap.PAGESIZE
            self.mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def refuse(self, place: int) -> NoReturn:
        """Raise the error for bytes from `text[place]` on that are not UTF-8."""
        where, byte = self.origin + place, int(self.text[place])
        found = f"the byte 0x{byte:02x} at byte {where:,} (counted from 0)"
        if self.file.endswith((".gz", ".zst")):
            found += " of the unpacked text"
        _refuse("DATA-UTF8", self.file, "UTF-8 text", found, "convert the file to UTF-8, or leave it out")


def _refuse(code: str, file: str, expected: str, found: str, fix: str, item: str = "") -> NoReturn:
    raise DataError(code=code, doing=_DOING, file=file, item=item, expected=expected, found=found, fix=fix)


def files_size(paths: Iterable[PathLike]) -> int:
    """How many bytes some files have, compressed as they are; each must be a plain file that can be read."""
    size = 0
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            _refuse_unreadable(path, error)
        if not stat.S_ISREG(status.st_mode):
            found = "a folder" if stat.S_ISDIR(status.st_mode) else "no plain file"
            _refuse("DATA-FILE", str(path), "a text file", found, "name the files themselves")
        size += status.st_size
    return size


def _refuse_unreadable(path: PathLike, error: Exception) -> NoReturn:
    found = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    with contextlib.suppress(DataError):
        _refuse("DATA-FILE", str(path), "", "", "")
    raise DataError(
        code="DATA-FILE",
        doing=_DOING,
        file=str(path),
        expected="a file that can be read",
        found=found,
        fix="check the path and its permissions; is the file whole?",
    ) from error


def file_chunks(path: PathLike, size: int, table: np.ndarray | None, by_line: bool, start: int = 0) -> Iterator[Chunk]:
    """The chunks of a file, which is one document, or as many as it has lines; of `size` bytes, or a little more.

    `table` says where it may be cut (`cutting.cut_table`); if it is None, only lines are cut from each other. `start`:
    from which byte of the text on, 0 or the end of such a chunk.
    """
    suffix = pathlib.Path(path).suffix
    if suffix == ".gz":
        yield from _unpacked_chunks(path, size, lambda file: gzip.GzipFile(fileobj=file), table, by_line, start)
    elif suffix == ".zst":
        yield from _unpacked_chunks(path, size, _zstd_reader(path), table, by_line, start)
    else:
        yield from _mapped_chunks(path, size, table, by_line, start)


def _cut(text: np.ndarray, start: int, target: int, table: np.ndarray | None, by_line: bool) -> int:
    """Where a text may be cut from `target` on, or its end."""
    end = len(text) if table is None else find_cut(text, start, target, len(text), table)
    for begin in range(target, end if by_line else target, _STEP):
        ends = np.flatnonzero(text[begin : min(begin + _STEP, end)] == ord("\n"))
        if len(ends):
            return begin + int(ends[0]) + 1
    return end


def _mapped_chunks(path: PathLike, size: int, table: np.ndarray | None, by_line: bool, begin: int) -> Iterator[Chunk]:
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        _refuse_unreadable(path, error)
    text = np.frombuffer(mapped, np.uint8)
    while begin < len(text):
        end = len(text)
        if end - begin > size:
            end = _cut(text, begin, begin + size, table, by_line)
        begins = begin == 0 or (by_line and bool(text[begin - 1] == ord("\n")))
        yield Chunk(text, np.array([begin, end]), begins, end - begin, str(path), mapped=mapped)
        begin = end


def _zstd_reader(path: PathLike) -> Callable[[BinaryIO], Any]:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        fix = "pip install 'eqx_moe[zstd]', or unpack the file"
        _refuse("DATA-ZSTD", str(path), "the package zstandard, to unpack it", "that it is not installed", fix)
    return lambda file: _ZstdReader(file, zstandard.ZstdDecompressor())


class _ZstdReader:
    """What a file of zstd frames holds. zstandard's own reader takes a frame that is cut off for one that ends."""

    def __init__(self, file: BinaryIO, decompressor: Any):
        self._file, self._decompressor = file, decompressor
        self._frame, self._rest = None, b""

    def __enter__(self) -> "_ZstdReader":
        return self

    def __exit__(self, *error) -> None:
        pass

    def read(self, size: int) -> bytes:
        """Some bytes, not more than a few MB above `size`; none at the end."""
        found = bytearray()
        while len(found) < size:
            # Little at a time, of which much may come.
            packed = self._rest or self._file.read(1 << 12)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                break
            self._frame = self._frame or self._decompressor.decompressobj()
            found += self._frame.decompress(packed)
            self._rest = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        return bytes(found)


def _unpacked_chunks(
    path: PathLike,
    size: int,
    open_reader: Callable[[BinaryIO], Any],
    table: np.ndarray | None,
    by_line: bool,
    start: int,
) -> Iterator[Chunk]:
    rest, origin, starts = b"", 0, True
    try:
        with open(path, "rb") as packed, open_reader(packed) as reader:
            while origin < start and (passed := reader.read(size)):
                count = min(len(passed), start - origin)
                rest, starts, origin = passed[count:], by_line and passed[count - 1] == ord("\n"), origin + count
            before, wanted = packed.tell(), size
            while True:
                more = reader.read(wanted)
                text = np.frombuffer(rest + more, np.uint8)
                # A read may give less than was asked for, but only nothing at the end.
                end = len(text)
                if more:
                    target = max(1, end - size // 8)
                    end = _cut(text, 0, target, table, by_line) if end > 1 else end
                    if end == len(text):
                        # No place was found: with more text there may be one. Longer steps keep this linear.
                        rest, wanted = text.tobytes(), max(size, len(text))
                        continue
                if end:
                    done = packed.tell()
                    yield Chunk(text[:end], np.array([0, end]), starts, done - before, str(path), origin)
                    before, origin, rest, wanted = done, origin + end, text[end:].tobytes(), size
                    starts = by_line and bool(text[end - 1] == ord("\n"))
                if not more:
                    return
    except (OSError, EOFError, zlib.error) as error:
        _refuse_unreadable(path, error)
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            _refuse_unreadable(path, error)
        raise


def text_chunks(texts: Iterable[str], size: int) -> Iterator[Chunk]:
    """The chunks of an iterable of texts, each of which is a document; about `size` bytes each."""
    batch, gathered = [], 0
    for k, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts must be strings; text {k} (counted from 0) is {type(text).__name__}.")
        try:
            batch.append(text.encode())
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X} at character {error.start:,} (counted from 0)"
            _refuse("DATA-UTF8", "", "characters", found, "replace halves of surrogate pairs", item=f"text {k:,}")
        gathered += len(batch[-1])
        if gathered >= size:
            yield Chunk(*joined(batch), True, gathered)
            batch, gathered = [], 0
    if batch:
        yield Chunk(*joined(batch), True, gathered)


def joined(parts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Some texts, one after another, and their bounds."""
    bounds = np.fromiter(itertools.accumulate(map(len, parts), initial=0), np.int64, len(parts) + 1)
    return np.frombuffer(b"".join(parts), np.uint8), bounds
