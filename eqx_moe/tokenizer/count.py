"""Text to words and counts, on every core."""

import collections
import concurrent.futures
import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
from tokenizers import normalizers, pre_tokenizers
from tqdm import tqdm

from eqx_moe.sizes import cores, parse_size
from eqx_moe.tokenizer.composed import is_composed
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.cutting import cut_table
from eqx_moe.tokenizer.flags import flag_table
from eqx_moe.tokenizer.machine import announced
from eqx_moe.tokenizer.patterns import split_by
from eqx_moe.tokenizer.scan_count import DONE, KERNELS, NOT_UTF8
from eqx_moe.tokenizer.sources import Chunk, PathLike, file_chunks, files_size, joined, text_chunks
from eqx_moe.tokenizer.spill import Spill
from eqx_moe.tokenizer.word_table import WordTable, add_pieces

#: Patterns that have a scanner; anything else is a regular expression.
PATTERNS = tuple(KERNELS)

#: How many bytes of text are handed to a thread at once.
CHUNK = 1 << 21

# What counting takes whatever the threads do (kernels), and what a thread needs at the very least.
_FIXED = 24 << 20
_LEAST = 4 << 20

_NFC = normalizers.NFC()
#: How many bytes are looked at together, and then normalised or not.
_LINES = 1 << 10


class Place(NamedTuple):
    """How far files are counted: to which byte of the text of which file (0 is the first), and how many bytes of all
    files that are, compressed as they may be."""

    file: int = 0
    byte: int = 0
    done: int = 0


START = Place()


def count_files(
    paths: Iterable[PathLike],
    pattern: str,
    *,
    lines: bool = False,
    threads: int | None = None,
    max_memory: int | str | None = None,
    progress: bool | Callable[[int, int | None], None] = True,
) -> WordCounts:
    """Count the words of files: plain text, or compressed if the name ends in `.gz` or `.zst`. All are UTF-8.

    Args:
        paths: the files. Each is one document.
        pattern: one of `PATTERNS`, or a regular expression, each match of which is a word, and each stretch between
            two matches (`tokenizers`' `Split(Regex(pattern), "isolated")`; much slower, and on one core).
        lines: each line is a document of its own, its end included, as for `Tokenizer.train(files)` in `tokenizers`.
        threads: how many; None is one for each core that this process may use. The result does not depend on it.
        max_memory: how many bytes (or "200MB") of memory counting may take, above what the program has taken before;
            what is mapped from files does not count. Words for which there is no room wait in temporary files, and the
            arrays of the result are mapped from such files too; they need about as much disk as the words of each run
            have bytes, and 16 bytes a word. `tempfile.gettempdir()` says where: a folder in memory would be no help.
        progress: True shows a bar if stderr is a terminal. A function is called with the number of bytes that are done,
            and of all of them.

    Raises:
        DataError: for files that cannot be read (`DATA-FILE`, `DATA-ZSTD`), and for bytes that are not UTF-8
            (`DATA-UTF8`), with the file and the place.
        ValueError: for a `max_memory` that does not suffice, with one that does.
    """
    paths = [os.fspath(path) for path in paths]
    counter, size, plan = _counter(pattern, lines), files_size(paths), _plan(threads, max_memory)
    with _shown(progress, size, 0) as show:
        return _count(_chunks(paths, plan, counter, lines), counter, plan, show).words


def count_parts(
    paths: Sequence[PathLike],
    pattern: str,
    *,
    every: int,
    start: Place = START,
    lines: bool = False,
    threads: int | None = None,
    max_memory: int | str | None = None,
    progress: bool | Callable[[int, int | None], None] = True,
) -> Iterator[tuple[Place, WordCounts]]:
    """As `count_files`, a part after the other: the words of about `every` bytes, and how far that goes.

    From there, the same files can be counted on. A `KeyboardInterrupt` is raised after the part that it has ended.
    """
    counter, size, plan = _counter(pattern, lines), files_size(paths), _plan(threads, max_memory)
    chunks = _chunks(paths, plan, counter, lines, start)
    with _shown(progress, size, start.done) as show:
        while True:
            part = _count(chunks, counter, plan, show, start, every)
            if part.place != start:
                yield part.place, part.words
            if part.interrupt is not None:
                raise part.interrupt
            if part.place == start:
                return
            start = part.place


def _chunks(
    paths: Sequence[PathLike], plan: "_Plan", counter: "_Counter", lines: bool, start: Place = START
) -> Iterator[tuple[int, Chunk]]:
    """The chunks of files from a place on, each with the number of its file."""
    for file in range(start.file, len(paths)):
        byte = start.byte if file == start.file else 0
        for chunk in file_chunks(paths[file], plan.chunk, counter.table, lines, byte):
            yield file, chunk


