"""Kernels over pairs of symbols: which of them occur often, where, and merging one everywhere. `cells` has the words.

Only pairs that occur at least `floor` times have a record: rarer ones cannot be next, and nearly all pairs are
rare. A pair's occurrences all come into being in one step, so its places are known wholly then, in order; later they
only vanish, and each is looked at again before it is merged. When no pair is above the floor, the driver lowers it,
compacts the cells and counts anew.

Every function here releases the interpreter lock. Arrays have the shapes and dtypes that `merge._Merger` gives them.
"""

from typing import no_type_check

import numpy as np

from eqx_moe.compiled import kernel
from eqx_moe.tokenizer.cells import slot_of
from eqx_moe.tokenizer.machine import prefetch

# Why `merge_until` returned.
FULL, RESCAN, ASK, GROW, PAUSE = range(5)

# The scalars that `merge_until` reads and writes, by their place in its `state`.
VOCAB, MERGES, FLOOR, ANSWER, STATE = range(5)

# The scalars of a set of records.
RECORDS, HEAP, USED, RECORDS_STATE = range(4)

# A row of `sums`: what is known of a neighbour of the pair that is being merged.
NUMBER, TOTAL, CURSOR, ROW = 0, 1, 2, 4

_AHEAD = 24  # Cells are asked for so many occurrences before they are needed; a cache miss takes about as long.


@no_type_check
@kernel
def _find(table_key, table_record, shift, key):
    """The record of a pair, or -1."""
    mask = len(table_key) - 1
    slot = slot_of(key, shift)
    while table_key[slot] != key:
        if table_key[slot] < 0:
            return np.int64(-1)
        slot = (slot + 1) & mask
    return np.int64(table_record[slot])


@no_type_check
@kernel
def _insert(table_key, table_record, shift, key, record):
    mask = len(table_key) - 1
    slot = slot_of(key, shift)
    while table_key[slot] >= 0:
        slot = (slot + 1) & mask
    table_key[slot] = key
    table_record[slot] = record


@no_type_check
@kernel
def _class_of(class_start, at):
    """The class of counts that a cell belongs to."""
    low, high = 0, len(class_start)
    while low < high:
        middle = (low + high) >> 1
        if class_start[middle] <= at:
            low = middle + 1
        else:
            high = middle
    return low - 1


# --- Records ---------------------------------------------------------------------------------------------------------


