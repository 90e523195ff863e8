"""A hash table from words to how often each was seen, for one thread.

Open addressing over `slots`: uint64, the upper half a word's tag (32 bits of its hash, whose upper bits say where it
belongs), the lower half its number plus one; 0 is free. `records` is uint64 [words, 4]: for a word of up to 16 bytes
its bytes, filled up with zeros; for a longer one its first 8 bytes and its place in `arena`, which has all of them;
then its length and its count. So most words are found with two cache lines.
"""

from typing import no_type_check

import numpy as np
from numba import njit

from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.machine import byte_swap, load64, trailing_zeros

_SHORT = 16
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
# Odd numbers with bits all over: fractional parts of the square roots of 2, 3 and 5.
_FIRST = np.uint64(0x6A09E667F3BCC909)
_SECOND = np.uint64(0xBB67AE8584CAA73B)
_THIRD = np.uint64(0x3C6EF372FE94F82B)
# What belongs to a word of so many bytes, of the first eight bytes from its start on and of the next.
_MASKS = np.array([(1 << 8 * min(length, 8)) - 1 for length in range(_SHORT + 1)], np.uint64)
_NEXT_MASKS = np.array([(1 << 8 * max(length - 8, 0)) - 1 for length in range(_SHORT + 1)], np.uint64)

#: Places in `state`.
WORDS, ARENA_USED = range(2)


@no_type_check
@njit(nogil=True, cache=True)
def _bytes_as_word(text, start, stop):
    """Up to eight bytes as uint64, without looking past them."""
    value = _ZERO
    for k in range(min(stop, start + 8) - 1, start - 1, -1):
        value = value << np.uint64(8) | np.uint64(text[k])
    return value


@no_type_check
@njit(nogil=True, cache=True)
def _load(text, start, length):
    """The first two words of a piece."""
    if start + _SHORT <= len(text):
        shorter = min(length, _SHORT)
        return load64(text, start) & _MASKS[shorter], load64(text, start + 8) & _NEXT_MASKS[shorter]
    return _bytes_as_word(text, start, start + length), _bytes_as_word(text, start + 8, start + length)


@no_type_check
@njit(nogil=True, cache=True)
def _same(text, start, other, place, length):
    """Whether two words of a length above 8 are the same, when their first eight bytes are."""
    for k in range(8, length - 8, 8):
        if load64(text, start + k) != load64(other, place + k):
            return False
    return load64(text, start + length - 8) == load64(other, place + length - 8)


@no_type_check
@njit(nogil=True, cache=True)
def _add(text, start, length, first, second, amount, slots, records, arena, state):
    """Count a word `amount` times more; False if there is no room for it. `second` is not looked at for a long word."""
    mixed = (first ^ np.uint64(length) * _THIRD) * _FIRST
    if length <= _SHORT:
        mixed = (mixed ^ mixed >> _HALF ^ second) * _SECOND
    else:
        for k in range(start + 8, start + length - 8, 8):
            mixed = (mixed ^ mixed >> _HALF ^ load64(text, k)) * _FIRST
        mixed = (mixed ^ mixed >> _HALF ^ load64(text, start + length - 8)) * _SECOND
    tag = mixed >> _HALF
    slot = np.int64(tag >> (_HALF - np.uint64(trailing_zeros(np.uint64(len(slots))))))
    while True:
        entry = slots[slot]
        if entry == _ZERO:
            break
        if entry >> _HALF == tag:
            word = np.int64(entry & _LOW) - 1
            if records[word, 0] == first and records[word, 2] == np.uint64(length):
                if length <= _SHORT:
                    found = records[word, 1] == second
                else:
                    found = _same(text, start, arena, np.int64(records[word, 1]), length)
                if found:
                    records[word, 3] += amount
                    return True
        slot = (slot + 1) & (len(slots) - 1)
    word = state[WORDS]
    if word >= len(records) or 2 * word >= len(slots):
        return False
    if length > _SHORT:
        place = state[ARENA_USED]
        if place + length > len(arena):
            return False
        for k in range(length):
            arena[place + k] = text[start + k]
        second = np.uint64(place)
        state[ARENA_USED] = place + length
    records[word, 0] = first
    records[word, 1] = second
    records[word, 2] = np.uint64(length)
    records[word, 3] = amount
    slots[slot] = tag << _HALF | np.uint64(word + 1)
    state[WORDS] = word + 1
    return True


@no_type_check
@njit(nogil=True, cache=True)
def add_pieces(text, start, ends, number, slots, records, arena, state):
    """Count the pieces of a text that follow each other from `start` on, piece k ending at `ends[k]`.

    Returns:
        How many were counted: fewer than `number` when there is no room for a new word.
    """
    for k in range(number):
        length = ends[k] - start
        first, second = _load(text, start, length)
        if not _add(text, start, length, first, second, _ONE, slots, records, arena, state):
            return k
        start = ends[k]
    return number


