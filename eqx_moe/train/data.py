"""From text files to batches: reading, tokenizing, packing, shuffling. All of it on the host, in numpy."""

import dataclasses
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from eqx_moe.checkpoint.jsonfile import JSONProblem, parse_object
from eqx_moe.errors import DataError
from eqx_moe.kernels.cross_entropy import IGNORE
from eqx_moe.train.batch import Batch

PathLike = str | os.PathLike[str]

_READING = "reading training text"
# After so many bad lines the rest of a file is not looked at.
_MAX_BAD_LINES = 100

# What the first bytes of a file say that it is, if not text.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_texts(files: Iterable[PathLike]) -> list[str]:
    """The documents of some files, in order: a `.txt` file is one document, each line of a `.jsonl` file is another.

    Text is UTF-8; a byte-order mark at the start is passed over, and so are blank lines of a `.jsonl` file, whose
    other lines are objects with a string under `text` (other keys are not looked at).

    Raises:
        DataError: for anything else, with the file, the line and column, the key, what stands there, and the way out.
        All
            bad lines of a file are in one error; nothing is skipped in silence.
    """
    documents = []
    for file in map(pathlib.Path, files):
        if file.suffix == ".txt":
            documents.append(_read_whole(file))
        elif file.suffix == ".jsonl":
            documents += _read_lines(file)
        else:
            _refuse(
                "DATA-SUFFIX",
                file,
                "",
                expected="a .txt file (one document) or a .jsonl file (a document a line)",
                found=f"the suffix {file.suffix!r}",
                fix="rename the file if it is one of these, or convert it",
            )
    if not documents:
        _refuse("DATA-EMPTY", "", "", expected="at least one document", found="none", fix="name at least one file")
    return documents


def _refuse(
    code: str, file, item: str, *, expected: str, found: str, fix: str, problems: tuple[str, ...] = ()
) -> NoReturn:
    raise DataError(
        code=code,
        doing=_READING,
        file=str(file),
        item=item,
        expected=expected,
        found=found,
        fix=fix,
        problems=problems,
    )


def _open_bytes(file: pathlib.Path) -> bytes:
    """The bytes of a plain, non-empty file that is not evidently something else than text."""
    try:
        # Before opening: opening a named pipe would wait for its other end.
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):
            found = "a folder" if stat.S_ISDIR(mode) else "no plain file"
            _refuse("DATA-FILE", file, "", expected="a text file", found=found, fix="name the files themselves")
        content = file.read_bytes()
    except OSError as error:
        found = error.strerror or type(error).__name__
        fix = "check the path and its permissions"
        try:
            _refuse("DATA-FILE", file, "", expected="a file that can be read", found=found, fix=fix)
        except DataError as refusal:
            raise refusal from error
    for magic, kind in _MAGIC.items():
        if content.startswith(magic):
            fix = "save it as UTF-8" if kind == "UTF-16" else "unpack or convert it first"
            _refuse("DATA-KIND", file, "", expected="UTF-8 text", found=f"a {kind} file", fix=fix)
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        _refuse("DATA-EMPTY", file, "", expected="text", found="nothing but blanks", fix="leave the file out")
    return content


def _read_whole(file: pathlib.Path) -> str:
    content = _open_bytes(file)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1) + 1
        found, fix = f"the byte 0x{content[error.start]:02x}", "save the file as UTF-8"
        _refuse("DATA-UTF8", f"{file}:{line}:{column}", "", expected="UTF-8 text", found=found, fix=fix)
    place = text.find("\0")
    if place >= 0:
        line = text.count("\n", 0, place) + 1
        fix = "remove the NUL characters; is this a text file?"
        _refuse("DATA-NUL", f"{file}:{line}", "", expected="text", found="a NUL character", fix=fix)
    return text


@dataclasses.dataclass(frozen=True)
class _BadLine:
    """What is wrong with one line of a file; `place` is its number, and the column where that is known."""

    code: str
    place: str
    item: str
    expected: str
    found: str
    fix: str


def _read_lines(file: pathlib.Path) -> list[str]:
    documents, bad = [], []
    for number, line in enumerate(_open_bytes(file).split(b"\n"), start=1):
        if not line.strip():
            continue
        text = _text_of(line, number)
        if isinstance(text, str):
            documents.append(text)
        else:
            bad.append(text)
            if len(bad) == _MAX_BAD_LINES:
                break
    if bad:
        first = bad[0]
        problems = tuple(f"{file}:{b.place}: {b.item}: expected {b.expected}, found {b.found}" for b in bad)
        _refuse(
            first.code,
            f"{file}:{first.place}",
            first.item,
            expected=first.expected,
            found=first.found,
            fix=first.fix,
            problems=problems,
        )
    return documents