def count_texts(
    texts: Iterable[str],
    pattern: str,
    *,
    threads: int | None = None,
    max_memory: int | str | None = None,
    progress: bool | Callable[[int, int | None], None] = True,
) -> WordCounts:
    """As `count_files`, for an iterable of texts (a list, a generator, a column of a dataset): each is one document.

    Raises:
        DataError: for a text with half a surrogate pair (`DATA-UTF8`), with its number.
    """
    if isinstance(texts, str):
        raise ValueError("`texts` must be an iterable of texts; got one text. Put it into a list.")
    counter, plan = _counter(pattern, False), _plan(threads, max_memory)
    with _shown(progress, None, 0) as show:
        return _count(((0, chunk) for chunk in text_chunks(texts, plan.chunk)), counter, plan, show).words


class _Counter(NamedTuple):
    """How chunks are counted, and by which table they may be cut."""

    count: Callable[[Chunk, WordTable, Callable[[WordTable, int], None]], None]
    table: np.ndarray | None


def _counter(pattern: str, by_line: bool) -> _Counter:
    if pattern in KERNELS:
        count = functools.partial(_count_chunk, pattern=pattern, by_line=by_line)
        return _Counter(count, cut_table(pattern))
    return _Counter(functools.partial(_count_matches, split=split_by(pattern), by_line=by_line), None)


class _Plan(NamedTuple):
    """How many threads count, chunks of how many bytes, into tables of how many; and what `max_memory` was."""

    threads: int
    chunk: int
    table: int | None
    max_memory: int | None


