"""The merge phase: from counted words to merges, exactly as `reference.train_slowly` makes them."""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eqx_moe.tokenizer import cells, pairs
from eqx_moe.tokenizer.alphabet import Symbols
from eqx_moe.tokenizer.counts import WordCounts, large_array, read_only

_BASE = 0x100000001B3  # Of the polynomial hash of a token's text.
_WORD = 2**64
_BUCKETS = 20  # log2 of how many sums weigh pairs before they are counted.
_DEPTH = 16  # What `floor` is divided by when no pair reaches it.
_FEW = 2**32  # Cells whose positions 32 bits hold.
_PAUSE = 1 << 21  # Occurrences between two calls of `progress`: some tenths of a second.


@dataclass(frozen=True)
class Merges:
    """What training gives: all tokens by id, of which `base` were there before anything was merged; the merges, int32
    [merges, 3]: left, right, result; and by how many symbols each of them shortens the texts, int64 [merges]."""

    tokens: list[str]
    base: int
    steps: np.ndarray
    saved: np.ndarray


def merge_words(
    words: WordCounts,
    symbols: Symbols,
    *,
    vocab_size: int,
    min_frequency: int = 0,
    max_token_length: int | None = None,
    continuing_subword_prefix: str = "",
    threads: int = 1,
    max_memory: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Merges:
    """Merges pairs until there are `vocab_size` tokens, or no pair occurs max(1, min_frequency) times.

    `progress` is called with the number of tokens so far, several times a second. `max_memory`, in bytes, bounds what
    is taken besides `words`: where it does not suffice, words and places lie in mapped files without names, in the
    folder for temporary files. A bound that is too low for anything is refused.
    """
    # Each merge leaves fewer symbols in the words: there are no more tokens than these allow.
    vocab_size = min(vocab_size, len(symbols.tokens) + len(words.text))
    if len(symbols.tokens) >= vocab_size:
        return Merges(list(symbols.tokens), len(symbols.tokens), np.zeros((0, 3), np.int32), np.zeros(0, np.int64))
    check_memory(max_memory, vocab_size, threads)
    spilled = max_memory is not None and max_memory < memory_needed(words, vocab_size, threads)
    folder = tempfile.gettempdir() if spilled else None
    with ThreadPoolExecutor(threads) as pool:
        merger = _Merger(words, symbols, vocab_size, max_token_length, continuing_subword_prefix, threads, pool, folder)
        return merger.run(max(1, min_frequency), progress)


def check_memory(max_memory: int | None, vocab_size: int, threads: int) -> None:
    """Refuses a bound of memory that is too low whatever the words are."""
    least = least_memory(vocab_size, threads)
    if max_memory is not None and max_memory < least:
        raise ValueError(
            f"`max_memory` must be at least {least:,} bytes for {threads} threads and {vocab_size:,} tokens; "
            f"got {max_memory:,}."
        )


def least_memory(vocab_size: int, threads: int) -> int:
    """About how many bytes cannot lie in files."""
    # Sums by hash; records with their hash tables, of each thread and together; the vocabulary; the tokenizer.
    records = threads * max(1 << 16, 4 * vocab_size)
    return (threads + 1) * 8 * 2**_BUCKETS + 184 * records + 400 * vocab_size + (64 << 20)


def memory_needed(words: WordCounts, vocab_size: int, threads: int) -> int:
    """About how many bytes merging takes."""
    symbols = len(words.text) + len(words)
    return least_memory(vocab_size, threads) + 8 * len(words) + (_cell_type(vocab_size)().itemsize + 8) * symbols


def _cell_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size < 0xFFFE else np.uint32


class _Merger:
    """The arrays that the kernels work on, and what they leave to Python: memory, the floor, and texts."""

    def __init__(
        self,
        words: WordCounts,
        symbols: Symbols,
        vocab_size: int,
        max_token_length: int | None,
        prefix: str,
        threads: int,
        pool: ThreadPoolExecutor,
        folder: str | None,
    ):
        self.threads, self.pool, self.folder = threads, pool, folder
        self.cell_type = _cell_type(vocab_size)
        self.limit, self.prefix = vocab_size, prefix
        self.tokens = list(symbols.tokens)
        self.base = len(self.tokens)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.max_length = np.iinfo(np.int32).max if max_token_length is None else max_token_length
        # One symbol more than the vocabulary: see `_answer`.
        self.spare = vocab_size
        room = vocab_size + 1
        self.span = np.ones(room, np.int32)
        self.length = np.ones(room, np.int32)
        self.text_hash = np.zeros(room, np.uint64)
        self.text_power = np.zeros(room, np.uint64)
        self.known_hash = np.zeros(1 << (2 * room).bit_length(), np.uint64)
        for i, token in enumerate(self.tokens):
            digest, power = _hash(token)
            self.text_hash[i], self.text_power[i] = digest, power
            pairs.add_hash(self.known_hash, np.uint64(digest))
        self.alias = np.array([-1, -1])
        self.merges = np.zeros((vocab_size, 3), np.int32)
        self.saved = np.zeros(vocab_size, np.int64)
        self.read = 0  # Merges whose texts are in `tokens`.
        self.state = np.zeros(pairs.STATE, np.int64)
        self.state[pairs.VOCAB] = len(self.tokens)
        self.state[pairs.ANSWER] = -1
        self.seen = np.zeros((2, room), np.int32)
        self.sums = np.zeros((2, room, pairs.ROW), np.int64)
        self.total_count = int(words.counts.sum())
        self._fill(words, symbols)
        self.unused = set(range(len(self.tokens))) - set(np.unique(symbols.ids).tolist())  # No word holds these.

    def _fill(self, words: WordCounts, symbols: Symbols) -> None:
        counts = read_only(words.counts)
        # The most frequent first; of equally frequent ones in bytewise order, so that similar ones lie close together.
        words_of = np.zeros(1 << 16, np.int64)
        frequent = np.empty(cells.count_counts(counts, words_of), np.int64)
        order = large_array(len(counts), np.int64, self.folder)
        cells.sort_by_count(counts, len(frequent) + words_of[::-1].cumsum()[::-1] - words_of, order, frequent)
        order[: len(frequent)] = frequent[np.argsort(-counts[frequent], kind="stable")]
        classes = np.count_nonzero(words_of) + len(np.unique(counts[frequent]))
        self.class_start = np.zeros(classes, np.int64)
        self.class_count = np.zeros(classes, np.int64)
        room = len(words.text) + len(words) + 1
        self.cells = large_array(room, self.cell_type, self.folder)
        self.size, classes = cells.fill(
            read_only(words.text), read_only(words.offsets), counts, order, symbols.characters,
            symbols.ids, self.cells, self.class_start, self.class_count,
        )  # fmt: skip
        self.class_start, self.class_count = self.class_start[:classes], self.class_count[:classes]

    def run(self, least: int, progress: Callable[[int], None]) -> Merges:
        # By Zipf's law, the last of V merges occurs about (all words) / 10 V times. Too low a floor costs memory, and
        # one that is too high another scan.
        floor = max(least, self.total_count // (32 * self.limit))
        while True:
            self._scan(floor)
            reason = pairs.RESCAN
            while len(self.records):
                reason = self._merge(_PAUSE)
                progress(int(self.state[pairs.VOCAB]))
                if reason == pairs.GROW:
                    self.records.grow()
                elif reason in (pairs.FULL, pairs.RESCAN) or (reason == pairs.ASK and self._answer()):
                    break
            exhausted = reason == pairs.RESCAN and self.records.state[pairs.HEAP] == 0
            if reason == pairs.FULL or (exhausted and floor == least):
                return self._result()
            if exhausted:
                floor = max(least, floor // _DEPTH)

    def _scan(self, floor: int) -> None:
        """Compacts the cells, and records the pairs that occur `floor` times or more."""
        self.state[pairs.FLOOR] = floor
        bits = min(_BUCKETS, max(8, self.size.bit_length() - 3))
        buckets, shift = self._compact(bits), 64 - bits
        starts = np.linspace(0, self.size - 1, self.threads + 1).astype(np.int64).tolist()
        parts = [_Records(min(max(1 << 16, 4 * self.limit), stop - start + 64)) for start, stop in pairwise(starts)]

        def count(part: _Records, start: int, stop: int) -> None:
            while start < stop:
                start = pairs.count_pairs(
                    self.cells, start, stop, self.class_start, self.class_count, self.length, self.max_length,
                    buckets, shift, floor, part.table_key, part.table_record, part.shift, part.key, part.count,
                    part.places, part.state,
                )  # fmt: skip
                if start < stop:
                    part.grow()

        list(self.pool.map(count, parts, starts, starts[1:]))
        found = sum(len(part) for part in parts)
        self.records = every = _Records(found + 2 * self.limit + 64)
        for part in parts:
            pairs.add_records(
                len(part), part.key, part.count, part.places, every.table_key, every.table_record, every.shift,
                every.key, every.count, every.places, every.state,
            )  # fmt: skip
        used = pairs.keep_frequent(
            floor, every.table_key, every.table_record, every.shift, every.key, every.count, every.start,
            every.places, every.state,
        )  # fmt: skip
        most = int(every.places[: len(every)].max(initial=0))
        self.arena = large_array(2 * used + 2 * most, np.uint32 if self.size < _FEW else np.int64, self.folder)
        self.before, self.after = (large_array(most, self.cell_type, self.folder) for _ in range(2))
        free = every.start[: len(every)].copy()
        for part in parts:
            pairs.share_arena(
                len(part), part.key, part.places, part.start, every.table_key, every.table_record, every.shift, free
            )

        def write(part: _Records, start: int, stop: int) -> None:
            pairs.write_places(
                self.cells, start, stop, buckets, shift, floor, part.table_key, part.table_record, part.shift,
                part.start, self.arena,
            )  # fmt: skip

        list(self.pool.map(write, parts, starts, starts[1:]))
        pairs.build_heap(every.heap_count, every.heap_record, every.key, every.count, every.state)

    def _compact(self, bits: int) -> np.ndarray:
        """Compacts the cells, each thread a stretch of words; gives the sums of the pairs of each hash."""
        last = self.size - 1  # The separator after the last word.
        cuts = [0]
        for part in range(1, self.threads):
            cuts.append(max(cuts[-1], cells.next_separator(self.cells, last * part // self.threads)))
        cuts.append(last)
        first = [int(np.searchsorted(self.class_start, cut + 1, side="right")) - 1 for cut in cuts[:-1]]
        classes = list(zip(first, [*first[1:], len(self.class_start) - 1], strict=True))
        buckets = [np.zeros(1 << bits, np.int64) for _ in classes]

        def work(lo: int, hi: int, classes: tuple[int, int], buckets: np.ndarray) -> int:
            return cells.compact(
                self.cells, lo, hi, self.span, self.alias, self.class_start, self.class_count, classes, buckets,
                64 - bits, self.length, self.max_length,
            )  # fmt: skip

        ends = list(self.pool.map(work, cuts, cuts[1:], classes, buckets))
        self.size = 1
        for cut, end, (first_class, last_class) in zip(cuts, ends, classes, strict=False):
            gap = cut + 1 - self.size
            cells.move(self.cells, cut + 1, end, gap)
            self.class_start[first_class + 1 : last_class + 1] -= gap
            self.size = end - gap
        for more in buckets[1:]:
            buckets[0] += more
        self.span[:] = 1
        self.alias[:] = -1
        return buckets[0]

    def _merge(self, pause: int) -> int:
        every = self.records
        return pairs.merge_until(
            self.cells, self.span, self.length, self.max_length, self.class_start, self.class_count,
            every.table_key, every.table_record, every.shift, every.key, every.count, every.start, every.places,
            every.heap_count, every.heap_record, self.arena, self.seen, self.sums, self.before, self.after,
            self.text_hash, self.text_power, self.known_hash, bool(self.prefix), self.limit, self.merges,
            self.saved, self.state, every.state, pause,
        )  # fmt: skip

    def _answer(self) -> bool:
        """Says which id the next merge gets; True if all pairs must be counted anew before another one."""
        self._read_merges()
        at = int(self.state[pairs.MERGES])
        text = self._text(at)
        known = self.ids.get(text)
        if known is None:
            self.state[pairs.ANSWER] = self.state[pairs.VOCAB]
            return False
        # The vocabulary does not grow.
        self.merges = np.concatenate([self.merges, np.zeros((1, 3), np.int32)])
        self.saved = np.concatenate([self.saved, np.zeros(1, np.int64)])
        if known in self.unused:
            self.unused.remove(known)
            self.state[pairs.ANSWER] = known
            return False
        # Words hold this symbol already, of other cells: this one merge gives a symbol of its own, renamed at once.
        self.state[pairs.ANSWER] = self.spare
        self._merge(0)
        self.merges[at, 2] = known
        self.length[known] = self.length[self.spare]
        self.alias[:] = self.spare, known
        return True

    def _text(self, merge: int) -> str:
        left, right = self.merges[merge, :2].tolist()
        return self.tokens[left] + self.tokens[right].removeprefix(self.prefix)

    def _read_merges(self) -> None:
        """Writes the texts of tokens that are new."""
        done, self.read = self.read, int(self.state[pairs.MERGES])
        for merge in range(done, self.read):
            if self.merges[merge, 2] == len(self.tokens):
                text = self._text(merge)
                self.ids[text] = len(self.tokens)
                self.tokens.append(text)

    def _result(self) -> Merges:
        self._read_merges()
        done = self.state[pairs.MERGES]
        return Merges(self.tokens, self.base, self.merges[:done].copy(), self.saved[:done].copy())


class _Records:
    """The pairs that one scan found, or one thread of it: a hash table, and room for a heap."""

    def __init__(self, room: int):
        self.state = np.zeros(pairs.RECORDS_STATE, np.int64)
        self._allocate(room)

    def __len__(self) -> int:
        return int(self.state[pairs.RECORDS])

    def _allocate(self, room: int) -> None:
        self.key, self.count, self.start, self.places, self.heap_count = (np.empty(room, np.int64) for _ in range(5))
        self.heap_record = np.empty(room, np.int32)
        slots = (2 * room - 1).bit_length()
        self.shift = 64 - slots
        self.table_key, self.table_record = np.full(1 << slots, -1, np.int64), np.empty(1 << slots, np.int32)

    def grow(self) -> None:
        """Twice the room."""
        names = ("key", "count", "start", "places", "heap_count", "heap_record")
        old = [getattr(self, name) for name in names]
        self._allocate(2 * len(self.key))
        for name, array in zip(names, old, strict=True):
            getattr(self, name)[: len(self)] = array[: len(self)]
        pairs.rebuild(self.table_key, self.table_record, self.shift, self.key, len(self))


def _hash(text: str) -> tuple[int, int]:
    """The polynomial hash of a text's characters, and the base's power that shifts another hash past it."""
    digest, power = 0, 1
    for character in text:
        digest, power = (digest * _BASE + ord(character)) % _WORD, power * _BASE % _WORD
    return digest, power
