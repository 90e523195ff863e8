"""Counts as files: what one machine counted, to be added to what others have. The layout: docs/counts-format.md."""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import numpy as np

from eqx_moe.compiled import kernel
from eqx_moe.errors import DataError, quote
from eqx_moe.tokenizer.counts import WordCounts, large_array, read_only
from eqx_moe.tokenizer.whole import whole_file

MAGIC = b"EQXCOUNT"
VERSION = 1
_HEADER = 16  # Magic, version, and the length of the JSON.
_SUM = 32
_MOST_JSON = 1 << 20
_CHUNK = 1 << 24

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Counted:
    """Words, and how texts were cut into them: a pattern's name or a regular expression, whole documents or lines."""

    words: WordCounts
    pattern: str
    lines: bool


def write_counts(path: PathLike, counted: Counted) -> None:
    """Writes a counts file; it is there wholly or not at all."""
    words = counted.words
    about = {"pattern": counted.pattern, "lines": counted.lines, "words": len(words), "bytes": len(words.text)}
    text = json.dumps(about).encode()
    text += b" " * (-(_HEADER + len(text)) % 8)
    parts = [
        np.frombuffer(MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text, np.uint8),
        words.counts.astype("<i8", copy=False),
        words.offsets.astype("<i8", copy=False),
        words.text,
    ]
    digest = hashlib.sha256()
    with whole_file(path) as file:
        for part in parts:
            data = np.ascontiguousarray(part).view(np.uint8).data
            for start in range(0, len(data), _CHUNK):
                digest.update(data[start : start + _CHUNK])
                file.write(data[start : start + _CHUNK])
        file.write(digest.digest())