@no_type_check
@kernel
def count_pairs(
    cells, lo, hi, class_start, class_count, length, max_length, buckets, bucket_shift, floor,
    table_key, table_record, shift, key, count, places, state,
):  # fmt: skip
    """Counts pairs whose bucket reaches the floor, from cell `lo` on. Returns `hi`, or where there was no more room."""
    separator = np.int64(cells.dtype.type(-1))
    k = _class_of(class_start, lo)
    records = state[RECORDS]
    room = min(len(key), len(table_key) // 2)
    for i in range(lo, hi):
        left, right = np.int64(cells[i]), np.int64(cells[i + 1])
        if left == separator or right == separator:
            continue
        while k + 1 < len(class_start) and class_start[k + 1] <= i:
            k += 1
        pair = left << 32 | right
        if buckets[slot_of(pair, bucket_shift)] < floor:
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
@kernel
def add_records(records, part_key, part_count, part_places, table_key, table_record, shift, key, count, places, state):
    """Adds one thread's records to those of all, which have room."""
    known = state[RECORDS]
    for part in range(records):
        record = _find(table_key, table_record, shift, part_key[part])
        if record < 0:
            record = known
            known += 1
            _insert(table_key, table_record, shift, part_key[part], record)
            key[record] = part_key[part]
            count[record] = 0
            places[record] = 0
        count[record] += part_count[part]
        places[record] += part_places[part]
    state[RECORDS] = known


@no_type_check
@kernel
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
@kernel
def share_arena(records, part_key, part_places, part_cursor, table_key, table_record, shift, free):
    """Where one thread writes the places of each of its records: -1 for those that were dropped. `free` moves on."""
    for part in range(records):
        record = _find(table_key, table_record, shift, part_key[part])
        part_cursor[part] = -1
        if record >= 0:
            part_cursor[part] = free[record]
            free[record] += part_places[part]


@no_type_check
@kernel
def write_places(cells, lo, hi, buckets, bucket_shift, floor, table_key, table_record, shift, cursor, arena):
    """Writes where each pair occurs; `cursor` is where in the arena the next place of a record goes, or -1."""
    separator = np.int64(cells.dtype.type(-1))
    for i in range(lo, hi):
        left, right = np.int64(cells[i]), np.int64(cells[i + 1])
        if left == separator or right == separator:
            continue
        pair = left << 32 | right
        if buckets[slot_of(pair, bucket_shift)] < floor:
            continue
        record = _find(table_key, table_record, shift, pair)
        if record >= 0 and cursor[record] >= 0:
            arena[cursor[record]] = i
            cursor[record] += 1


@no_type_check
@kernel
def rebuild(table_key, table_record, shift, key, records):
    """Fills an empty table with all records."""
    for record in range(records):
        _insert(table_key, table_record, shift, key[record], record)


# --- The heap: the most frequent pair first, of equally frequent ones the smallest -----------------------------------


@no_type_check
@kernel
def _before(count, record, other_count, other_record, key):
    return count > other_count or (count == other_count and key[record] < key[other_record])


@no_type_check
@kernel
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
@kernel
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
@kernel
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
@kernel
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
@kernel
def merge_until(
    cells, span, length, max_length, class_start, class_count, table_key, table_record, shift, key, count, start,
    places, heap_count, heap_record, arena, seen, sums, before, after, text_hash, text_power,
    known_hash, ask, limit, merges, saved, state, found, pause,
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
        size = found[HEAP]
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
        found[HEAP] = size
        if size == 0:
            return RESCAN
        record = np.int64(heap_record[0])
        pair = key[record]
        a, b = pair >> 32, pair & 0xFFFFFFFF
        first, n = start[record], places[record]
        if found[USED] + 2 * n > len(arena):
            return RESCAN
        if found[RECORDS] + 2 * min(n, state[VOCAB]) + 2 > room:
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
        all_weight = np.int64(0)
        k_end = np.int64(0)  # Where the class of the words that are looked at ends.
        weight = np.int64(0)
        for i in range(first, first + n):
            if i + _AHEAD < first + n:
                prefetch(cells, np.int64(arena[i + _AHEAD]))
            at = np.int64(arena[i])
            if cells[at] != a or cells[at + width_a] != b:
                continue
            if at >= k_end:
                k = _class_of(class_start, at)
                k_end = class_start[k + 1] if k + 1 < len(class_start) else np.int64(len(cells))
                weight = class_count[k]
            end = at + width
            x, y = np.int64(cells[at - 1]), np.int64(cells[end])
            cells[at + width_a - 1] = hole
            cells[at + width_a] = hole
            cells[at] = c
            cells[end - 1] = c
            if y == a and cells[end + width_a] == b:
                y = separator  # It is merged next, and sees this one as its left neighbour.
            if x != separator:
                if sums[0, x, NUMBER] == 0:
                    seen[0, lefts] = x
                    lefts += 1
                sums[0, x, NUMBER] += 1
                sums[0, x, TOTAL] += weight
            if y != separator:
                if sums[1, y, NUMBER] == 0:
                    seen[1, rights] = y
                    rights += 1
                sums[1, y, NUMBER] += 1
                sums[1, y, TOTAL] += weight
            all_weight += weight
            arena[kept] = at
            before[kept - first] = x
            after[kept - first] = y
            kept += 1
        count[record] = 0
        saved[merged] = all_weight

        # Pairs with the parts become rarer, pairs with c come into being.
        used, records = found[USED], found[RECORDS]
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
                total = sums[side, neighbour, TOTAL]
                if other >= 0:
                    count[other] -= total
                if total >= floor and length[neighbour] < limit_length:
                    key[records] = new
                    count[records] = total
                    start[records] = used
                    places[records] = sums[side, neighbour, NUMBER]
                    sums[side, neighbour, CURSOR] = used
                    used += sums[side, neighbour, NUMBER]
                    _insert(table_key, table_record, shift, new, records)
                    _push(heap_count, heap_record, size, key, count[records], records)
                    size += 1
                    records += 1
                else:
                    sums[side, neighbour, CURSOR] = -1
                sums[side, neighbour, TOTAL] = 0
                sums[side, neighbour, NUMBER] = 0
        if used > found[USED]:
            for i in range(kept - first):
                x, y = np.int64(before[i]), np.int64(after[i])
                at = np.int64(arena[first + i])
                if x != separator and sums[0, x, CURSOR] >= 0:
                    arena[sums[0, x, CURSOR]] = at - span[x]
                    sums[0, x, CURSOR] += 1
                if y != separator and sums[1, y, CURSOR] >= 0:
                    arena[sums[1, y, CURSOR]] = at
                    sums[1, y, CURSOR] += 1
        found[USED], found[RECORDS], found[HEAP] = used, records, size
