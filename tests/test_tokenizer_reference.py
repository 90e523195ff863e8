"""The slow trainer against Hugging Face's."""

import bpe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqx_moe.tokenizer.reference import train_slowly


def check(data: st.DataObject):
    words = data.draw(bpe.words())
    options = data.draw(bpe.options(words))
    assert train_slowly(words, **options) == bpe.train_with_tokenizers(words, **options)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_tokenizers(data):
    check(data)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_equals_tokenizers_on_many(data):
    check(data)


def test_no_words():
    assert train_slowly({}, 300) == ({}, [])


def test_overlapping_pairs_count_and_merge_from_the_left():
    """`aaa` holds (a, a) twice, so it beats `bb`; what is merged is aa + a."""
    vocab, merges = train_slowly({"aaa": 2, "bb": 3}, 100)
    assert merges == [("a", "a"), ("b", "b"), ("aa", "a")] and vocab == {"a": 0, "b": 1, "aa": 2, "bb": 3, "aaa": 4}


def test_a_merge_that_spells_a_special_token_takes_its_id():
    vocab, merges = train_slowly({"abc": 2, "xy": 1}, 8, special_tokens=["ab", "ab", "<s>"])
    assert vocab == {"ab": 0, "<s>": 1, "a": 2, "b": 3, "c": 4, "x": 5, "y": 6, "abc": 7}
    assert merges == [("a", "b"), ("ab", "c")]


# Counts without ties, so that Hugging Face's result does not depend on a hash map's order.
UNTIED = {"abca": 11, "cab": 5, "bd": 2, "ea": 1}


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 17])
def test_a_limited_alphabet(limit):
    options = {"vocab_size": 30, "limit_alphabet": limit, "special_tokens": ["<s>"]}
    assert train_slowly(UNTIED, **options) == bpe.train_with_tokenizers(UNTIED, **options)


def test_equally_frequent_letters_are_kept_by_code_point():
    vocab, _ = train_slowly({"dcba": 1, "zz": 2}, 30, limit_alphabet=3)
    assert list(vocab)[:3] == ["a", "b", "z"]


@pytest.mark.parametrize("affixes", [("##", ""), ("", "</w>"), ("@", "_")])
def test_prefix_and_suffix_have_an_order(affixes):
    """Hugging Face numbers such symbols in the order of a hash map; with one that is not a letter of the alphabet it is
    one order of several, so the merges are compared as sets of a run in which no pairs tie."""
    prefix, suffix = affixes
    words = {"aab": 16, "ab": 5}
    options = {"vocab_size": 40, "continuing_subword_prefix": prefix, "end_of_word_suffix": suffix}
    vocab, merges = train_slowly(words, **options)
    theirs = bpe.train_with_tokenizers(words, **options)
    assert set(vocab) == set(theirs[0]) and sorted(merges) == sorted(theirs[1])
    assert list(vocab)[:2] == ["a", "b"]
    decorated = [token for token in vocab if len(token.removeprefix(prefix).removesuffix(suffix)) == 1][2:]
    assert decorated == sorted(decorated)