def read_counts(path: PathLike) -> Counted:
    """Reads a counts file. The arrays stay in the file, which is mapped; all of it is checked first.

    Raises:
        DataError: `COUNTS-FILE` no plain readable file, `COUNTS-FORMAT` no counts file, or one of another version,
            `COUNTS-LENGTH` cut off or too long, `COUNTS-SUM` damaged, `COUNTS-WORDS` words that are not in order, not
            UTF-8, or of impossible counts.
    """
    name = os.fspath(path)
    try:
        if not os.path.isfile(name):
            found = "no such file" if not os.path.lexists(name) else "something else"
            raise _error("COUNTS-FILE", name, "a plain file", found, "check the path")
        with open(name, "rb") as file:
            head = file.read(_HEADER)
            size = os.fstat(file.fileno()).st_size
            if len(head) < _HEADER or head[:8] != MAGIC:
                found = f"a file that begins with {quote(head[:8])}"
                raise _error("COUNTS-FORMAT", name, "a counts file", found, "`eqx-moe tokenizer count` writes one")
            version, length = (int.from_bytes(head[at : at + 4], "little") for at in (8, 12))
            if version != VERSION:
                raise _error("COUNTS-FORMAT", name, f"version {VERSION}", f"version {version}", "count again")
            about = _about(name, file.read(length) if length <= _MOST_JSON else b"")
        data = np.memmap(name, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise _error(
            "COUNTS-FILE", name, "a readable file", str(error), "check the path and its permissions"
        ) from error
    words, number_of_bytes = about["words"], about["bytes"]
    start = _HEADER + length
    expected = start + 8 * words + 8 * (words + 1) + number_of_bytes + _SUM
    if start % 8 or size != expected or len(data) != size:
        raise _error("COUNTS-LENGTH", name, f"{expected:,} bytes", f"{size:,}", "copy the file again, or count again")
    digest = hashlib.sha256()
    for at in range(0, size - _SUM, _CHUNK):
        digest.update(data[at : min(at + _CHUNK, size - _SUM)].data)
    if digest.digest() != data[size - _SUM :].tobytes():
        raise _error("COUNTS-SUM", name, "the SHA-256 at its end", "another", "copy the file again, or count again")
    offsets_at, text_at = start + 8 * words, start + 8 * (2 * words + 1)
    counts = data[start:offsets_at].view("<i8").astype(np.int64, copy=False)
    offsets = data[offsets_at:text_at].view("<i8").astype(np.int64, copy=False)
    found = WordCounts(data[text_at : size - _SUM], offsets, counts)
    wrong = first_wrong(read_only(found.text), read_only(offsets), read_only(counts))
    if wrong >= 0:
        expected = "words of UTF-8 in ascending order, each once, counts from 1 on"
        raise _error("COUNTS-WORDS", name, expected, f"another thing at word {wrong}", "count again")
    return Counted(found, about["pattern"], about["lines"])


def _about(name: str, text: bytes) -> dict:
    try:
        about = json.loads(text)
        right = (
            isinstance(about["pattern"], str)
            and type(about["lines"]) is bool
            and all(type(about[key]) is int and 0 <= about[key] < 2**48 for key in ("words", "bytes"))
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right:
        expected = "a JSON object with pattern, lines, words and bytes after the first 16 bytes"
        raise _error("COUNTS-FORMAT", name, expected, quote(text[:80]), "copy the file again, or count again")
    return about


def _error(code: str, file: str, expected: str, found: str, fix: str) -> DataError:
    return DataError(code=code, doing="reading counts", file=file, expected=expected, found=found, fix=fix)


@no_type_check
@kernel
def first_wrong(text, offsets, counts):
    """The first word that cannot be: out of order, empty, not UTF-8, or of a count below 1. -1 if all are right."""
    words = len(counts)
    if offsets[0] != 0 or offsets[words] != len(text):
        return np.int64(words)
    for word in range(words):
        start, stop = offsets[word], offsets[word + 1]
        if counts[word] < 1 or stop <= start or stop > len(text):
            return np.int64(word)
        if word and _compare(text, offsets, word - 1, text, offsets, word) >= 0:
            return np.int64(word)
        at = start
        while at < stop:
            lead = text[at]
            width = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            if 0x80 <= lead < 0xC2 or lead > 0xF4 or at + width > stop:
                return np.int64(word)
            for i in range(1, width):
                low, high = 0x80, 0xBF
                if i == 1:  # No overlong forms, no surrogates, nothing above U+10FFFF.
                    low = 0xA0 if lead == 0xE0 else 0x90 if lead == 0xF0 else 0x80
                    high = 0x9F if lead == 0xED else 0x8F if lead == 0xF4 else 0xBF
                if not low <= text[at + i] <= high:
                    return np.int64(word)
            at += width
    return np.int64(-1)


@no_type_check
@kernel
def _compare(text, offsets, word, other_text, other_offsets, other):
    """Below 0, 0 or above 0 as a word comes before, is, or comes after another."""
    start, other_start = offsets[word], other_offsets[other]
    length, other_length = offsets[word + 1] - start, other_offsets[other + 1] - other_start
    for i in range(min(length, other_length)):
        difference = np.int64(text[start + i]) - np.int64(other_text[other_start + i])
        if difference != 0:
            return difference
    return length - other_length


# --- Adding ----------------------------------------------------------------------------------------------------------


def add_counts(parts: Sequence[WordCounts], folder: PathLike | None = None) -> WordCounts:
    """The sum of counts. With a `folder`, the result lies in files there that have no name any more, not in memory.

    Raises:
        OverflowError: for a sum of counts that 64 bits do not hold.
    """
    if not parts:
        return WordCounts(np.zeros(0, np.uint8), np.zeros(1, np.int64), np.zeros(0, np.int64))
    if sum(float(part.counts.sum(dtype=np.float64)) for part in parts) >= 2**62:
        raise OverflowError("the counts add up to 2**62 or more")
    parts = list(parts)
    while len(parts) > 1:  # Neighbours in pairs: each word is copied log2(parts) times.
        paired = [_add_two(one, two, folder) for one, two in zip(parts[::2], parts[1::2], strict=False)]
        parts = paired + ([parts[-1]] if len(parts) % 2 else [])
    return parts[0]


def merge_counts(paths: Sequence[PathLike], out: PathLike) -> Counted:
    """Adds counts files up into another one, without holding them in memory.

    Raises:
        DataError: as `read_counts`, and `COUNTS-PATTERN` for files whose texts were cut in different ways.
    """
    counted = read_all(paths)
    with tempfile.TemporaryDirectory(dir=pathlib.Path(out).absolute().parent, prefix=".merging-") as folder:
        write_counts(
            out, Counted(add_counts([one.words for one in counted], folder), counted[0].pattern, counted[0].lines)
        )
    return read_counts(out)


def read_all(paths: Sequence[PathLike]) -> list[Counted]:
    """Reads counts files that may be added: all cut by one pattern, and all by documents or all by lines."""
    if not paths:
        raise ValueError("`paths` must name at least one counts file; got none.")
    counted = [read_counts(path) for path in paths]
    first = counted[0]
    for path, other in zip(paths, counted, strict=True):
        if (other.pattern, other.lines) != (first.pattern, first.lines):
            raise DataError(
                code="COUNTS-PATTERN",
                doing="adding counts",
                file=os.fspath(path),
                expected=f"{_cut(first)}, as {quote(os.fspath(paths[0]))}",
                found=_cut(other),
                fix="count all texts with one pattern, and all with or all without lines",
            )
    return counted


def _cut(counted: Counted) -> str:
    return f"pattern {quote(counted.pattern)} over {'lines' if counted.lines else 'whole documents'}"


def _add_two(one: WordCounts, two: WordCounts, folder: PathLike | None) -> WordCounts:
    text = large_array(len(one.text) + len(two.text), np.uint8, folder)
    offsets = large_array(len(one) + len(two) + 1, np.int64, folder)
    counts = large_array(len(one) + len(two), np.int64, folder)
    words = _merge_sorted(
        read_only(one.text), read_only(one.offsets), read_only(one.counts),
        read_only(two.text), read_only(two.offsets), read_only(two.counts), text, offsets, counts,
    )  # fmt: skip
    return WordCounts(text[: offsets[words]], offsets[: words + 1], counts[:words])


@no_type_check
@kernel
def _merge_sorted(text, offsets, counts, text2, offsets2, counts2, text_out, offsets_out, counts_out):
    i = j = words = used = 0
    offsets_out[0] = 0
    while i < len(counts) or j < len(counts2):
        order = -1 if j == len(counts2) else 1 if i == len(counts) else _compare(text, offsets, i, text2, offsets2, j)
        counts_out[words] = (counts[i] if order <= 0 else 0) + (counts2[j] if order >= 0 else 0)
        source, start, stop = text, 0, 0
        if order <= 0:
            start, stop = offsets[i], offsets[i + 1]
            i += 1
        else:
            source, start, stop = text2, offsets2[j], offsets2[j + 1]
        if order >= 0:
            j += 1
        for at in range(start, stop):
            text_out[used] = source[at]
            used += 1
        words += 1
        offsets_out[words] = used
    return words
