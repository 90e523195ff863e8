"""Counts files: written and read, damaged, and added up."""

import collections
import hashlib
import json
import random

import bpe
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqx_moe.errors import DataError
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.counts_file import Counted, add_counts, first_wrong, merge_counts, read_counts, write_counts

WORDS = {"": 0, "a": 3, "ab": 2**40, "\x00": 1, "é日": 7, "👩\u200d🚀": 5, "b" * 300: 2}
del WORDS[""]


def as_dict(words: WordCounts) -> dict[str, int]:
    pieces = [words.text[a:b].tobytes().decode() for a, b in zip(words.offsets, words.offsets[1:], strict=False)]
    assert [piece.encode() for piece in pieces] == sorted({piece.encode() for piece in pieces})
    return dict(zip(pieces, words.counts.tolist(), strict=True))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.counts"
    write_counts(path, Counted(bpe.word_counts(WORDS), "llama3", True))
    return path


def test_what_is_written_is_read(file):
    found = read_counts(file)
    assert (as_dict(found.words), found.pattern, found.lines) == (WORDS, "llama3", True)
    assert [path.name for path in file.parent.iterdir()] == ["a.counts"]


def test_no_words(tmp_path):
    write_counts(tmp_path / "none.counts", Counted(bpe.word_counts({}), "gpt2", False))
    assert as_dict(read_counts(tmp_path / "none.counts").words) == {}


def test_the_documented_layout(file):
    """As docs/counts-format.md has it, read by hand."""
    data = file.read_bytes()
    assert data[:8] == b"EQXCOUNT" and data[8:12] == b"\x01\0\0\0"
    length = int.from_bytes(data[12:16], "little")
    about = json.loads(data[16 : 16 + length])
    at = 16 + length
    assert at % 8 == 0 and about == {"pattern": "llama3", "lines": True, "words": 6, "bytes": len(data) - at - 104 - 32}
    counts = np.frombuffer(data, "<i8", 6, at)
    offsets = np.frombuffer(data, "<i8", 7, at + 48)
    text = data[at + 104 : -32]
    assert {text[a:b].decode(): n for a, b, n in zip(offsets, offsets[1:], counts, strict=False)} == WORDS
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()


def refused(path) -> str:
    with pytest.raises(DataError) as caught:
        read_counts(path)
    assert caught.value.file == str(path) and caught.value.fix
    return caught.value.code


def test_other_files_are_refused(file, tmp_path):
    whole = file.read_bytes()
    for name, data, code in (
        ("empty", b"", "COUNTS-FORMAT"),
        ("text", b"some text that is longer", "COUNTS-FORMAT"),
        ("newer", whole[:8] + b"\x02" + whole[9:], "COUNTS-FORMAT"),
        ("json", whole[:16] + b"!" + whole[17:], "COUNTS-FORMAT"),
        ("huge", whole[:12] + b"\xff\xff\xff\x7f" + whole[16:], "COUNTS-FORMAT"),
        ("beginning", whole[:-1], "COUNTS-LENGTH"),
        ("longer", whole + b"\0", "COUNTS-LENGTH"),
        ("flipped", whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:], "COUNTS-SUM"),
    ):
        (tmp_path / name).write_bytes(data)
        assert refused(tmp_path / name) == code, name
    assert refused(tmp_path / "missing") == "COUNTS-FILE" and refused(tmp_path) == "COUNTS-FILE"


def test_any_byte_that_changes_is_noticed(file):
    whole = file.read_bytes()
    for _ in range(300):
        at = random.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ random.randrange(1, 256)]) + whole[at + 1 :])
        assert refused(file).startswith("COUNTS-")


@pytest.mark.parametrize(
    "words",
    [
        [(b"b", 1), (b"a", 1)],
        [(b"a", 1), (b"a", 1)],
        [(b"", 1)],
        [(b"a", 0)],
        [(b"a", -1)],
        *([(bad, 1)] for bad in (b"\x80", b"\xc3", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80")),
    ],
)
def test_words_that_cannot_be(words, tmp_path):
    """A file whose checksum is right, by a program that is not."""
    text = np.frombuffer(b"".join(word for word, _ in words), np.uint8)
    offsets = np.cumsum([0, *(len(word) for word, _ in words)])
    wrong = WordCounts(text, offsets, np.array([count for _, count in words]))
    write_counts(tmp_path / "wrong", Counted(wrong, "gpt2", False))
    assert refused(tmp_path / "wrong") == "COUNTS-WORDS"


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=5))
def test_utf8_is_what_python_says_it_is(data):
    try:
        data.decode()
        right = True
    except UnicodeDecodeError:
        right = False
    text = np.frombuffer(data, np.uint8)
    arrays = [np.array(array, np.int64) for array in ([0, len(data)], [1])]
    for array in arrays:
        array.flags.writeable = False
    assert (first_wrong(text, *arrays) == -1) == right


@settings(max_examples=100, deadline=None)
@given(st.lists(bpe.words(), max_size=5))
def test_adding(parts):
    total = collections.Counter()
    for part in parts:
        total.update(part)
    assert as_dict(add_counts([bpe.word_counts(part) for part in parts])) == total


def test_merging_files(file, tmp_path):
    for i, words in enumerate(({"a": 1, "zz": 4}, {"é日": 1}, {})):
        write_counts(tmp_path / f"{i}.counts", Counted(bpe.word_counts(words), "llama3", True))
    out = tmp_path / "sum.counts"
    merged = merge_counts([file, *(tmp_path / f"{i}.counts" for i in range(3))], out)
    assert as_dict(merged.words) == WORDS | {"a": 4, "zz": 4, "é日": 8}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.counts",
        "1.counts",
        "2.counts",
        "a.counts",
        "sum.counts",
    ]
    assert as_dict(read_counts(out).words) == as_dict(merged.words)


def test_counts_of_other_texts_are_not_added(file, tmp_path):
    other = tmp_path / "other.counts"
    for pattern, lines in (("gpt2", True), ("llama3", False)):
        write_counts(other, Counted(bpe.word_counts({"a": 1}), pattern, lines))
        with pytest.raises(DataError, match="llama3.*over lines") as caught:
            merge_counts([file, other], tmp_path / "sum.counts")
        assert caught.value.code == "COUNTS-PATTERN" and caught.value.file == str(other)
    assert not (tmp_path / "sum.counts").exists()


def test_sums_that_64_bits_do_not_hold():
    with pytest.raises(OverflowError):
        add_counts([bpe.word_counts({"a": 2**61})] * 2)
