"""What training starts from: the symbols of which words are made before anything is merged."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eqx_moe.tokenizer import cells
from eqx_moe.tokenizer.counts import WordCounts, read_only


@dataclass(frozen=True)
class Symbols:
    """What words are made of before anything is merged.

    `tokens` are the first texts of the vocabulary: special tokens, the alphabet, then its letters with a prefix or a
    suffix. `ids` is int32 [4, bytes or code points], the symbol of a byte, or where `characters` is True of a
    character: row 2 * (first of its word) + (last of it), -1 for none.
    """

    tokens: Sequence[str]
    ids: np.ndarray
    characters: bool


def choose_symbols(
    words: WordCounts,
    *,
    characters: bool = False,
    special_tokens: Iterable[str] = (),
    initial_alphabet: Iterable[str] | None = None,
    limit_alphabet: int | None = None,
    continuing_subword_prefix: str = "",
    end_of_word_suffix: str = "",
) -> Symbols:
    """The symbols of words that are split into characters, or into bytes, each shown as `byte_characters` has it.

    `initial_alphabet` None is every byte, or no character. The order of symbols is that of `reference.train_slowly`.
    """
    shown = byte_characters()
    lead = int(words.text.max(initial=0)) if characters else 0  # The byte that begins the longest characters.
    size = 256 if lead < 0xC0 else 0x800 if lead < 0xE0 else 0x10000 if lead < 0xF0 else 0x110000
    seen = np.zeros((4, size), np.int64)
    cells.survey(read_only(words.text), read_only(words.offsets), read_only(words.counts), characters, seen)
    frequencies = {chr(i) if characters else shown[i]: int(seen[:, i].sum()) for i in np.flatnonzero(seen.any(0))}
    if initial_alphabet is None:
        initial_alphabet = () if characters else shown
    alphabet = choose_alphabet(frequencies, initial_alphabet, limit_alphabet)
    kept = set(alphabet)
    spelt = {}  # Where each text stands in `ids`.
    for row, column in np.argwhere(seen).tolist():
        character = chr(column) if characters else shown[column]
        if character in kept:
            first, last = divmod(row, 2)
            text = ("" if first else continuing_subword_prefix) + character + (end_of_word_suffix if last else "")
            spelt[row, column] = text
    ids = {token: i for i, token in enumerate(dict.fromkeys([*special_tokens, *alphabet, *sorted(spelt.values())]))}
    table = np.full(seen.shape, -1, np.int32)
    for place, text in spelt.items():
        table[place] = ids[text]
    return Symbols(list(ids), table, characters)


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level vocabulary.

    GPT-2's table (`bytes_to_unicode`): visible Latin-1 characters stand for themselves, the others begin at U+0100.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + others.index(byte)) for byte in range(256)]


def choose_alphabet(frequencies: Mapping[str, int], initial: Iterable[str] = (), limit: int | None = None) -> list[str]:
    """The characters that get an id, by code point: those that were seen, and the first of each string in `initial`.

    `limit` keeps so many: the initial ones first, then the most frequent ones; of equally frequent ones those with the
    smallest code points.
    """
    first = {text[0] for text in initial if text}
    ranked = sorted(
        {*frequencies, *first}, key=lambda c: (c not in first, -frequencies.get(c, 0) * (c not in first), c)
    )
    return sorted(ranked[:limit])


def spell(word: str, alphabet: Collection[str], prefix: str = "", suffix: str = "") -> list[str]:
    """A word's symbols. Characters outside of the alphabet are left out, as if they had not been there.

    `prefix` is put before all characters but the word's first, `suffix` behind its last.
    """
    last = len(word) - 1
    return [
        (prefix if i else "") + character + (suffix if i == last else "")
        for i, character in enumerate(word)
        if character in alphabet
    ]
