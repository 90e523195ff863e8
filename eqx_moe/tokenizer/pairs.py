"""The kernels of the merge phase: words as cells of symbols, the places where a pair occurs, and merging it everywhere.

Cells. All words lie one after another in one array, a symbol a cell, a `SEPARATOR` before each word and after the last.
A symbol that was merged keeps the cells of its parts: its id stands in its first and its last cell, and `HOLE` in those
between. So from any symbol both neighbours are one look away, in the same cache line, and nothing is ever moved until
`compact`. Words of equal counts lie together, the most frequent first: how often a cell's word occurs follows from its
position alone (`class_start`, `class_count`).

Pairs. Only pairs that occur at least `floor` times have a record: rarer ones cannot be next, and nearly all pairs are
rare. A pair's occurrences all come into being in one step, so its places are known wholly then, in order; later they
only vanish, and each is looked at again before it is merged. When no pair is above the floor, the driver lowers it,
compacts the cells and counts anew.

Every function here releases the interpreter lock. Arrays have the shapes and dtypes that `merge.Merger` gives them.
"""

from typing import no_type_check

import numpy as np
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

# Why `merge_until` returned.
FULL, RESCAN, ASK, GROW, PAUSE = range(5)

# The scalars that `merge_until` reads and writes, by their place in its `state`.
RECORDS, HEAP, USED, VOCAB, MERGES, FLOOR, ANSWER, TOUCHED, STATE_SIZE = range(9)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_AHEAD = 24  # Cells are asked for so many occurrences before they are needed; a cache miss takes about as long.


