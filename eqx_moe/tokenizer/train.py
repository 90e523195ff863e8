"""Training: texts or counts in, a `tokenizers.Tokenizer` out, with the vocabulary and merges of Hugging Face's."""

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex, TypedDict, Unpack, overload

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from eqx_moe.sizes import cores, parse_size
from eqx_moe.tokenizer.alphabet import byte_characters, choose_symbols
from eqx_moe.tokenizer.count import count_files, count_texts
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.counts_file import Counted
from eqx_moe.tokenizer.export import build_tokenizer
from eqx_moe.tokenizer.machine import announced
from eqx_moe.tokenizer.merge import Merges, check_memory, merge_words
from eqx_moe.tokenizer.patterns import BYTE_TOKENS, check_pattern, layout

PathLike = str | os.PathLike[str]

#: Called with what is being done ("counting" or "merging"), how much of it is done, and of how much.
Progress = Callable[[str, int, int | None], None]


class Options(TypedDict, total=False):
    """Options of training that are seldom needed; names and meanings are those of `tokenizers.trainers.BpeTrainer`.

    initial_alphabet: characters that get an id even if no text has them. The default is every byte, shown as in a
        byte-level vocabulary, and for `metaspace` none.
    limit_alphabet: keeps so many characters, the most frequent ones; of equally frequent ones those with the smallest
        code points. Others are left out of the words.
    continuing_subword_prefix: stands before each symbol that does not begin a word.
    end_of_word_suffix: stands behind each symbol that ends a word. Symbols with a prefix or a suffix get their ids
        after the alphabet, in the order of their texts. (In `tokenizers` the order is that of a hash map.)
    threads: how many; None is one for each core that this process may use. The result does not depend on it.
    max_memory: bytes, or a text such as "8GB": as much as training may take above what the program has taken before.
        What does not fit goes to disk, into the folder for temporary files; mapped files are not counted.
    progress: True shows a bar if stderr is a terminal; or a function, see `Progress`.
    """

    initial_alphabet: Iterable[str] | None
    limit_alphabet: int | None
    continuing_subword_prefix: str
    end_of_word_suffix: str
    threads: int | None
    max_memory: int | str | None
    progress: bool | Progress


@overload
def train_bpe(
    files: PathLike | Iterable[PathLike],
    vocab_size: SupportsIndex = 32_000,
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    lines: bool = False,
    **options: Unpack[Options],
) -> Tokenizer: ...
@overload
def train_bpe(
    files: PathLike | Iterable[PathLike],
    vocab_size: Sequence[int],
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    lines: bool = False,
    **options: Unpack[Options],
) -> list[Tokenizer]: ...
def train_bpe(
    files: PathLike | Iterable[PathLike],
    vocab_size: SupportsIndex | Sequence[int] = 32_000,
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    lines: bool = False,
    **options: Unpack[Options],
) -> Tokenizer | list[Tokenizer]:
    """Trains a byte-pair encoding on files.

    Args:
        files: text in UTF-8, or the same compressed (`.gz`, `.zst`). Each file is one document.
        vocab_size: how many tokens there are to be, special ones and the alphabet included; there are fewer if no pair
            is left that occurs often enough. Several sizes give several tokenizers from one run.
        pattern: how text is cut into words: "gpt2", "llama3", "qwen2", "o200k", "deepseek_v3" or "metaspace" (Mixtral
            and Llama 2), as those tokenizers do, and tokenizer.json has their layout; or a regular expression, slower.
        special_tokens: the first ids, in this order. They are not looked for in the texts.
        min_frequency: pairs that occur more seldom are not merged.
        max_token_length: a merge must have fewer characters (bytes, except for "metaspace").
        lines: each line is a document of its own, as for `tokenizers.Tokenizer.train`: no token spans lines.
        options: see `Options`.

    Raises:
        DataError: for files that cannot be read, or are not UTF-8, with the place.
        ValueError: for options that cannot be, or a vocabulary that has no room for its alphabet.
    """
    settings = Training(vocab_size, pattern, special_tokens, min_frequency, max_token_length, **options)
    paths = [files] if isinstance(files, (str, os.PathLike)) else files
    return settings.train(count_files(paths, pattern, lines=lines, **settings.counting()))


