"""The merge phase against the slow trainer and against Hugging Face's."""

import bpe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqx_moe.tokenizer import merge
from eqx_moe.tokenizer.alphabet import byte_characters, choose_symbols
from eqx_moe.tokenizer.merge import merge_words
from eqx_moe.tokenizer.reference import train_slowly


def merged(words: dict[str, int], vocab_size: int, *, characters=True, **options):
    """What `train_slowly` gives, by the kernels: vocabulary and merges."""
    prefix = options.get("continuing_subword_prefix", "")
    chosen = {
        name: options.pop(name)
        for name in ("min_frequency", "max_token_length", "threads", "max_memory")
        if name in options
    }
    counts = bpe.word_counts(words)
    symbols = choose_symbols(counts, characters=characters, **options)
    found = merge_words(counts, symbols, vocab_size=vocab_size, continuing_subword_prefix=prefix, **chosen)
    steps = [(found.tokens[left], found.tokens[right]) for left, right, _ in found.steps]
    return {token: i for i, token in enumerate(found.tokens)}, steps


def test_pairs_that_are_rare_beside_others_are_merged_too():
    """They are below the floor at first: it is lowered, and the pairs are counted anew."""
    words = {f"{i:b}x{i:x}": 10 ** (i % 8) for i in range(1, 90)}
    expected = train_slowly(words, 500)
    assert sum(words.values()) // (32 * 500) > 10**3
    assert merged(words, 500, threads=2) == expected


def test_large_arrays_may_lie_in_files(monkeypatch):
    words = {f"{i:b}{i:x}": i % 7 + 1 for i in range(3000)}
    expected = merged(words, 400, threads=2)
    made = []
    really = merge.large_array
    monkeypatch.setattr(merge, "large_array", lambda *args: made.append(args[2]) or really(*args))
    monkeypatch.setattr(merge, "memory_needed", lambda *args: 2**60)
    assert merged(words, 400, threads=2, max_memory=2**59) == expected
    assert len(made) > 4 and all(made)
    with pytest.raises(ValueError, match="bytes for 2 threads and 400 tokens; got 999"):
        merged(words, 400, threads=2, max_memory=999)


MANY = {f"{i:b}{i:o}{i:x}": i % 7 + 1 for i in range(1, 700)}


def test_a_vocabulary_too_large_for_16_bits():
    assert merged(MANY, 70_000) == merged(MANY, 60_000)


@pytest.mark.full
def test_positions_too_large_for_32_bits(monkeypatch):
    expected = merged(MANY, 3000)
    monkeypatch.setattr(merge, "_FEW", 0)
    assert merged(MANY, 3000) == expected


def test_what_memory_is_needed_grows_with_words_and_vocabulary():
    few, many = bpe.word_counts({"ab": 1}), bpe.word_counts({f"{i}": 1 for i in range(5000)})
    assert merge.memory_needed(many, 300, 2) > merge.memory_needed(few, 300, 2)
    assert merge.least_memory(70_000, 2) > merge.least_memory(300, 2) > merge.least_memory(300, 1)


def check(data: st.DataObject):
    words = data.draw(bpe.words())
    options = data.draw(bpe.options(words))
    found = merged(words, threads=data.draw(st.sampled_from([1, 2, 8])), **options)
    assert found == bpe.train_with_tokenizers(words, **options)
    assert found == train_slowly(words, **options)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_equals_tokenizers(data):
    check(data)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_equals_tokenizers_on_many(data):
    check(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_slow_trainer_with_affixes(data):
    """Prefixes may be letters of the words, so that merges spell each other's results."""
    words = data.draw(bpe.words())
    options = data.draw(bpe.options(words))
    options["continuing_subword_prefix"] = data.draw(st.sampled_from(["", "##", "a", "aa", "b"]))
    options["end_of_word_suffix"] = data.draw(st.sampled_from(["", "</w>", "a", "b"]))
    options["limit_alphabet"] = data.draw(st.none() | st.integers(0, 5))
    assert merged(words, threads=2, **options) == train_slowly(words, **options)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_bytes_are_characters_of_the_byte_level_alphabet(data):
    words = data.draw(bpe.words())
    shown = byte_characters()
    as_shown = {"".join(shown[byte] for byte in word.encode()): count for word, count in words.items()}
    options = {"vocab_size": data.draw(st.integers(200, 300)), "special_tokens": ["<s>", "ab"]}
    expected = train_slowly(as_shown, initial_alphabet=shown, **options)
    assert merged(words, characters=False, **options) == expected
