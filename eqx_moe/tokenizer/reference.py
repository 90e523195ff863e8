"""The slow trainer: what every fast one must agree with. It counts all pairs anew before each merge.

The rules are those of Hugging Face `tokenizers` 0.23 (`models/bpe/trainer.rs`):

- Ids: special tokens in their order, then the alphabet by code point, then one id for each merge.
- The pair that occurs most often is merged; of several, the one with the smallest ids. Occurrences overlap: `aaa` has
  two of (a, a). They are merged from left to right.
- Training ends when the vocabulary is full, when no pair is left, or when the best one occurs fewer than
  max(1, min_frequency) times.
- A merge that spells an existing token takes its id. The vocabulary does not grow; the merge is still recorded.
- With `max_token_length`, a pair is counted if its symbols have fewer characters than that together, and pairs of
  the alphabet always.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from eqx_moe.tokenizer.alphabet import choose_alphabet, spell

Pair = tuple[int, int]


def train_slowly(
    words: Mapping[str, int],
    vocab_size: int,
    *,
    special_tokens: Iterable[str] = (),
    initial_alphabet: Iterable[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    limit_alphabet: int | None = None,
    continuing_subword_prefix: str = "",
    end_of_word_suffix: str = "",
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Words and how often each occurs -> vocabulary and merges. A word is split into its characters.

    The options are those of `tokenizers.trainers.BpeTrainer`. Where its result depends on the order of a hash map, this
    one's does not: `limit_alphabet` keeps, of equally frequent characters, those with the smallest code points; symbols
    with a prefix or a suffix come after the alphabet, sorted by their text.
    """
    prefix, suffix = continuing_subword_prefix, end_of_word_suffix
    frequencies = Counter()
    for word, count in words.items():
        for character in word:
            frequencies[character] += count
    alphabet = choose_alphabet(frequencies, initial_alphabet, limit_alphabet)
    split = [(spell(word, set(alphabet), prefix, suffix), count) for word, count in words.items()]
    decorated = {symbol for symbols, _ in split for symbol in symbols} if prefix or suffix else set()
    ids = {token: i for i, token in enumerate(dict.fromkeys([*special_tokens, *alphabet, *sorted(decorated)]))}
    texts, lengths = list(ids), [1] * len(ids)
    rows = [([ids[symbol] for symbol in symbols], count) for symbols, count in split]

    merges = []
    while len(ids) < vocab_size:
        counts: Counter[Pair] = Counter()
        for symbols, count in rows:
            for left, right in zip(symbols, symbols[1:], strict=False):
                length = lengths[left] + lengths[right]
                if max_token_length is None or length == 2 or length < max_token_length:
                    counts[left, right] += count
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < max(1, min_frequency):
            break
        left, right = best
        merges.append((texts[left], texts[right]))
        text = texts[left] + texts[right].removeprefix(prefix)
        new = ids.setdefault(text, len(ids))
        if new == len(texts):
            texts.append(text)
            lengths.append(0)
        lengths[new] = lengths[left] + lengths[right]
        rows = [(merge_symbols(symbols, best, new), count) for symbols, count in rows]
    return ids, merges


def merge_symbols(symbols: list[int], pair: Pair, new: int) -> list[int]:
    """Symbols in which each occurrence of a pair, from left to right, has become another symbol."""
    merged, i = [], 0
    while i < len(symbols):
        hit = tuple(symbols[i : i + 2]) == pair
        merged.append(new if hit else symbols[i])
        i += 2 if hit else 1
    return merged