@overload
def train_bpe_from_iterator(
    texts: Iterable[str],
    vocab_size: SupportsIndex = 32_000,
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    **options: Unpack[Options],
) -> Tokenizer: ...
@overload
def train_bpe_from_iterator(
    texts: Iterable[str],
    vocab_size: Sequence[int],
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    **options: Unpack[Options],
) -> list[Tokenizer]: ...
def train_bpe_from_iterator(
    texts: Iterable[str],
    vocab_size: SupportsIndex | Sequence[int] = 32_000,
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    **options: Unpack[Options],
) -> Tokenizer | list[Tokenizer]:
    """As `train_bpe`, on texts: a list, a generator, a column of a dataset. Each text is one document."""
    settings = Training(vocab_size, pattern, special_tokens, min_frequency, max_token_length, **options)
    return settings.train(count_texts(texts, pattern, **settings.counting()))


@overload
def train_bpe_from_counts(
    counts: WordCounts | Counted,
    vocab_size: SupportsIndex = 32_000,
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    **options: Unpack[Options],
) -> Tokenizer: ...
@overload
def train_bpe_from_counts(
    counts: WordCounts | Counted,
    vocab_size: Sequence[int],
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    **options: Unpack[Options],
) -> list[Tokenizer]: ...
def train_bpe_from_counts(
    counts: WordCounts | Counted,
    vocab_size: SupportsIndex | Sequence[int] = 32_000,
    pattern: str = "llama3",
    special_tokens: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    **options: Unpack[Options],
) -> Tokenizer | list[Tokenizer]:
    """As `train_bpe`, on words that were counted before, with this pattern: see `counts_file`."""
    if isinstance(counts, Counted):
        if counts.pattern != pattern:
            raise ValueError(f"`pattern` must be {counts.pattern!r}, by which these words were cut; got {pattern!r}.")
        counts = counts.words
    settings = Training(vocab_size, pattern, special_tokens, min_frequency, max_token_length, **options)
    return settings.train(counts)