@no_type_check
@njit(nogil=True, cache=True)
def _add_table(more, more_arena, begin, stop, slots, records, arena, state):
    """Add the words `begin` to `stop` of another table; returns where it had to stop."""
    for word in range(begin, stop):
        length = np.int64(more[word, 2])
        place = np.int64(more[word, 1]) if length > _SHORT else 0
        if not _add(
            more_arena, place, length, more[word, 0], more[word, 1], more[word, 3], slots, records, arena, state
        ):
            return word
    return stop


@no_type_check
@njit(nogil=True, cache=True)
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
@njit(nogil=True, cache=True)
def _sort_keys(records, keys):
    """The first eight bytes of each word as a number: its order is that of the bytes."""
    for word in range(len(keys)):
        keys[word] = byte_swap(records[word, 0])


@no_type_check
@njit(nogil=True, cache=True)
def _is_before(one, two, records, arena):
    """Whether one word comes before another whose first eight bytes are the same."""
    length, other = np.int64(records[one, 2]), np.int64(records[two, 2])
    shorter = min(length, other)
    for k in range(8, shorter, 8):
        left, right = _eight(records, arena, one, length, k), _eight(records, arena, two, other, k)
        if left != right:
            return left < right
    return length < other


@no_type_check
@njit(nogil=True, cache=True)
def _eight(records, arena, word, length, k):
    """Bytes k to k + 8 of a word, as a number that orders as they do; zeros after its end."""
    if length <= _SHORT:
        return byte_swap(records[word, k >> 3])
    place = np.int64(records[word, 1])
    if k + 8 <= length:
        return byte_swap(load64(arena, place + k))
    return byte_swap(_bytes_as_word(arena, place + k, place + length))


@no_type_check
@njit(nogil=True, cache=True)
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
            order[begin:stop] = spare[begin:stop]
            step *= 2
        begin = stop


@no_type_check
@njit(nogil=True, cache=True)
def _write(order, records, arena, text, offsets, counts):
    """Write the words in an order, as `WordCounts` has them."""
    place = 0
    for k in range(len(order)):
        word = order[k]
        length = np.int64(records[word, 2])
        if length > _SHORT:
            begin = np.int64(records[word, 1])
            text[place : place + length] = arena[begin : begin + length]
        else:
            for j in range(length):
                text[place + j] = np.uint8(records[word, j >> 3] >> np.uint64(8 * (j & 7)))
        offsets[k] = place
        counts[k] = np.int64(records[word, 3])
        place += length
    offsets[len(order)] = place


class WordTable:
    """Words and their counts, while they are being counted; used by one thread at a time."""

    def __init__(self):
        self.slots = np.zeros(1 << 15, np.uint64)
        self.records = np.empty((1 << 14, 4), np.uint64)
        self.arena = np.empty(1 << 18, np.uint8)
        self.state = np.zeros(2, np.int64)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the kernels take."""
        return self.slots, self.records, self.arena, self.state

    def __len__(self) -> int:
        return int(self.state[WORDS])

    def grow(self, length: int):
        """Make room for more words, and for one of `length` bytes."""
        words, used = self.state
        if 2 * words >= len(self.slots):
            slots = np.zeros(2 * len(self.slots), np.uint64)
            _place_again(self.slots, slots)
            self.slots = slots
        if words >= len(self.records):
            records = np.empty((2 * len(self.records), 4), np.uint64)
            records[:words] = self.records[:words]
            self.records = records
        if used + length > len(self.arena):
            arena = np.empty(max(2 * len(self.arena), used + length), np.uint8)
            arena[:used] = self.arena[:used]
            self.arena = arena

    def add_table(self, other: "WordTable"):
        """Add all counts of another table."""
        done = 0
        while (done := _add_table(other.records, other.arena, done, len(other), *self.arrays)) < len(other):
            self.grow(int(other.records[done, 2]))

    def sorted_counts(self) -> WordCounts:
        """The words in bytewise order, and their counts."""
        records, number = self.records[: len(self)], len(self)
        keys = np.empty(number, np.uint64)
        _sort_keys(records, keys)
        order = np.argsort(keys)
        _sort_ties(order, keys, records, self.arena, np.empty_like(order))
        text = np.empty(int(records[:, 2].sum()), np.uint8)
        offsets, counts = np.empty(number + 1, np.int64), np.empty(number, np.int64)
        _write(order, records, self.arena, text, offsets, counts)
        return WordCounts(text, offsets, counts)
