"""Text to words and counts, on every core."""

import concurrent.futures
import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, normalizers, pre_tokenizers
from tqdm import tqdm

from eqx_moe.tokenizer.composed import is_composed
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.cutting import cut_table
from eqx_moe.tokenizer.scan_count import DONE, KERNELS, NOT_UTF8
from eqx_moe.tokenizer.scanners import flag_table
from eqx_moe.tokenizer.sources import Chunk, PathLike, file_chunks, files_size, joined, text_chunks
from eqx_moe.tokenizer.word_table import WordTable, add_pieces

#: Patterns that have a scanner; anything else is a regular expression.
PATTERNS = tuple(KERNELS)

_NFC = normalizers.NFC()


def count_files(
    paths: Iterable[PathLike],
    pattern: str,
    *,
    lines: bool = False,
    threads: int | None = None,
    progress: bool | Callable[[int, int | None], None] = True,
) -> WordCounts:
    """Count the words of files: plain text, or compressed if the name ends in `.gz` or `.zst`. All are UTF-8.

    Args:
        paths: the files. Each is one document.
        pattern: one of `PATTERNS`, or a regular expression, each match of which is a word, and each stretch between
            two matches (`tokenizers`' `Split(Regex(pattern), "isolated")`; much slower, and on one core).
        lines: each line is a document of its own, its end included, as for `Tokenizer.train(files)` in `tokenizers`.
        threads: how many; None is one for each core that this process may use. The result does not depend on it.
        progress: True shows a bar if stderr is a terminal. A function is called with the number of bytes that are done,
            and of all of them.

    Raises:
        DataError: for files that cannot be read (`DATA-FILE`, `DATA-ZSTD`), and for bytes that are not UTF-8
            (`DATA-UTF8`), with the file and the place.
    """
    paths = [os.fspath(path) for path in paths]
    counter = _counter(pattern, lines)
    size = files_size(paths)
    chunks = (chunk for path in paths for chunk in file_chunks(path, counter.table, lines))
    return _count(chunks, counter, threads, progress, size)


def count_texts(
    texts: Iterable[str],
    pattern: str,
    *,
    threads: int | None = None,
    progress: bool | Callable[[int, int | None], None] = True,
) -> WordCounts:
    """As `count_files`, for an iterable of texts (a list, a generator, a column of a dataset): each is one document.

    Raises:
        DataError: for a text with half a surrogate pair (`DATA-UTF8`), with its number.
    """
    if isinstance(texts, str):
        raise ValueError("`texts` must be an iterable of texts; got one text. Put it into a list.")
    return _count(text_chunks(texts), _counter(pattern, False), threads, progress, None)


class _Counter(NamedTuple):
    """How chunks are counted, and by which table they may be cut."""

    count: Callable[[Chunk, WordTable], None]
    table: np.ndarray | None


def _counter(pattern: str, by_line: bool) -> _Counter:
    if pattern in KERNELS:
        return _Counter(lambda chunk, words: _count_chunk(chunk, words, pattern, by_line), cut_table(pattern))
    if re.fullmatch(r"\w*", pattern):
        raise ValueError(f"`pattern` must be one of {', '.join(PATTERNS)}, or a regular expression; got {pattern!r}.")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return _Counter(lambda chunk, words: _count_matches(chunk, words, split, by_line), None)


def _count(
    chunks: Iterator[Chunk],
    counter: _Counter,
    threads: int | None,
    progress: bool | Callable[[int, int | None], None],
    size: int | None,
) -> WordCounts:
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"`threads` must be at least 1; got {threads=}.")
    # Tables are handed from chunk to chunk: never more than one for each thread.
    free: list[WordTable] = []
    lock = threading.Lock()

    def work(chunk: Chunk) -> int:
        with lock:
            words = free.pop() if free else WordTable()
        try:
            counter.count(chunk, words)
        finally:
            with lock:
                free.append(words)
        return chunk.size

    done = 0
    with _shown(progress, size) as show, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: list[concurrent.futures.Future[int]] = []
        try:
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk))
                # In order, so that the first of several errors is always the same one.
                while len(waiting) > 2 * threads or (waiting and waiting[0].done()):
                    done += waiting.pop(0).result()
                    show(done)
            while waiting:
                done += waiting.pop(0).result()
                show(done)
        finally:
            for future in waiting:
                future.cancel()
    return _joined(free)


def _joined(tables: list[WordTable]) -> WordCounts:
    tables = sorted(tables, key=len) or [WordTable()]
    largest = tables.pop()
    while tables:
        largest.add_table(tables.pop())
    return largest.sorted_counts()


@contextlib.contextmanager
def _shown(progress: bool | Callable[[int, int | None], None], size: int | None) -> Iterator[Callable[[int], None]]:
    """A function that shows how many bytes are done."""
    if not isinstance(progress, bool):
        yield lambda done: progress(done, size)
        return
    bar = tqdm(total=size, desc="counting", unit="B", unit_scale=True, delay=1, disable=None if progress else True)
    with bar:

        def show(done: int):
            bar.update(done - bar.n)

        yield show


def _count_chunk(chunk: Chunk, words: WordTable, pattern: str, by_line: bool):
    """Count a chunk with one of the scanners."""
    text, bounds, as_it_stands = chunk.text, chunk.bounds, True
    if pattern == "metaspace" or (pattern == "qwen2" and not is_composed(text, bounds)):
        normalise = _NFC.normalize_str if pattern == "qwen2" else functools.partial(_with_metaspaces, by_line=by_line)
        documents = [normalise(document) for document in _documents(chunk)]
        if pattern == "metaspace" and not chunk.begins:
            documents[0] = documents[0].removeprefix("▁")
        text, bounds = joined(documents)
        as_it_stands = False
    kernel, table, begin = KERNELS[pattern], flag_table(pattern), int(bounds[0])
    while True:
        why, begin = kernel(text, bounds, by_line, begin, table, *words.arrays)
        if why == DONE:
            return
        if why == NOT_UTF8:
            assert as_it_stands, "a normaliser wrote bytes that are not UTF-8"
            chunk.refuse(begin)
        words.grow(len(text))


def _count_matches(chunk: Chunk, words: WordTable, split: pre_tokenizers.PreTokenizer, by_line: bool):
    """Count a chunk with a regular expression."""
    for document in _documents(chunk):
        for text in re.findall(r"[^\n]*\n|[^\n]+", document) if by_line else [document]:
            pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
            data, bounds = joined(pieces)
            begin, ends = 0, bounds[1:]
            while (counted := add_pieces(data, begin, ends, len(ends), *words.arrays)) < len(ends):
                begin = int(ends[counted - 1]) if counted else begin
                ends = ends[counted:]
                words.grow(len(data))


def _documents(chunk: Chunk) -> Iterator[str]:
    for begin, end in zip(chunk.bounds[:-1].tolist(), chunk.bounds[1:].tolist(), strict=True):
        try:
            yield chunk.text[begin:end].tobytes().decode()
        except UnicodeDecodeError as error:
            chunk.refuse(begin + error.start)


def _with_metaspaces(text: str, by_line: bool) -> str:
    """U+2581 for each space, and before each document that is not empty."""
    text = text.replace(" ", "▁")
    if by_line:
        text = text.replace("\n", "\n▁").removesuffix("▁") if text.endswith("\n") else text.replace("\n", "\n▁")
    return f"▁{text}" if text else text