class Training:
    """The arguments of training, checked before hours of counting, and what follows it."""

    def __init__(
        self,
        vocab_size: SupportsIndex | Sequence[int],
        pattern: str,
        special_tokens: Iterable[str],
        min_frequency: int,
        max_token_length: int | None,
        *,
        initial_alphabet: Iterable[str] | None = None,
        limit_alphabet: int | None = None,
        continuing_subword_prefix: str = "",
        end_of_word_suffix: str = "",
        threads: int | None = None,
        max_memory: int | str | None = None,
        progress: bool | Progress = True,
    ):
        if isinstance(special_tokens, str):
            raise ValueError(f"`special_tokens` must be several texts; got the one text {special_tokens!r}.")
        check_pattern(pattern)
        self.several = isinstance(vocab_size, Iterable)
        sizes: list[Any] = list(vocab_size) if isinstance(vocab_size, Iterable) else [vocab_size]
        try:
            self.sizes = [operator.index(size) for size in sizes]  # NumPy's integers too.
        except TypeError as error:
            raise ValueError(f"`vocab_size` must be an integer, or several; got {vocab_size!r}.") from error
        self.pattern, self.special_tokens = pattern, list(dict.fromkeys(special_tokens))
        for token in self.special_tokens:
            if not isinstance(token, str) or not token or not token.isascii() and _halved(token):
                raise ValueError(f"`special_tokens` must be texts that are not empty; got {token!r} among them.")
        self.min_frequency, self.max_token_length = min_frequency, max_token_length
        self.affixes = {
            "continuing_subword_prefix": continuing_subword_prefix,
            "end_of_word_suffix": end_of_word_suffix,
        }
        self.initial_alphabet = None if initial_alphabet is None else list(initial_alphabet)
        self.limit_alphabet = limit_alphabet
        threads = cores() if threads is None else threads
        self.threads, self.progress = threads, progress
        self.max_memory = None if max_memory is None else parse_size(max_memory, "max_memory")
        for name, value, least in (
            ("min_frequency", min_frequency, 0),
            ("max_token_length", max_token_length, 1),
            ("limit_alphabet", limit_alphabet, 0),
            ("threads", threads, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}.")
        if layout(pattern).metaspace and any(self.affixes.values()):
            raise ValueError(f"Words of `metaspace` have a mark: prefix and suffix must be empty; got {self.affixes}.")
        if not self.sizes:
            raise ValueError("`vocab_size` must be a number, or at least one; got none.")
        check_memory(self.max_memory, max(self.sizes), threads)
        if layout(pattern).metaspace:  # What else is in the alphabet is known once words are counted.
            self._check_sizes(len({*self.special_tokens, *BYTE_TOKENS}), "the special tokens and 256 for bytes")
        elif initial_alphabet is None and limit_alphabet is None:
            self._check_sizes(len({*self.special_tokens, *byte_characters()}))

    def _check_sizes(self, least: int, of: str = "the special tokens and the alphabet") -> None:
        if min(self.sizes) < least:
            raise ValueError(f"`vocab_size` must be at least {least}, {of}; got {min(self.sizes)}.")

    def counting(self) -> dict[str, Any]:
        """The options of counting."""
        return {"threads": self.threads, "max_memory": self.max_memory, "progress": self.shown("counting")}

    def shown(self, phase: str) -> bool | Callable[[int, int | None], None]:
        """How a phase tells of its progress."""
        report = self.progress
        return report if isinstance(report, bool) else lambda done, total: report(phase, done, total)

    def train(self, counts: WordCounts) -> Tokenizer | list[Tokenizer]:
        trained = self.tokenizers(self.merge(counts))
        return trained if self.several else trained[0]

    def merge(self, counts: WordCounts) -> Merges:
        """Merges to the largest of the sizes."""
        with announced():
            return self._merge(counts)

    def _merge(self, counts: WordCounts) -> Merges:
        _check_counts(counts)
        characters = layout(self.pattern).metaspace
        symbols = choose_symbols(
            counts,
            characters=characters,
            special_tokens=[*self.special_tokens, *(BYTE_TOKENS if characters else ())],
            initial_alphabet=self.initial_alphabet,
            limit_alphabet=self.limit_alphabet,
            **self.affixes,
        )
        self._check_sizes(len(symbols.tokens))
        size, shown = max(self.sizes), self.shown("merging")
        # Where a function is told, no bar is shown; a bar is only shown on a terminal.
        with tqdm(total=size, desc="merging", unit=" tokens", delay=1, disable=None if shown is True else True) as bar:

            def show(tokens: int) -> None:
                bar.update(tokens - bar.n)
                if not isinstance(shown, bool):
                    shown(tokens, size)

            return merge_words(
                counts,
                symbols,
                vocab_size=size,
                min_frequency=self.min_frequency,
                max_token_length=self.max_token_length,
                continuing_subword_prefix=self.affixes["continuing_subword_prefix"],
                threads=self.threads,
                max_memory=self.max_memory,
                progress=show,
            )

    def tokenizers(self, merges: Merges) -> list[Tokenizer]:
        """One for each size: what a run to that size would have given."""
        return [self._tokenizer(merges, size) for size in self.sizes]

    def _tokenizer(self, merges: Merges, size: int) -> Tokenizer:
        steps = merges.steps
        last = (steps[:, 2] == size - 1).nonzero()[0]  # The merge that makes the vocabulary full.
        if size == merges.base:
            steps = steps[:0]
        elif len(last):
            steps = steps[: last[0] + 1]
        texts = merges.tokens
        spelt = [(texts[left], texts[right]) for left, right in steps[:, :2].tolist()]
        return build_tokenizer(texts[:size], spelt, self.pattern, self.special_tokens, **self.affixes)


def _halved(text: str) -> bool:
    """Whether a text has half of a surrogate pair in it, which nothing can encode."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_counts(counts: WordCounts) -> None:
    """Pairs are counted in 64 bits: all places of all words together must be fewer than 2**62."""
    step, places = 1 << 20, 0.0
    for start in range(0, len(counts), step):
        lengths = np.diff(counts.offsets[start : start + step + 1]).astype(np.float64)
        places += float(lengths @ counts.counts[start : start + step].astype(np.float64))
    if places >= 2**62:
        raise ValueError(f"`counts` must be of texts of fewer than 2**62 bytes; got about {places:.3g}.")