def _plan(threads: int | None, max_memory: int | str | None) -> _Plan:
    threads = cores() if threads is None else threads
    if threads < 1:
        raise ValueError(f"`threads` must be at least 1; got {threads=}.")
    if max_memory is None:
        return _Plan(threads, CHUNK, None, None)
    limit = parse_size(max_memory, "max_memory")
    least = _FIXED + threads * _LEAST
    if limit < least:
        raise ValueError(f"`max_memory` must be at least {least:,} bytes for {threads} threads; got {max_memory!r}.")
    # Half of what remains is for the tables. A chunk exists several times over: packed, unpacked, normalised, waiting.
    share = (limit - _FIXED) // threads
    return _Plan(threads, min(CHUNK, share // 32), share // 2, limit)


class _Tables:
    """The tables, never more than one for each thread: they are handed from chunk to chunk."""

    def __init__(self, plan: _Plan):
        self._plan = plan
        self._free: list[WordTable] = []
        self._lock = threading.Lock()
        self._spill = None if plan.max_memory is None else Spill()

    def __enter__(self) -> "_Tables":
        return self

    def __exit__(self, *_: object):
        if self._spill is not None:
            self._spill.close()

    @contextlib.contextmanager
    def one(self) -> Iterator[WordTable]:
        """A table that nobody else has meanwhile."""
        with self._lock:
            words = self._free.pop() if self._free else WordTable(self._plan.table)
        try:
            yield words
        finally:
            with self._lock:
                self._free.append(words)

    def make_room(self, words: WordTable, length: int):
        """Make room in a table for one more word, which has `length` bytes."""
        if self._spill is None:
            words.grow(length)
        elif len(words):
            self._spill.add(words)
        else:
            self.refuse("a word", length)

    def check(self, chunk: Chunk):
        """Refuse a chunk that is too long for `max_memory`."""
        length = int(chunk.bounds[-1] - chunk.bounds[0])
        if self._plan.max_memory is not None and length > 4 * self._plan.chunk:
            self.refuse("a text, or a part of one that cannot be cut,", length)

    def refuse(self, what: str, length: int) -> NoReturn:
        needed = _FIXED + self._plan.threads * 16 * length
        raise ValueError(
            f"`max_memory` is too small for {what} of {length:,} bytes: got {self._plan.max_memory:,}; {needed:,} "
            f"would do with {self._plan.threads} threads."
        )

    def total(self) -> WordCounts:
        """The words of all tables, which are used up."""
        tables = sorted(self._free, key=len) or [WordTable()]
        self._free.clear()
        if self._spill is not None:
            while tables:
                self._spill.add(tables.pop())
            return self._spill.merged()
        largest = tables.pop()
        while tables:
            largest.add_table(tables.pop())
        return largest.written(largest.sorted_order())


class _Part(NamedTuple):
    """Words, how far they were counted, and why no farther, unless that is where the part or the text ends."""

    words: WordCounts
    place: Place
    interrupt: KeyboardInterrupt | None


def _count(
    chunks: Iterator[tuple[int, Chunk]],
    counter: _Counter,
    plan: _Plan,
    show: Callable[[int], None],
    start: Place = START,
    every: int | None = None,
) -> _Part:
    """Count chunks, of which each has the number of its file; those of about `every` bytes, or all."""
    places, counted, failures = [start], [], []

    def work(chunk: Chunk):
        try:
            tables.check(chunk)
            with tables.one() as words:
                counter.count(chunk, words, tables.make_room)
            chunk.release()
            counted.append(chunk.size)
        except BaseException as error:
            failures.append(error)
            raise

    interrupt = None
    with announced(), _Tables(plan) as tables:
        pool = concurrent.futures.ThreadPoolExecutor(plan.threads)
        waiting: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        try:
            for file, chunk in chunks:
                places.append(Place(file, chunk.end, places[-1].done + chunk.size))
                waiting.append(pool.submit(work, chunk))
                # In order, so that the first of several errors is always the same one.
                while len(waiting) > plan.threads + 1 or (waiting and waiting[0].done()):
                    waiting.popleft().result()
                    show(places[-1 - len(waiting)].done)
                if every is not None and places[-1].done - start.done >= every:
                    break
            while waiting:
                waiting.popleft().result()
                show(places[-1 - len(waiting)].done)
        except KeyboardInterrupt as error:
            if every is None:
                raise
            interrupt = error
        finally:
            pool.shutdown(cancel_futures=True)
        if failures:  # Half a chunk is in the tables.
            raise failures[0]
        # Chunks are begun in their order, and what is begun is ended: those that are counted are the first ones.
        return _Part(tables.total(), places[len(counted)], interrupt)


@contextlib.contextmanager
def _shown(
    progress: bool | Callable[[int, int | None], None], size: int | None, start: int
) -> Iterator[Callable[[int], None]]:
    """A function that shows how many bytes are done; `start` were so before."""
    if not isinstance(progress, bool):
        yield lambda done: progress(done, size)
        return
    bar = tqdm(
        total=size, initial=start, desc="counting", unit="B", unit_scale=True, delay=1,
        disable=None if progress else True,
    )  # fmt: skip
    with bar:

        def show(done: int):
            bar.update(done - bar.n)

        yield show


def _count_chunk(
    chunk: Chunk, words: WordTable, make_room: Callable[[WordTable, int], None], pattern: str, by_line: bool
):
    """Count a chunk with one of the scanners."""
    text, bounds = chunk.text, chunk.bounds
    if pattern == "metaspace":
        text, bounds = joined([document.encode() for document in _with_metaspaces(chunk, by_line)])
    elif pattern == "qwen2" and not is_composed(text, int(bounds[0]), int(bounds[-1])):
        text, bounds = joined([_composed(document.encode()) for document in _documents(chunk)])
    kernel, table, begin = KERNELS[pattern], flag_table(pattern), int(bounds[0])
    while True:
        why, begin, wanted = kernel(text, bounds, by_line, begin, table, *words.arrays)
        if why == DONE:
            return
        if why == NOT_UTF8:
            assert text is chunk.text, "a normaliser wrote bytes that are not UTF-8"
            chunk.refuse(int(begin))
        make_room(words, wanted)


def _count_matches(
    chunk: Chunk,
    words: WordTable,
    make_room: Callable[[WordTable, int], None],
    split: pre_tokenizers.PreTokenizer,
    by_line: bool,
):
    """Count a chunk with a regular expression."""
    for document in _documents(chunk):
        for text in re.findall(r"[^\n]*\n|[^\n]+", document) if by_line else [document]:
            pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
            data, bounds = joined([piece.encode() for piece in pieces])
            begin, ends = 0, bounds[1:]
            while (counted := add_pieces(data, begin, ends, len(ends), *words.arrays)) < len(ends):
                begin = int(ends[counted - 1]) if counted else begin
                ends = ends[counted:]
                make_room(words, int(ends[0] - begin))


def _documents(chunk: Chunk) -> Iterator[str]:
    for begin, end in zip(chunk.bounds[:-1].tolist(), chunk.bounds[1:].tolist(), strict=True):
        try:
            yield chunk.text[begin:end].tobytes().decode()
        except UnicodeDecodeError as error:
            chunk.refuse(begin + error.start)


def _composed(text: bytes) -> bytes:
    """A text in normal form C. Only lines that the normaliser may change are given to it, and a few beside them."""
    data, parts, begin = np.frombuffer(text, np.uint8), [], 0
    while begin < len(text):
        # NFC does nothing to a newline, nor over one.
        end = text.find(b"\n", begin + _LINES) + 1 or len(text)
        part = text[begin:end]
        parts.append(part if is_composed(data, begin, end) else _NFC.normalize_str(part.decode()).encode())
        begin = end
    return b"".join(parts)


def _with_metaspaces(chunk: Chunk, by_line: bool) -> Iterator[str]:
    """The documents of a chunk, with U+2581 for each space, and one before each document that is not empty."""
    begins = chunk.begins
    for text in _documents(chunk):
        text = text.replace(" ", "▁")
        if by_line:
            text = text[:-1].replace("\n", "\n▁") + text[-1:]
        yield f"▁{text}" if text and begins else text
        begins = True
