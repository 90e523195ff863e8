"""The hand-written scanners against `tokenizers`' own pre-tokenisation."""

import pytest
import splitting
from hypothesis import given, settings
from hypothesis import strategies as st

from eqx_moe.tokenizer import scanners

each_pattern = pytest.mark.parametrize("pattern", scanners.SPLITS)

#: Strings of what the patterns treat differently, and of anything.
TEXTS = st.lists(st.sampled_from(splitting.TRICKY) | st.text(max_size=3), max_size=24).map("".join)


def check(text: str, pattern: str):
    """By itself, and with so much after it that 64 bytes can be looked at together."""
    for end in ("", " and so on." * 6):
        assert scanners.pieces(text + end, pattern) == splitting.oracle_pieces(text + end, pattern)


@each_pattern
@given(text=TEXTS)
@settings(max_examples=500, deadline=None, database=None)
def test_hard_strings(pattern, text):
    check(text, pattern)


@pytest.mark.full
@each_pattern
@given(text=TEXTS)
@settings(max_examples=100_000, deadline=None, database=None)
def test_a_hundred_thousand_hard_strings(pattern, text):
    check(text, pattern)


@each_pattern
def test_all_pairs_and_triples_of_tricky_strings(pattern):
    parts = list(dict.fromkeys(splitting.TRICKY))
    for left in parts:
        # Joined by a letter and a space, which keeps neighbours from meeting.
        check(" a".join(f"{left}{right}a{left}{right}{left}" for right in parts), pattern)


@each_pattern
def test_every_place_of_a_window(pattern):
    """What is found 64 bytes at a time is found wherever in them it stands."""
    for part in (
        "'s",
        "'re'll",
        "\u3000\u3000a",
        " \u3000",
        "\n\n",
        " \n a",
        "12345",
        "“a",
        "e\u0301",
        "''d",
        "!\n/",
        "aB",
    ):
        check("".join(f"{'x' * length}{part}" for length in range(70)), pattern)
        check("".join(f"{'!' * length}{part}" for length in range(70)), pattern)
        check("".join(f"{' ' * length}{part}" for length in range(70)), pattern)


@each_pattern
@pytest.mark.parametrize("text", ["", "a", " ", "\n", "'", "\0", "\u3000", "👍", "7"])
def test_empty_and_single(pattern, text):
    assert scanners.pieces(text, pattern) == ([text] if text else [])


@each_pattern
def test_long_runs(pattern):
    """Longer than the eight bytes at once, of characters of one to four bytes."""
    for character in ("a", "A", "é", "日", "𝒳", "1", "٣", "!", "。", " ", "\u3000", "\n", "\0", "\u0301"):
        for length in (7, 8, 9, 23):
            check(character * length, pattern)
            check(f"x {character * length}y {character * length}.", pattern)


def lines(file) -> list[str]:
    return file.read_bytes().decode().splitlines(keepends=True)


@each_pattern
def test_lines_from_all_over_the_larger_texts(data, pattern):
    for file in sorted(data.glob("*.txt")):
        some = lines(file)
        check("".join(some[:: max(1, len(some) // 3000)]), pattern)


@pytest.mark.full
@each_pattern
def test_the_larger_texts_whole(data, pattern):
    for file in sorted(data.glob("*.txt")):
        every = lines(file)
        for start in range(0, len(every), 20_000):
            check("".join(every[start : start + 20_000]), pattern)