def _text_of(line: bytes, number: int) -> str | _BadLine:
    """The document of one line of JSONL, or what is wrong with it."""

    def bad(code: str, *, expected: str, found: str, fix: str, column: int | None = None, item: str = "") -> _BadLine:
        return _BadLine(code, f"{number}" if column is None else f"{number}:{column}", item, expected, found, fix)

    if line.lstrip().startswith(b"["):
        fix = 'write one object a line, {"text": ...}, not one array for the file'
        return bad("DATA-OBJECT", expected="a JSON object", found=f"an array: {_cut(line)}", fix=fix)
    try:
        value = parse_object(line)
    except JSONProblem as error:
        cause = error.__cause__
        if isinstance(cause, UnicodeDecodeError):
            found, column = f"the byte 0x{line[cause.start]:02x}", cause.start + 1
            return bad("DATA-UTF8", column=column, expected="UTF-8 text", found=found, fix="save the file as UTF-8")
        fix = "write one JSON object a line; a last line may have been cut off"
        if isinstance(cause, json.JSONDecodeError):
            found, column = f"{cause.msg}: {_cut(line)}", cause.colno
            return bad("DATA-JSON", column=column, expected="a JSON object", found=found, fix=fix)
        return bad("DATA-JSON", expected="a JSON object", found=f"{error}: {_cut(line)}", fix=fix)
    if "text" not in value:
        fix = 'put the document under "text"'
        if "messages" in value:
            fix += "; chat data is not supported in this version"
        found = f"the keys {_cut(sorted(value))}"
        return bad("DATA-TEXT", item="'text'", expected="a string under this key", found=found, fix=fix)
    text = value["text"]
    if not isinstance(text, str) or not text:
        fix = "give the line a text, or leave the line out"
        return bad("DATA-TEXT", item="'text'", expected="a string that is not empty", found=_cut(text), fix=fix)
    if "\0" in text:
        found = f"a NUL character: {_cut(text)}"
        return bad("DATA-NUL", item="'text'", expected="text", found=found, fix="remove the NUL characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        found = f"half a surrogate pair: {_cut(text)}"
        return bad("DATA-UTF8", item="'text'", expected="Unicode text", found=found, fix="mend the escapes")
    return text


def _cut(value: object) -> str:
    """Foreign text for an error: its `repr`, at most 80 characters of it."""
    if isinstance(value, bytes):
        value = value[:400].decode("utf-8", "replace")
    shown = repr(value[:81] if isinstance(value, str) else value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def tokenize(
    texts: Sequence[str], tokenizer: Tokenizer, *, vocab_size: int, end_id: int | None = None
) -> list[Int[np.ndarray, "_"]]:
    """The ids of each text, int32, with the special tokens that the tokenizer itself adds.

    Args:
        texts: documents.
        tokenizer: its truncation and padding are not applied.
        vocab_size: of the model. An id outside it raises `DataError`: on the device it would be NaN.
        end_id: put behind each document that does not end with it; a model learns from it where to stop.
    """
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    rows = []
    for number, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids = encoding.ids
        if end_id is not None and ids[-1:] != [end_id]:
            ids = [*ids, end_id]
        row = np.asarray(ids, np.int32)
        if row.size and int(row.max()) >= vocab_size:
            raise DataError(
                code="DATA-ID",
                doing="tokenizing training text",
                file="",
                item=f"document {number}, token {int(row.argmax())}",
                expected=f"ids below {vocab_size}, the model's vocab_size",
                found=str(int(row.max())),
                fix="use the tokenizer that belongs to the model",
            )
        rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of equal length on the host; the fields are those of `Batch`."""

    tokens: Int[np.ndarray, "rows seq"]
    segment_ids: Int[np.ndarray, "rows seq"]
    labels: Int[np.ndarray, "rows seq"]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def batch(self, index: Sequence[int] | np.ndarray) -> Batch:
        """Some of the rows, on the device."""
        return Batch(
            tokens=jnp.asarray(self.tokens[index]),
            segment_ids=jnp.asarray(self.segment_ids[index]),
            labels=jnp.asarray(self.labels[index]),
        )


def _padding(rows: int, seq: int) -> Rows:
    zeros = np.zeros((rows, seq), np.int32)
    return Rows(tokens=zeros, segment_ids=zeros.copy(), labels=np.full((rows, seq), IGNORE, np.int32))


def pack(documents: Iterable[Int[np.ndarray, "_"]], seq: int) -> Rows:
    """Documents in rows of `seq` tokens, each a segment of its own; what is left of a row is padding.

    A document longer than a row is cut into pieces that share one token with the next, so that every token but a
    document's first is predicted exactly once. Short pieces are put together where they fit best. Documents of fewer
    than two tokens have nothing to predict and are left out; `DataError` if nothing remains.
    """
    if seq < 2:
        raise ValueError(f"`seq` must be at least 2, a token and the one that it predicts; got {seq}.")
    pieces = [document[start : start + seq] for document in documents for start in range(0, len(document) - 1, seq - 1)]
    if not pieces:
        raise DataError(
            code="DATA-EMPTY",
            doing="packing training text",
            file="",
            item="",
            expected="at least one document of two tokens or more",
            found="none",
            fix="give more text",
        )
    pieces.sort(key=len, reverse=True)
    # Best fit: the open row with the least room that is enough. `room` is sorted and holds (free places, row).
    room: dict[int, list[int]] = {}
    contents: list[list[np.ndarray]] = []
    for piece in pieces:
        free = min((size for size in room if size >= len(piece)), default=None)
        if free is None:
            free, row = seq, len(contents)
            contents.append([])
        else:
            row = room[free].pop()
            if not room[free]:
                del room[free]
        contents[row].append(piece)
        if free - len(piece) >= 2:
            room.setdefault(free - len(piece), []).append(row)
    rows = _padding(len(contents), seq)
    for row, row_pieces in enumerate(contents):
        start = 0
        for segment, piece in enumerate(row_pieces, start=1):
            span = slice(start, start + len(piece))
            rows.tokens[row, span] = rows.labels[row, span] = piece
            rows.segment_ids[row, span] = segment
            start += len(piece)
    return rows


def windows(ids: Int[np.ndarray, " tokens"], seq: int) -> Rows:
    """Rows for measuring a model on one long text: windows of `seq` tokens, every token but the first scored exactly
    once.

    Each window begins half a window after the last one and scores the half that is new, so that every scored token
    has at least half a window of history, but in the first window. The last one is moved back to the end of the text.
    """
    if seq < 2 or len(ids) < 2:
        raise ValueError(f"`seq` and the number of `ids` must be at least 2; got {seq} and {len(ids)}.")
    starts = list(range(0, max(len(ids) - seq, 0), seq // 2)) + [max(len(ids) - seq, 0)]
    rows = _padding(len(starts), seq)
    scored = 1
    for row, start in enumerate(starts):
        window = ids[start : start + seq]
        rows.tokens[row, : len(window)] = window
        rows.segment_ids[row, : len(window)] = 1
        rows.labels[row, scored - start : len(window)] = window[scored - start :]
        scored = start + len(window)
    return rows


def batches(rows: Rows | Callable[[int], Rows], batch_size: int, *, seed: int = 0) -> Iterator[Batch]:
    """Batches on the device, without end: each epoch is every row once, in an order drawn from `(seed, epoch)`.

    A batch may reach over the edge of two epochs, so that all batches have one shape.

    Args:
        rows: the rows, or a function that makes those of an epoch (from 0 on).
        batch_size: rows a batch.
        seed: the order depends on nothing else.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive; got {batch_size}.")
    return _batches(rows, batch_size, seed)


def _batches(rows: Rows | Callable[[int], Rows], batch_size: int, seed: int) -> Iterator[Batch]:
    waiting: Rows | None = None
    epoch = 0
    while True:
        new = rows(epoch) if callable(rows) else rows
        new = _take(new, np.random.default_rng((seed, epoch)).permutation(len(new)))
        waiting = new if waiting is None else _join(waiting, new)
        full = len(waiting) - len(waiting) % batch_size
        for start in range(0, full, batch_size):
            yield waiting.batch(np.arange(start, start + batch_size))
        waiting = _take(waiting, np.arange(full, len(waiting)))
        epoch += 1


def _take(rows: Rows, index: np.ndarray) -> Rows:
    return Rows(rows.tokens[index], rows.segment_ids[index], rows.labels[index])


def _join(a: Rows, b: Rows) -> Rows:
    return Rows(
        np.concatenate([a.tokens, b.tokens]),
        np.concatenate([a.segment_ids, b.segment_ids]),
        np.concatenate([a.labels, b.labels]),
    )


def in_order(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled up with padding, so that all have one shape."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive; got {batch_size}.")
    rows = _join(rows, _padding(-len(rows) % batch_size, rows.tokens.shape[1]))
    return (rows.batch(np.arange(start, start + batch_size)) for start in range(0, len(rows), batch_size))
