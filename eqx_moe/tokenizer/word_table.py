"""A hash table from words to how often each was seen, for one thread.

Open addressing over `slots`: uint64, the upper half a word's tag (32 bits of its hash, whose upper bits say where it
belongs), the lower half its row in `records`; 0 is free, and so row 0 is nobody's. A row is four uint64: for a word of
up to 16 bytes its bytes, filled up with zeros; for a longer one its first 8 bytes and its place in `arena`, which has
all of them; then its length and its count. So most words are found with two cache lines, and as words are looked up in
batches, both have been asked for before they are read.
"""

from typing import no_type_check

import numpy as np

from eqx_moe.compiled import kernel
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.machine import byte_swap, copy, load64, prefetch, store64, trailing_zeros

_SHORT = 16
_ROW = np.uint64(4)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ZERO, _ONE, _TWO, _THREE = (np.uint64(number) for number in range(4))
# Odd numbers with bits all over: fractional parts of the square roots of 2, 3 and 5.
_FIRST = np.uint64(0x6A09E667F3BCC909)
_SECOND = np.uint64(0xBB67AE8584CAA73B)
_THIRD = np.uint64(0x3C6EF372FE94F82B)
# What belongs to a word of so many bytes, of the first eight bytes from its start on and of the next.
_MASKS = np.array([(1 << 8 * min(length, 8)) - 1 for length in range(_SHORT + 1)], np.uint64)
_NEXT_MASKS = np.array([(1 << 8 * max(length - 8, 0)) - 1 for length in range(_SHORT + 1)], np.uint64)

#: Places in `state`: how many words there are, and bytes of the arena in use.
WORDS, ARENA_USED = range(2)

#: Words of a batch, and what is known about each.
_BATCH = 64
_KEY, _NEXT, _MIXED, _START, _LENGTH, _AMOUNT = range(0, 6 * _BATCH, _BATCH)


@no_type_check
@kernel
def _bytes_as_word(text, start, stop):
    """Up to eight bytes as uint64, without looking past them."""
    value = _ZERO
    for k in range(min(stop, start + 8) - 1, start - 1, -1):
        value = value << np.uint64(8) | np.uint64(text[k])
    return value


@no_type_check
@kernel
def _load(text, start, length):
    """The first two words of a piece."""
    if start + _SHORT <= len(text):
        shorter = min(length, _SHORT)
        return load64(text, start) & _MASKS[shorter], load64(text, start + 8) & _NEXT_MASKS[shorter]
    return _bytes_as_word(text, start, start + length), _bytes_as_word(text, start + 8, start + length)


@no_type_check
@kernel
def _same(text, start, other, place, length):
    """Whether two words of a length above 8 are the same, when their first eight bytes are."""
    for k in range(8, length - 8, 8):
        if load64(text, start + k) != load64(other, place + k):
            return False
    return load64(text, start + length - 8) == load64(other, place + length - 8)


@no_type_check
@kernel
def _mix(text, start, length, first, second):
    """64 bits of hash, of which the upper ones are good."""
    mixed = (first ^ np.uint64(length) * _THIRD) * _FIRST
    if length <= _SHORT:
        return (mixed ^ mixed >> _HALF ^ second) * _SECOND
    for k in range(start + 8, start + length - 8, 8):
        mixed = (mixed ^ mixed >> _HALF ^ load64(text, k)) * _FIRST
    return (mixed ^ mixed >> _HALF ^ load64(text, start + length - 8)) * _SECOND


@no_type_check
@kernel
def _shift(slots):
    """By how many bits to shift a hash for the slot where its word belongs."""
    return np.uint64(64 - trailing_zeros(np.uint64(len(slots))))


@no_type_check
@kernel
def _is_full(words, slots):
    """Whether one more word would make searches long."""
    return 8 * (words + 1) > 5 * slots


