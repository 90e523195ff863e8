"""Texts in, rows out: what is refused, how documents are packed, in which order rows come."""

import gzip
import itertools
import json
import os

import numpy as np
import pytest
import tiny

from eqx_moe.errors import EqxMoeError
from eqx_moe.train import DataError, batches, in_order, pack, read_texts, tokenize, windows

IGNORE = -100
GOOD = b'{"text": "one"}\n{"text": "two"}\n'

# name -> (content, code, what the message must say)
BAD_LINES = {
    "not_json": (GOOD + b"{text: three}\n", "DATA-JSON", ":3:2'"),
    "cut_last_line": (GOOD + b'{"text": "thr', "DATA-JSON", ":3:"),
    "two_values": (GOOD + b'{"text": "a"} {"text": "b"}\n', "DATA-JSON", ":3:15"),
    "not_utf8": (GOOD + b'{"text": "\xe9"}\n', "DATA-UTF8", ":3:11"),
    "lone_surrogate": (GOOD + b'{"text": "\\ud83d!"}\n', "DATA-UTF8", ":3'"),
    "nul": (GOOD + b'{"text": "a\\u0000b"}\n', "DATA-NUL", ":3'"),
    "array": (GOOD + b'["three"]\n', "DATA-OBJECT", "an array"),
    "one_big_array": (b'[{"text": "a"},\n{"text": "b"}]\n', "DATA-OBJECT", "not one array"),
    "string": (GOOD + b'"three"\n', "DATA-JSON", ":3'"),
    "key_missing": (GOOD + b'{"txt": "three"}\n', "DATA-TEXT", "'txt'"),
    "chat": (GOOD + b'{"messages": []}\n', "DATA-TEXT", "chat data is not supported"),
    "text_null": (GOOD + b'{"text": null}\n', "DATA-TEXT", "None"),
    "text_number": (GOOD + b'{"text": 3}\n', "DATA-TEXT", "found:    3"),
    "text_list": (GOOD + b'{"text": ["three"]}\n', "DATA-TEXT", "['three']"),
    "text_empty": (GOOD + b'{"text": ""}\n', "DATA-TEXT", "''"),
    "nan": (GOOD + b'{"text": "three", "score": NaN}\n', "DATA-JSON", "NaN"),
    "duplicate_key": (GOOD + b'{"text": "a", "text": "b"}\n', "DATA-JSON", "'text' twice"),
    "nesting": (GOOD + b'{"text": ' + b"[" * 100_000 + b"\n", "DATA-JSON", ":3"),
    "digits": (GOOD + b'{"text": "a", "n": ' + b"9" * 6000 + b"}\n", "DATA-JSON", ":3'"),
    "empty": (b"", "DATA-EMPTY", "blanks"),
    "blank": (b"\n \n\r\n", "DATA-EMPTY", "blanks"),
    "gzip": (gzip.compress(GOOD), "DATA-KIND", "gzip"),
    "parquet": (b"PAR1....", "DATA-KIND", "Parquet"),
    "utf16": (GOOD.decode().encode("utf-16"), "DATA-KIND", "UTF-16"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_jsonl(tmp_path, name):
    content, code, says = BAD_LINES[name]
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_texts([file])
    error = caught.value
    assert isinstance(error, EqxMoeError) and isinstance(error, ValueError)
    assert error.code == code and says in str(error) and str(file) in error.file and error.fix
    assert len(error.found) < 400 and str(error).isascii()


def test_every_bad_line_is_named(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD + b"nope\n\n" + GOOD + b'{"text": 3}\n')
    with pytest.raises(DataError) as caught:
        read_texts([file])
    assert [problem.split(": ")[0].removeprefix(str(file)) for problem in caught.value.problems] == [":3:1", ":7"]


def test_a_long_value_is_cut(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": ["x" * 8_000_000]}))
    with pytest.raises(DataError) as caught:
        read_texts([file])
    assert len(caught.value.found) <= 80


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "DATA-EMPTY", "blanks"),
        (b"ab\ncd\xff", "DATA-UTF8", ":2:3"),
        (b"ab\nc\0d", "DATA-NUL", ":2"),
        (b"\x1f\x8b...", "DATA-KIND", "gzip"),
    ],
)
def test_bad_txt(tmp_path, content, code, says):
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_texts([file])
    assert caught.value.code == code and says in str(caught.value)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "data.csv").write_text("a,b")
    for name, code in {
        "absent.txt": "DATA-FILE",
        "folder.txt": "DATA-FILE",
        "pipe.txt": "DATA-FILE",
        "data.csv": "DATA-SUFFIX",
    }.items():
        with pytest.raises(DataError, match=name) as caught:
            read_texts([tmp_path / name])
        assert caught.value.code == code
    with pytest.raises(DataError, match="DATA-EMPTY"):
        read_texts([])


