"""Counting within a bound of memory: full tables are written to disk, each in order, and merged at the end.

The runs follow each other in three files, which together are like one `WordCounts`: the words' bytes, their offsets,
their counts. Merging reads them mapped and writes three files like them, which are mapped in turn: what is mapped takes
no memory that could not be had back at once.
"""

import mmap
import os
import tempfile
import threading
from typing import Any, no_type_check

import numpy as np

from eqx_moe.compiled import kernel
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.machine import byte_swap, copy, load64
from eqx_moe.tokenizer.word_table import WordTable

#: How many words are written at a time, and how many of their bytes, at most, unless one is longer.
_BLOCK = 1 << 14
_BLOCK_BYTES = 1 << 19
#: Zeros after the last word, so that eight bytes can be loaded from anywhere.
_PADDING = 8

#: Places in the state of a merge: how many runs are left, and the word that was written last, or -1.
_RUNS, _LAST = range(2)


class _Files:
    """Words that are written one after another, into files without names: gone when the last map of them is."""

    def __init__(self, folder: str | os.PathLike[str] | None):
        self._text, self._offsets, self._counts = (tempfile.TemporaryFile(dir=folder) for _ in range(3))
        self._offsets.write(bytes(8))
        self.words = self.bytes = self.longest = 0

    def append(self, text: np.ndarray, lengths: np.ndarray, counts: np.ndarray):
        self._text.write(text.data)
        self._offsets.write((self.bytes + np.cumsum(lengths)).data)
        self._counts.write(counts.data)
        self.words += len(lengths)
        self.bytes += len(text)
        self.longest = max(self.longest, int(lengths.max()))

    def close(self):
        for file in (self._text, self._offsets, self._counts):
            file.close()

    def mapped(self) -> WordCounts:
        """Everything that was written; `text` has _PADDING zeros more."""
        self._text.write(bytes(_PADDING))
        files = (self._text, np.uint8), (self._offsets, np.int64), (self._counts, np.int64)
        return WordCounts(*(_map(file, dtype) for file, dtype in files))


def _map(file: Any, dtype: type) -> np.ndarray:
    with file:
        if not file.seek(0, os.SEEK_END):
            return np.empty(0, dtype)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


class Spill:
    """Runs of words on disk. Several threads may add to it."""

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        self._folder = folder
        self._lock = threading.Lock()
        self._files = _Files(folder)
        self._bounds = [0]

    def close(self):
        """Give the disk back; what `merged` gave stays."""
        self._files.close()

    def add(self, words: WordTable):
        """Write the words of a table in order, and empty it."""
        order = words.sorted_order()
        if not len(order):
            return
        with self._lock:
            for start in range(0, len(order), _BLOCK):
                block = words.written(order[start : start + _BLOCK])
                self._files.append(block.text, np.diff(block.offsets), block.counts)
            self._bounds.append(self._files.words)
        words.clear()

    def merged(self) -> WordCounts:
        """All words, each once, with the sums of their counts; the arrays are mapped. Nothing can be added any more."""
        runs = self._files.mapped()
        heads, stops = np.array(self._bounds[:-1], np.int64), np.array(self._bounds[1:], np.int64)
        keys, heap, state = np.empty(len(heads), np.uint64), np.arange(len(heads)), np.array([len(heads), -1])
        _start(runs.text, runs.offsets, heads, keys, heap)
        text = np.empty(max(_BLOCK_BYTES, self._files.longest), np.uint8)
        lengths, counts = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
        out = _Files(self._folder)
        while state[_RUNS]:
            words, size = _merge(
                runs.text, runs.offsets, runs.counts, heads, stops, keys, heap, state, text, lengths, counts
            )
            out.append(text[:size], lengths[:words], counts[:words])
        result = out.mapped()
        return WordCounts(result.text[: out.bytes], result.offsets, result.counts)


@no_type_check
@kernel
def _key(text, offsets, word):
    """The first eight bytes of a word, as a number that orders as they do; zeros after its end."""
    value = byte_swap(load64(text, offsets[word]))
    length = offsets[word + 1] - offsets[word]
    return value if length >= 8 else value & ~(np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(8 * length))


@no_type_check
@kernel
def _compare(text, offsets, one, two):
    """Below, at or above 0, as one word comes before another, is the same, or comes after it."""
    start, other = offsets[one], offsets[two]
    length, other_length = offsets[one + 1] - start, offsets[two + 1] - other
    shorter = min(length, other_length)
    k = 0
    while k + 8 <= shorter:
        left, right = load64(text, start + k), load64(text, other + k)
        if left != right:
            return -1 if byte_swap(left) < byte_swap(right) else 1
        k += 8
    while k < shorter:
        if text[start + k] != text[other + k]:
            return -1 if text[start + k] < text[other + k] else 1
        k += 1
    return length - other_length


@no_type_check
@kernel
def _sift(text, offsets, heads, keys, heap, size, place):
    """Let the run at a place of the heap sink to where it belongs, by its next word."""
    run = heap[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        for k in range(child, min(child + 2, size)):
            one, two = heap[k], heap[child]
            if keys[one] < keys[two] or (
                keys[one] == keys[two] and _compare(text, offsets, heads[one], heads[two]) < 0
            ):
                child = k
        below = heap[child]
        if keys[run] < keys[below] or (
            keys[run] == keys[below] and _compare(text, offsets, heads[run], heads[below]) <= 0
        ):
            break
        heap[place] = below
        place = child
    heap[place] = run


@no_type_check
@kernel
def _start(text, offsets, heads, keys, heap):
    """Make the runs a heap."""
    for run in range(len(heads)):
        keys[run] = _key(text, offsets, heads[run])
    for place in range(len(heap) - 1, -1, -1):
        _sift(text, offsets, heads, keys, heap, len(heap), place)


@no_type_check
@kernel
def _merge(text, offsets, counts, heads, stops, keys, heap, state, out, lengths, sums):
    """Write the next words, as many as there is room for; returns how many, and of how many bytes."""
    words, size = 0, 0
    while state[_RUNS]:
        run = heap[0]
        word = heads[run]
        if state[_LAST] >= 0 and _compare(text, offsets, word, state[_LAST]) == 0:
            sums[words - 1] += counts[word]
        else:
            start, stop = offsets[word], offsets[word + 1]
            # Only before a new word: the one before it has all of its counts then.
            if words == len(lengths) or size + stop - start > len(out):
                break
            copy(text, start, out, size, stop - start)
            lengths[words] = stop - start
            sums[words] = counts[word]
            words += 1
            size += stop - start
            state[_LAST] = word
        heads[run] += 1
        if heads[run] < stops[run]:
            keys[run] = _key(text, offsets, heads[run])
        else:
            state[_RUNS] -= 1
            heap[0] = heap[state[_RUNS]]
        _sift(text, offsets, heads, keys, heap, state[_RUNS], 0)
    return words, size