@intrinsic
def _prefetch(typing, array, index):
    """Asks for the cache line of `array[index]`, without waiting for it."""

    def generate(context, builder, signature, arguments):
        view = make_array(signature.args[0])(context, builder, arguments[0])
        line = builder.bitcast(builder.gep(view.data, [arguments[1]]), cgutils.voidptr_t)
        flag = cgutils.int32_t
        kind = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To be read and written (1), kept in all caches (3), data (1).
        builder.call(function, [line, flag(1), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@no_type_check
@njit(nogil=True, cache=True)
def _slot(key, shift):
    return np.int64((np.uint64(key) * _GOLDEN) >> np.uint64(shift))


@no_type_check
@njit(nogil=True, cache=True)
def _find(table_key, table_record, shift, key):
    """The record of a pair, or -1."""
    mask = len(table_key) - 1
    slot = _slot(key, shift)
    while table_key[slot] != key:
        if table_key[slot] < 0:
            return np.int64(-1)
        slot = (slot + 1) & mask
    return np.int64(table_record[slot])


@no_type_check
@njit(nogil=True, cache=True)
def _insert(table_key, table_record, shift, key, record):
    mask = len(table_key) - 1
    slot = _slot(key, shift)
    while table_key[slot] >= 0:
        slot = (slot + 1) & mask
    table_key[slot] = key
    table_record[slot] = record


# --- Cells -----------------------------------------------------------------------------------------------------------


@no_type_check
@njit(nogil=True, cache=True)
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
@njit(nogil=True, cache=True)
def survey(text, offsets, counts, characters):
    """How often each byte, or character, occurs: int64 [4, 256 or more], a row as in `fill`."""
    most = text.max() if characters and len(text) else 0
    size = 256 if most < 0xC0 else 0x800 if most < 0xE0 else 0x10000 if most < 0xF0 else 0x110000
    seen = np.zeros((4, size), np.int64)
    for word in range(len(counts)):
        start, stop = offsets[word], offsets[word + 1]
        at = start
        while at < stop:
            code, width = _character(text, at) if characters else (np.int64(text[at]), 1)
            seen[2 * (at == start) + (at + width == stop), code] += counts[word]
            at += width
    return seen


@no_type_check
@njit(nogil=True, cache=True)
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
@njit(nogil=True, cache=True)
def compact(cells, size, span, alias, class_start, buckets, shift, class_count, length, max_length):
    """Gives every symbol one cell again, leaves out words that are one symbol, and weighs pairs by their hash.

    `buckets` int64 [power of two] gets the sums of the counts of the pairs of each hash. `alias` is a symbol, and the
    one that it is written as. Returns the number of cells.
    """
    separator = cells.dtype.type(-1)
    at, read, k = 1, 1, -1
    while read < size:
        while k + 1 < len(class_start) and class_start[k + 1] <= read:
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
                buckets[_slot(left << 32 | right, shift)] += weight
            left = right
        cells[at] = separator
        at += 1
    for j in range(k + 1, len(class_start)):
        class_start[j] = at
    return at


# --- Records ---------------------------------------------------------------------------------------------------------


@no_type_check
@njit(nogil=True, cache=True)
def count_pairs(
    cells, lo, hi, class_start, class_count, length, max_length, buckets, bucket_shift, floor,
    table_key, table_record, shift, key, count, places, state,
):  # fmt: skip
    """Counts pairs whose bucket reaches the floor, from cell `lo` on. Returns `hi`, or where there was no more room."""
    separator = np.int64(cells.dtype.type(-1))
    k = np.searchsorted(class_start, lo, side="right") - 1
    records = state[RECORDS]
    room = min(len(key), len(table_key) // 2)
    for i in range(lo, hi):
        left, right = np.int64(cells[i]), np.int64(cells[i + 1])
        if left == separator or right == separator:
            continue
        while k + 1 < len(class_start) and class_start[k + 1] <= i:
            k += 1
        pair = left << 32 | right
        if buckets[_slot(pair, bucket_shift)] < floor:
            continue
        both = length[left] + length[right]
        if both >= max_length and both != 2:
            continue
        record = _find(table_key, table_record, shift, pair)
        if record < 0:
            if records == room:
                state[RECORDS] = records
                return i
            record = records
            records += 1
            _insert(table_key, table_record, shift, pair, record)
            key[record] = pair
            count[record] = 0
            places[record] = 0
        count[record] += class_count[k]
        places[record] += 1
    state[RECORDS] = records
    return hi


@no_type_check
@njit(nogil=True, cache=True)
def keep_frequent(floor, table_key, table_record, shift, key, count, start, places, state):
    """Drops the records under the floor and gives each other one its part of the arena. Returns how much they need."""
    kept, used = 0, 0
    table_key[:] = -1
    for record in range(state[RECORDS]):
        if count[record] >= floor:
            key[kept] = key[record]
            count[kept] = count[record]
            places[kept] = places[record]
            start[kept] = used
            used += places[kept]
            _insert(table_key, table_record, shift, key[kept], kept)
            kept += 1
    state[RECORDS] = kept
    state[USED] = used
    return used


@no_type_check
@njit(nogil=True, cache=True)
def write_places(cells, lo, hi, buckets, bucket_shift, floor, table_key, table_record, shift, cursor, arena):
    """Writes where each recorded pair occurs; `cursor` is where in the arena the next place of a record goes."""
    separator = np.int64(cells.dtype.type(-1))
    for i in range(lo, hi):
        left, right = np.int64(cells[i]), np.int64(cells[i + 1])
        if left == separator or right == separator:
            continue
        pair = left << 32 | right
        if buckets[_slot(pair, bucket_shift)] < floor:
            continue
        record = _find(table_key, table_record, shift, pair)
        if record >= 0:
            arena[cursor[record]] = i
            cursor[record] += 1


@no_type_check
@njit(nogil=True, cache=True)
def rebuild(table_key, table_record, shift, key, records):
    """Fills an empty table with all records."""
    for record in range(records):
        _insert(table_key, table_record, shift, key[record], record)


# --- The heap: the most frequent pair first, of equally frequent ones the smallest -----------------------------------


@no_type_check
@njit(nogil=True, cache=True)
def _before(count, record, other_count, other_record, key):
    return count > other_count or (count == other_count and key[record] < key[other_record])


@no_type_check
@njit(nogil=True, cache=True)
def _sink(heap_count, heap_record, size, key, at):
    count, record = heap_count[at], heap_record[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _before(
            heap_count[child + 1], heap_record[child + 1], heap_count[child], heap_record[child], key
        ):
            child += 1
        if not _before(heap_count[child], heap_record[child], count, record, key):
            break
        heap_count[at], heap_record[at] = heap_count[child], heap_record[child]
        at = child
    heap_count[at], heap_record[at] = count, record


@no_type_check
@njit(nogil=True, cache=True)
def _push(heap_count, heap_record, size, key, count, record):
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if not _before(count, record, heap_count[parent], heap_record[parent], key):
            break
        heap_count[at], heap_record[at] = heap_count[parent], heap_record[parent]
        at = parent
    heap_count[at], heap_record[at] = count, record


@no_type_check
@njit(nogil=True, cache=True)
def build_heap(heap_count, heap_record, key, count, state):
    """A heap of all records."""
    size = state[RECORDS]
    for record in range(size):
        heap_count[record], heap_record[record] = count[record], record
    for at in range(size // 2 - 1, -1, -1):
        _sink(heap_count, heap_record, size, key, at)
    state[HEAP] = size


# --- Spelling: two tokens of one text have one hash; the driver looks at the texts where hashes meet -----------------


@no_type_check
@njit(nogil=True, cache=True)
def add_hash(known, digest):
    """Adds a hash to a set, uint64 [power of two] with 0 for nothing. False if it was there."""
    digest = digest | np.uint64(1)
    slot = np.int64(digest >> np.uint64(32)) & (len(known) - 1)
    while known[slot] != 0:
        if known[slot] == digest:
            return False
        slot = (slot + 1) & (len(known) - 1)
    known[slot] = digest
    return True


# --- Merging ---------------------------------------------------------------------------------------------------------


@no_type_check
@njit(nogil=True, cache=True)
def _weigh(seen, total, number, neighbour, weight, n):
    """Adds an occurrence to a neighbour's sums; `seen` lists the neighbours that have any. Returns how many have."""
    if number[neighbour] == 0:
        seen[n] = neighbour
        n += 1
    number[neighbour] += 1
    total[neighbour] += weight
    return n


@no_type_check
@njit(nogil=True, cache=True)
def merge_until(
    cells, span, length, max_length, class_start, class_count, table_key, table_record, shift, key, count, start,
    places, heap_count, heap_record, arena, seen, total, number, cursor, before, after, text_hash, text_power,
    known_hash, ask, limit, merges, state, pause,
):  # fmt: skip
    """Merges the best pair, again and again, and says why it stopped:

    FULL: the vocabulary has its size. RESCAN: no pair is above the floor, or the arena is full. GROW: there may be too
    little room for records. PAUSE: `pause` occurrences were looked at. ASK: the next merge, `merges[state[MERGES]]`,
    spells what may be a token already (or `ask` is set); its id is to be put into `state[ANSWER]`.
    """
    separator = np.int64(cells.dtype.type(-1))
    hole = cells.dtype.type(-2)
    room = min(len(key), len(table_key) // 2)
    looked_at = 0
    while True:
        floor = state[FLOOR]
        if state[VOCAB] >= limit:
            return FULL
        if looked_at > pause:
            return PAUSE
        # The best pair. Counts in the heap are upper bounds: a pair that has become rarer sinks to its place.
        size = state[HEAP]
        while size > 0:
            record = heap_record[0]
            if heap_count[0] == count[record]:
                break
            if count[record] >= floor:
                heap_count[0] = count[record]
            else:
                size -= 1
                heap_count[0], heap_record[0] = heap_count[size], heap_record[size]
            _sink(heap_count, heap_record, size, key, 0)
        state[HEAP] = size
        if size == 0:
            return RESCAN
        record = np.int64(heap_record[0])
        pair = key[record]
        a, b = pair >> 32, pair & 0xFFFFFFFF
        first, n = start[record], places[record]
        if state[USED] + 2 * n > len(arena):
            return RESCAN
        if state[RECORDS] + 2 * min(n, state[VOCAB]) + 2 > room:
            return GROW

        # Its id.
        merged = state[MERGES]
        merges[merged, 0], merges[merged, 1] = a, b
        digest = text_hash[a] * text_power[b] + text_hash[b]
        if state[ANSWER] >= 0:
            c = state[ANSWER]
            state[ANSWER] = -1
            state[VOCAB] += c == state[VOCAB]
        else:
            if ask or not add_hash(known_hash, digest):
                return ASK
            c = state[VOCAB]
            state[VOCAB] += 1
        merges[merged, 2] = c
        state[MERGES] += 1
        text_hash[c] = digest
        text_power[c] = text_power[a] * text_power[b]
        span[c] = span[a] + span[b]
        length[c] = length[a] + length[b]
        size -= 1
        heap_count[0], heap_record[0] = heap_count[size], heap_record[size]
        _sink(heap_count, heap_record, size, key, 0)

        # Every occurrence that is still there becomes c. Neighbours are only summed up; the pairs are few, and later.
        looked_at += n
        width_a, width_b = np.int64(span[a]), np.int64(span[b])
        width = width_a + width_b
        lefts, rights = 0, 0
        kept = first
        k = 0
        k_end = np.int64(0)
        weight = np.int64(0)
        for i in range(first, first + n):
            if i + _AHEAD < first + n:
                _prefetch(cells, np.int64(arena[i + _AHEAD]))
            at = np.int64(arena[i])
            if cells[at] != a or cells[at + width_a] != b:
                continue
            if at >= k_end:
                low, high = k, len(class_start)
                while low < high:
                    middle = (low + high) >> 1
                    if class_start[middle] <= at:
                        low = middle + 1
                    else:
                        high = middle
                k = low
                k_end = class_start[k] if k < len(class_start) else np.int64(len(cells))
                weight = class_count[k - 1]
            end = at + width
            x, y = np.int64(cells[at - 1]), np.int64(cells[end])
            cells[at + width_a - 1] = hole
            cells[at + width_a] = hole
            cells[at] = c
            cells[end - 1] = c
            if y == a and cells[end + width_a] == b:
                y = separator  # It is merged next, and sees this one as its left neighbour.
            if x != separator:
                lefts = _weigh(seen[0], total[0], number[0], x, weight, lefts)
            if y != separator:
                rights = _weigh(seen[1], total[1], number[1], y, weight, rights)
            arena[kept] = at
            before[kept - first] = x
            after[kept - first] = y
            kept += 1
        count[record] = 0

        # Pairs with the parts become rarer, pairs with c come into being.
        used, records = state[USED], state[RECORDS]
        limit_length = max_length - length[c]
        for side in range(2):
            for j in range(lefts if side == 0 else rights):
                neighbour = np.int64(seen[side, j])
                if side == 0:
                    old = (b if neighbour == c else neighbour) << 32 | a
                    new = neighbour << 32 | c
                else:
                    old = b << 32 | neighbour
                    new = c << 32 | neighbour
                other = _find(table_key, table_record, shift, old)
                if other >= 0:
                    count[other] -= total[side, neighbour]
                if total[side, neighbour] >= floor and length[neighbour] < limit_length:
                    key[records] = new
                    count[records] = total[side, neighbour]
                    start[records] = used
                    places[records] = number[side, neighbour]
                    cursor[side, neighbour] = used
                    used += number[side, neighbour]
                    _insert(table_key, table_record, shift, new, records)
                    _push(heap_count, heap_record, size, key, count[records], records)
                    size += 1
                    records += 1
                else:
                    cursor[side, neighbour] = -1
                total[side, neighbour] = 0
                number[side, neighbour] = 0
        if used > state[USED]:
            for i in range(kept - first):
                x, y = np.int64(before[i]), np.int64(after[i])
                at = np.int64(arena[first + i])
                if x != separator and cursor[0, x] >= 0:
                    arena[cursor[0, x]] = at - span[x]
                    cursor[0, x] += 1
                if y != separator and cursor[1, y] >= 0:
                    arena[cursor[1, y]] = at
                    cursor[1, y] += 1
        state[USED], state[RECORDS], state[HEAP] = used, records, size
        state[TOUCHED] += kept - first
