"""Kernels over words as cells of symbols, which the merge phase works on.

All words lie one after another in one array, a symbol a cell, a `SEPARATOR` before each word and after the last.
A symbol that was merged keeps the cells of its parts: its id stands in its first and its last cell, and `HOLE` in those
between. So from any symbol both neighbours are one look away, in the same cache line, and nothing is ever moved until
`compact`. Words of equal counts lie together, the most frequent first: how often a cell's word occurs follows from its
position alone (`class_start`, `class_count`).

Every function here releases the interpreter lock. Arrays have the shapes and dtypes that `merge._Merger` gives them.
"""

from typing import no_type_check

import numpy as np

from eqx_moe.compiled import kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@no_type_check
@kernel
def slot_of(key, shift):
    """The top bits of a multiplicative hash."""
    return np.int64((np.uint64(key) * _GOLDEN) >> np.uint64(shift))


@no_type_check
@kernel
def _character(text, at):
    """The code point at a place in UTF-8 text that is known to be valid, and how many bytes it has."""
    code, width = np.int64(text[at]), 1
    if code >= 0x80:
        width = 2 + (code >= 0xE0) + (code >= 0xF0)
        code &= 0x7F >> width
        for i in range(at + 1, at + width):
            code = code << 6 | np.int64(text[i]) & 0x3F
    return code, width


@no_type_check
@kernel
def survey(text, offsets, counts, characters, seen):
    """Adds up how often each byte, or character, occurs: int64 [4, 256 or more], a row as in `fill`."""
    for word in range(len(counts)):
        start, stop = offsets[word], offsets[word + 1]
        at = start
        while at < stop:
            code, width = _character(text, at) if characters else (np.int64(text[at]), 1)
            seen[2 * (at == start) + (at + width == stop), code] += counts[word]
            at += width


@no_type_check
@kernel
def count_counts(counts, words_of):
    """Adds up how many words have each count below `len(words_of)`; returns how many have a higher one."""
    others = 0
    for word in range(len(counts)):
        if counts[word] < len(words_of):
            words_of[counts[word]] += 1
        else:
            others += 1
    return others


@no_type_check
@kernel
def sort_by_count(counts, free, order, others):
    """Puts words in order: `free` is where the next word of a count goes. Words of counts past it go into `others`."""
    n = 0
    for word in range(len(counts)):
        if counts[word] < len(free):
            order[free[counts[word]]] = word
            free[counts[word]] += 1
        else:
            others[n] = word
            n += 1


@no_type_check
@kernel
def fill(text, offsets, counts, order, characters, ids, cells, class_start, class_count):
    """Writes the words' symbols into `cells` and says how many cells and how many classes of counts there are.

    `ids` is int32 [4, bytes or code points]: the symbol of a byte, or of a character if `characters`; the row is
    2 * (first in its word) + (last in its word). -1 is no symbol. Words of fewer than two symbols are left out: they
    hold no pair.
    """
    separator = cells.dtype.type(-1)
    cells[0] = separator
    at, classes = 1, 0
    for word in order:
        start, stop = offsets[word], offsets[word + 1]
        begin = at
        i = start
        while i < stop:
            code, width = _character(text, i) if characters else (np.int64(text[i]), 1)
            symbol = ids[2 * (i == start) + (i + width == stop), code]
            if symbol >= 0:
                cells[at] = symbol
                at += 1
            i += width
        if at - begin < 2:
            at = begin
            continue
        if classes == 0 or class_count[classes - 1] != counts[word]:
            class_start[classes] = begin
            class_count[classes] = counts[word]
            classes += 1
        cells[at] = separator
        at += 1
    return at, classes


@no_type_check
@kernel
def compact(cells, lo, hi, span, alias, class_start, class_count, classes, buckets, shift, length, max_length):
    """Gives the words between two separators one cell a symbol again, leaves out words that have become one symbol, and
    weighs pairs by their hash.

    What is kept begins at `lo` + 1; its end is returned. `classes` are the class that `lo` + 1 belongs to and the last
    one that begins at `hi` + 1 or before: the starts of those after the first are moved. `buckets` int64 [power of two]
    gets the sums of the counts of the pairs of each hash. `alias` is a symbol, and the one it is written as.
    """
    separator = cells.dtype.type(-1)
    k, last = classes
    at = read = lo + 1
    weight = class_count[k]
    while read < hi:
        while k < last and class_start[k + 1] <= read:
            # A class begins here. It may turn out to be empty: then it starts where the next one does.
            k += 1
            class_start[k] = at
            weight = class_count[k]
        begin = at
        while cells[read] != separator:
            symbol = cells[read]
            read += span[symbol]
            cells[at] = alias[1] if symbol == alias[0] else symbol
            at += 1
        read += 1
        if at - begin < 2:
            at = begin
            continue
        left = np.int64(cells[begin])
        for i in range(begin + 1, at):
            right = np.int64(cells[i])
            both = length[left] + length[right]
            if both < max_length or both == 2:
                buckets[slot_of(left << 32 | right, shift)] += weight
            left = right
        cells[at] = separator
        at += 1
    for j in range(k + 1, last + 1):
        class_start[j] = at
    return at


@no_type_check
@kernel
def next_separator(cells, at):
    """The first separator from a cell on."""
    separator = cells.dtype.type(-1)
    while cells[at] != separator:
        at += 1
    return at


@no_type_check
@kernel
def move(cells, start, stop, gap):
    """Moves cells down."""
    if gap > 0:
        for i in range(start, stop):
            cells[i - gap] = cells[i]