@no_type_check
@kernel
def _add_batch(text, number, batch, slots, records, arena, state):
    """Count the words of a batch; returns how many, fewer than `number` when there is no room for a new word."""
    shift = _shift(slots)
    mask = np.uint64(len(slots) - 1)
    for k in range(number):
        prefetch(records, np.int64(_ROW * (slots[batch[_MIXED + k] >> shift] & _LOW)))
    for k in range(number):
        first, second, mixed = batch[_KEY + k], batch[_NEXT + k], batch[_MIXED + k]
        start, length = np.int64(batch[_START + k]), np.int64(batch[_LENGTH + k])
        tag, slot = mixed >> _HALF, mixed >> shift
        while True:
            entry = slots[slot]
            if entry == _ZERO:
                row = state[WORDS] + 1
                if 4 * (row + 1) > len(records) or _is_full(row - 1, len(slots)):
                    return k
                if length > _SHORT:
                    place = state[ARENA_USED]
                    if place + length > len(arena):
                        return k
                    copy(text, start, arena, place, length)
                    second = np.uint64(place)
                    state[ARENA_USED] = place + length
                record = _ROW * np.uint64(row)
                records[record] = first
                records[record + _ONE] = second
                records[record + _TWO] = np.uint64(length)
                records[record + _THREE] = batch[_AMOUNT + k]
                slots[slot] = tag << _HALF | np.uint64(row)
                state[WORDS] = row
                break
            if entry >> _HALF == tag:
                record = _ROW * (entry & _LOW)
                if records[record] == first and records[record + _TWO] == np.uint64(length):
                    if length <= _SHORT:
                        found = records[record + _ONE] == second
                    else:
                        found = _same(text, start, arena, np.int64(records[record + _ONE]), length)
                    if found:
                        records[record + _THREE] += batch[_AMOUNT + k]
                        break
            slot = (slot + _ONE) & mask
    return number


@no_type_check
@kernel
def add_pieces(text, start, ends, number, slots, records, arena, state):
    """Count the pieces of a text that follow each other from `start` on, piece k ending at `ends[k]`.

    Returns:
        How many were counted: fewer than `number` when there is no room for a new word.
    """
    batch = np.empty(6 * _BATCH, np.uint64)
    shift = _shift(slots)
    for k in range(_BATCH):
        batch[_AMOUNT + k] = _ONE
    for begin in range(0, number, _BATCH):
        size = min(_BATCH, number - begin)
        for k in range(size):
            length = ends[begin + k] - start
            first, second = _load(text, start, length)
            batch[_KEY + k] = first
            batch[_NEXT + k] = second
            mixed = _mix(text, start, length, first, second)
            prefetch(slots, np.int64(mixed >> shift))
            batch[_MIXED + k] = mixed
            batch[_START + k] = start
            batch[_LENGTH + k] = length
            start = ends[begin + k]
        added = _add_batch(text, size, batch, slots, records, arena, state)
        if added < size:
            return begin + added
    return number


@no_type_check
@kernel
def _add_table(more, more_arena, begin, stop, slots, records, arena, state):
    """Add the words in rows `begin` to `stop` of another table; returns the row at which it had to stop."""
    batch = np.empty(6 * _BATCH, np.uint64)
    shift = _shift(slots)
    while begin < stop:
        size = min(_BATCH, stop - begin)
        for k in range(size):
            record = 4 * (begin + k)
            length = np.int64(more[record + 2])
            start = np.int64(more[record + 1]) if length > _SHORT else 0
            batch[_KEY + k] = more[record]
            batch[_NEXT + k] = more[record + 1]
            mixed = _mix(more_arena, start, length, more[record], more[record + 1])
            prefetch(slots, np.int64(mixed >> shift))
            batch[_MIXED + k] = mixed
            batch[_START + k] = start
            batch[_LENGTH + k] = length
            batch[_AMOUNT + k] = more[record + 3]
        added = _add_batch(more_arena, size, batch, slots, records, arena, state)
        begin += added
        if added < size:
            break
    return begin


@no_type_check
@kernel
def _place_again(old, new):
    """Put the entries of one array of slots into another."""
    shift = _HALF - np.uint64(trailing_zeros(np.uint64(len(new))))
    for entry in old:
        if entry != _ZERO:
            slot = np.int64(entry >> _HALF >> shift)
            while new[slot] != _ZERO:
                slot = (slot + 1) & (len(new) - 1)
            new[slot] = entry


@no_type_check
@kernel
def _sort_keys(records, keys):
    """The first eight bytes of each word as a number: its order is that of the bytes."""
    for word in range(len(keys)):
        keys[word] = byte_swap(records[4 * word + 4])


@no_type_check
@kernel
def _eight(records, arena, word, length, k):
    """Bytes k to k + 8 of a word, as a number that orders as they do; zeros after its end."""
    if length <= _SHORT:
        return byte_swap(records[4 * word + 4 + (k >> 3)])
    place = np.int64(records[4 * word + 5])
    if k + 8 <= length:
        return byte_swap(load64(arena, place + k))
    return byte_swap(_bytes_as_word(arena, place + k, place + length))


@no_type_check
@kernel
def _is_before(one, two, records, arena):
    """Whether one word comes before another whose first eight bytes are the same."""
    length, other = np.int64(records[4 * one + 6]), np.int64(records[4 * two + 6])
    for k in range(8, min(length, other), 8):
        left, right = _eight(records, arena, one, length, k), _eight(records, arena, two, other, k)
        if left != right:
            return left < right
    return length < other