def test_documents_come_in_order(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    a.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    b.write_bytes(b'\n{"text": "\\u2615", "id": 7}\r\n\n{"text": "\xc3\xa9"}')
    assert read_texts([str(b), a]) == ["☕", "é", "one\r\ntwo\n"]


def test_tokenize():
    tokenizer = tiny.tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    text = "The wren sings."
    (plain,) = tokenize([text], tokenizer, vocab_size=283)
    assert plain.dtype == np.int32 and tokenizer.decode(plain.tolist()) == text
    assert tokenizer.truncation is not None
    ended = tokenize([text, text + tiny.END], tokenizer, vocab_size=283, end_id=0)
    assert [row.tolist() for row in ended] == [[*plain.tolist(), 0]] * 2
    with pytest.raises(DataError, match=r"document 1, token 1'\n.*below 80"):
        tokenize(["", "☕"], tokenizer, vocab_size=80)


def documents(*lengths: int) -> list[np.ndarray]:
    """Documents whose tokens say where they come from."""
    return [100 * i + np.arange(length, dtype=np.int32) for i, length in enumerate(lengths, start=1)]


def predicted(rows) -> list[tuple[int, int]]:
    """All pairs (token, next token) inside a segment whose label counts."""
    pairs = []
    for tokens, segments, labels in zip(rows.tokens, rows.segment_ids, rows.labels, strict=True):
        for i in range(len(tokens) - 1):
            if segments[i] == segments[i + 1] != 0 and labels[i + 1] != IGNORE:
                assert labels[i + 1] == tokens[i + 1]
                pairs.append((int(tokens[i]), int(tokens[i + 1])))
    return pairs


@pytest.mark.parametrize("seq", [2, 3, 7, 11, 200])
def test_every_token_but_the_first_is_predicted_once(seq):
    given = documents(0, 1, 2, 5, 7, 8, 13, 14, 15, 31)
    rows = pack(given, seq)
    assert rows.tokens.shape[1] == seq
    expected = [pair for document in given for pair in itertools.pairwise(document.tolist())]
    assert sorted(predicted(rows)) == sorted(expected)
    padding = rows.segment_ids == 0
    assert np.all(rows.labels[padding] == IGNORE) and np.all(rows.tokens[padding] == 0)
    assert np.all(rows.labels[~padding] == rows.tokens[~padding])


def test_short_documents_share_rows():
    rows = pack(documents(3, 4, 5, 6, 2), 10)
    assert len(rows) == 2 and set(rows.segment_ids.max(axis=1)) == {2, 3}
    assert np.all((np.diff(rows.segment_ids, axis=1) >= 0) | (rows.segment_ids[:, 1:] == 0))


def test_nothing_to_pack():
    with pytest.raises(DataError, match="DATA-EMPTY"):
        pack(documents(0, 1, 1), 5)
    with pytest.raises(ValueError, match="`seq`"):
        pack(documents(5), 1)


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 14, 15, 16, 37])
@pytest.mark.parametrize("seq", [2, 5, 10])
def test_windows_score_every_token_once(length, seq):
    (ids,) = documents(length)
    rows = windows(ids, seq)
    assert sorted(predicted(rows)) == list(itertools.pairwise(ids.tolist()))
    for row in range(1, len(rows)):
        first = int(np.flatnonzero(rows.labels[row] != IGNORE)[0])
        assert first >= seq // 2, "less than half a window of history"


def test_batches_are_seeded_epochs():
    rows = pack(documents(*[5] * 7), 5)
    firsts = [int(token) for batch in itertools.islice(batches(rows, 3, seed=1), 7) for token in batch.tokens[:, 0]]
    epochs = [firsts[:7], firsts[7:14], firsts[14:]]
    assert all(sorted(epoch) == [100 * i for i in range(1, 8)] for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = [int(token) for batch in itertools.islice(batches(rows, 3, seed=1), 7) for token in batch.tokens[:, 0]]
    other = [int(token) for batch in itertools.islice(batches(rows, 3, seed=2), 7) for token in batch.tokens[:, 0]]
    assert again == firsts != other


def test_batches_of_more_rows_than_there_are():
    drawn = list(itertools.islice(batches(pack(documents(4, 4), 4), 5), 2))
    assert sorted(token for batch in drawn for token in batch.tokens[:, 0].tolist()) == [100] * 5 + [200] * 5


def test_batches_can_have_other_rows_in_each_epoch():
    seen = []

    def epoch(number):
        seen.append(number)
        return pack([document + number for document in documents(4, 4)], 4)

    drawn = list(itertools.islice(batches(epoch, 2), 3))
    assert seen == [0, 1, 2]
    assert [sorted(batch.tokens[:, 0].tolist()) for batch in drawn] == [[100 + n, 200 + n] for n in range(3)]


def test_in_order_fills_the_last_batch_up():
    rows = pack(documents(4, 4, 4), 4)
    first, last = in_order(rows, 2)
    assert first.tokens.shape == last.tokens.shape == (2, 4)
    assert last.segment_ids[1].tolist() == [0] * 4 and last.labels[1].tolist() == [IGNORE] * 4
    for size in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            batches(rows, size)
        with pytest.raises(ValueError, match="batch_size"):
            in_order(rows, size)
