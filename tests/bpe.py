"""Words to train on, and Hugging Face's trainer to compare with."""

import json
import pathlib

import numpy as np
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers

from eqx_moe.tokenizer.counts import WordCounts

# Few letters, so that pairs repeat and overlap; a mark that combines, an emoji of several code points, blanks, NUL.
ALPHABETS = [
    "a",
    "ab",
    "abc#",
    "xyz<>/",
    "aé日本語",
    "e\u0301👩\u200d🚀",
    " \t\r\n\u00a0\u3000",
    "\x00\x01a",
    "\ue000\U0010fffd",
]


@st.composite
def words(draw) -> dict[str, int]:
    """Some words over a tiny alphabet, and how often each occurs."""
    letters = draw(st.sampled_from(ALPHABETS))
    word = st.text(letters, min_size=1, max_size=12)
    runs = st.builds(lambda c, n: c * n, st.sampled_from(letters), st.integers(1, 23))
    return draw(st.dictionaries(word | runs, st.integers(1, 7), max_size=13))


@st.composite
def options(draw, found: dict[str, int]) -> dict:
    """Options of the trainer; special tokens may be letters, parts of words, or what no word holds."""
    parts = [word[i:j] for word in found for i in range(len(word)) for j in range(i + 1, min(i + 5, len(word)) + 1)]
    special = st.sampled_from(sorted({"<s>", "</s>", "[PAD]", *parts}))
    return {
        "vocab_size": draw(st.integers(0, 60)),
        "special_tokens": draw(st.lists(special, max_size=4)),
        "min_frequency": draw(st.sampled_from([0, 0, 1, 2, 5])),
        "max_token_length": draw(st.none() | st.integers(1, 7)),
        "initial_alphabet": draw(st.lists(st.sampled_from("abyz日👩"), max_size=3)),
    }


def train_with_tokenizers(words: dict[str, int], **options) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of `tokenizers.trainers.BpeTrainer`; each word is fed as a text of its own, uncut."""
    tokenizer = Tokenizer(models.BPE())
    options = {name: value for name, value in options.items() if value is not None and value != ""}
    trainer = trainers.BpeTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator((word for word, count in words.items() for _ in range(count)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def word_counts(words: dict[str, int]) -> WordCounts:
    """Words as counting gives them."""
    ordered = sorted((word.encode(), count) for word, count in words.items())
    offsets = np.cumsum([0, *(len(word) for word, _ in ordered)], dtype=np.int64)
    text = np.frombuffer(b"".join(word for word, _ in ordered), np.uint8)
    return WordCounts(text, offsets, np.array([count for _, count in ordered], np.int64))


def write_rare_words(path: pathlib.Path, words: int) -> None:
    """A text in which so many words occur twice, with common ones between them: a hundred bytes for each."""
    letters = str.maketrans("0123456789", "ghijklmnop")
    with path.open("w") as file:
        for start in range(0, words, 100_000):
            rare = (f"{number * 2654435761 % 2**32:x}".translate(letters) for number in range(start, start + 100_000))
            file.writelines(
                f"the quick brown fox jumps over {word} and the lazy dog sleeps on. {word}\n" for word in rare
            )