@no_type_check
@kernel
def _sort_ties(order, keys, records, arena, spare):
    """Put words with the same first eight bytes in order: merge sort of each run of equal `keys[order]`."""
    begin = 0
    while begin < len(order):
        stop = begin + 1
        while stop < len(order) and keys[order[stop]] == keys[order[begin]]:
            stop += 1
        step = 1
        while step < stop - begin:
            for left in range(begin, stop, 2 * step):
                middle, right = min(left + step, stop), min(left + 2 * step, stop)
                i, j = left, middle
                for k in range(left, right):
                    if j == right or (i < middle and not _is_before(order[j], order[i], records, arena)):
                        spare[k] = order[i]
                        i += 1
                    else:
                        spare[k] = order[j]
                        j += 1
            for k in range(begin, stop):
                order[k] = spare[k]
            step *= 2
        begin = stop


@no_type_check
@kernel
def _write(order, records, arena, text, offsets, counts):
    """Write words, word k to `text[offsets[k] : offsets[k + 1]]`, and their counts. 16 bytes more are written to."""
    for k in range(len(order)):
        record = 4 * order[k] + 4
        place, length = offsets[k], offsets[k + 1] - offsets[k]
        if length > _SHORT:
            copy(arena, np.int64(records[record + 1]), text, place, length)
        else:  # What is too much of it, the next word writes over.
            store64(text, place, records[record])
            store64(text, place + 8, records[record + 1])
        counts[k] = np.int64(records[record + 3])


class WordTable:
    """Words and their counts, while they are being counted; used by one thread at a time.

    With `memory`, the table takes so many bytes and never grows.
    """

    def __init__(self, memory: int | None = None):
        slots, words, arena = (1 << 15, 1 << 14, 1 << 18) if memory is None else _shares(memory)
        self.slots = np.zeros(slots, np.uint64)
        self.records = np.empty(4 * (words + 1), np.uint64)
        self.arena = np.empty(arena, np.uint8)
        self.state = np.zeros(2, np.int64)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the kernels take."""
        return self.slots, self.records, self.arena, self.state

    def __len__(self) -> int:
        return int(self.state[WORDS])

    def clear(self):
        """Forget all words."""
        self.slots[:] = 0
        self.state[:] = 0

    def grow(self, length: int):
        """Make room for more words, and for one of `length` bytes."""
        words, used = self.state
        if _is_full(int(words), len(self.slots)):
            slots = np.zeros(2 * len(self.slots), np.uint64)
            _place_again(self.slots, slots)
            self.slots = slots
        if 4 * (words + 2) > len(self.records):
            records = np.empty(2 * len(self.records), np.uint64)
            records[: len(self.records)] = self.records
            self.records = records
        if used + length > len(self.arena):
            arena = np.empty(max(2 * len(self.arena), used + length), np.uint8)
            arena[:used] = self.arena[:used]
            self.arena = arena

    def add_table(self, other: "WordTable"):
        """Add all counts of another table."""
        row, stop = 1, len(other) + 1
        while (row := _add_table(other.records, other.arena, row, stop, *self.arrays)) < stop:
            self.grow(int(other.records[4 * row + 2]))

    def sorted_order(self) -> np.ndarray:
        """The numbers of the words (from 0 on) in bytewise order: int64 [words]."""
        keys = np.empty(len(self), np.uint64)
        _sort_keys(self.records, keys)
        order = np.argsort(keys)
        _sort_ties(order, keys, self.records, self.arena, np.empty_like(order))
        return order

    def written(self, order: np.ndarray) -> WordCounts:
        """Some words, in the order of their numbers in `order`."""
        offsets, counts = np.zeros(len(order) + 1, np.int64), np.empty(len(order), np.int64)
        np.cumsum(self.records[4 * order + 6], out=offsets[1:], dtype=np.int64)
        text = np.empty(int(offsets[-1]) + _SHORT, np.uint8)
        _write(order, self.records, self.arena, text, offsets, counts)
        return WordCounts(text[:-_SHORT], offsets, counts)


def _shares(memory: int) -> tuple[int, int, int]:
    """How many slots, words and bytes of arena make up a table that takes `memory` bytes, while it is sorted too."""
    slots = 1 << 10
    while True:
        # A word: its row, half of it for the arena, and three numbers for sorting.
        words = max(memory - 8 * slots, 0) // (32 + 16 + 24)
        if not _is_full(words, slots):
            return slots, words, 16 * words
        slots *= 2
