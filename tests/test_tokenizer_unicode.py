"""The pinned Unicode table against what `tokenizers` itself answers, for every code point."""

import make_unicode_table
import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from eqx_moe.tokenizer import unicode_table as table


def remaining(points: np.ndarray, pattern: str) -> int:
    """How many of some code points a pattern for one character does not match."""
    split = pre_tokenizers.Split(Regex(f"{pattern}+"), "removed")
    return sum(end - start for _, (start, end) in split.pre_tokenize_str("".join(map(chr, points))))


def test_every_code_point_has_its_class():
    points = make_unicode_table.scalar_values()
    classes = table.classes()[points]
    others = points[classes == table.OTHER]
    assert remaining(
        others, "[" + "".join(make_unicode_table.PATTERNS.values()).replace("[", "").replace("]", "") + "]"
    ) == (len(others))
    some = points[classes != table.OTHER]
    for number, pattern in make_unicode_table.PATTERNS.items():
        members = points[classes == number]
        assert remaining(members, pattern) == 0
        # A newline is whitespace too; all else is of one class.
        matched = len(some) - remaining(some, pattern)
        assert matched == len(members) + 2 * (number == table.WHITESPACE), pattern


def test_the_numbers_that_unicode_16_gives():
    counts = np.bincount(table.classes())
    assert counts[[table.UPPER, table.LOWER, table.LETTER]].sum() == 141_028
    assert counts[[table.WHITESPACE, table.NEWLINE]].sum() == 25


@pytest.mark.full
def test_the_script_writes_the_same_file_again(tmp_path, monkeypatch):
    written = make_unicode_table.TARGET.read_text()
    monkeypatch.setattr(make_unicode_table, "TARGET", tmp_path / "unicode_runs.py")
    make_unicode_table.main()
    assert (tmp_path / "unicode_runs.py").read_text() == written
