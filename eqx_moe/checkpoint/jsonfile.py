"""Strict JSON: what Python's parser lets through or dies of is refused, with the file named."""

import codecs
import functools
import json
import math
import os
import pathlib
import re
from typing import Any, no_type_check

from eqx_moe.checkpoint.files import open_plain
from eqx_moe.errors import CheckpointError, quote

# What kind of file -> the family of its error codes, the most bytes it may have.
_KINDS = {
    "config": ("CFG", 8_000_000),
    "generation config": ("CFG", 8_000_000),
    "index": ("IDX", 24_000_000),  # the largest models of 2026 have 140,000 tensors, which take 14 MB
    "checksums": ("SUM", 8_000_000),
    "tokenizer": ("TOK", 512_000_000),
    "tokenizer config": ("TOK", 8_000_000),
}
_MAX_DEPTH = 64
_MAX_DIGITS = 20  # 2**64 - 1 has twenty.
_LONG = re.compile(rb"[0-9]{21}")
# transformers writes int(1e30), its "no limit", into tokenizer_config.json; a float64 has at most 309.
_MAX_DIGITS_OF_TOKENIZERS = 309
# What Python makes of a text is up to fifty times as large. These keep it below 100 MB, and leave 100,000 tensors.
_MAX_KEYS, _MAX_VALUES = 400_000, 1_000_000
# Bytes of a text that is not all ASCII, or has escapes: one wide character makes all of them four times as wide.
_MAX_WIDE = 4_000_000


class JSONProblem(ValueError):
    """Text is not one strict JSON object; the message says why. `parse_object`'s callers add the file."""


def parse_object(raw: bytes, *, large: bool = False, digits: int = _MAX_DIGITS) -> dict[str, Any]:
    """One JSON object in UTF-8: no key twice, no NaN or Infinity, no number past float64, no integer of more
    than `digits` digits, at most 64 levels deep, at most 400,000 keys and 1,000,000 values unless it is `large`.

    Raises:
        JSONProblem: it is anything else.
    """
    # Marks inside of strings count too: who has so many of them is no config and no header either.
    marks = {mark: raw.count(mark) for mark in (b":", b",", b"{", b"[")}
    if not large and (marks.pop(b":") > _MAX_KEYS or sum(marks.values()) > _MAX_VALUES):
        raise JSONProblem(f"more than {_MAX_KEYS} keys or {_MAX_VALUES} values")
    if not large and len(raw) > _MAX_WIDE and (not raw.isascii() or b"\\u" in raw):
        raise JSONProblem(f"{len(raw)} bytes that are not all ASCII, or have escapes")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            # A function call for each integer is what a large header's time would go to.
            parse_int=functools.partial(_integer, most=digits) if _LONG.search(raw) else None,
            parse_float=_float,
        )
    except UnicodeDecodeError as error:
        raise JSONProblem(f"bytes that are not UTF-8 at position {error.start}") from error
    except json.JSONDecodeError as error:
        raise JSONProblem(f"no JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise JSONProblem(f"more than {_MAX_DEPTH} levels of nesting") from error
    if not isinstance(value, dict):
        raise JSONProblem(f"a JSON {type(value).__name__}, not an object")
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if level:
        raise JSONProblem(f"more than {_MAX_DEPTH} levels of nesting")
    return value


def read_json(path: str | os.PathLike, what: str = "config", *, doing: str = "loading model") -> dict[str, Any]:
    """The object in a JSON file, read strictly (`parse_object`).

    Args:
        what: "config", "generation config", "index", "checksums" or "tokenizer": picks the error codes and the limit on
            the size.
        doing: what the caller is about, for the error's text.

    Raises:
        CheckpointError: `*-FILE` if it is no plain readable file, `*-JSON` if its content is not strict JSON.
    """
    prefix, limit = _KINDS[what]
    path = pathlib.Path(path)
    try:
        with open_plain(path, code=f"{prefix}-FILE", doing=doing) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise JSONProblem(f"{size} bytes; a {what} has at most {limit}")
            return parse_object(
                file.readall().removeprefix(codecs.BOM_UTF8),
                large=what == "tokenizer",
                digits=_MAX_DIGITS_OF_TOKENIZERS if prefix == "TOK" else _MAX_DIGITS,
            )
    except JSONProblem as error:
        raise CheckpointError(
            code=f"{prefix}-JSON",
            doing=doing,
            file=str(path),
            expected="one JSON object in UTF-8",
            found=str(error),
            fix="download or export the file again",
        ) from error


# Called for every object of a file.
@no_type_check
def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise JSONProblem(f"the key {quote(twice)} twice in one object")
    return result


def _constant(name: str):
    raise JSONProblem(f"the constant {name}, which is no JSON")


def _integer(digits: str, most: int) -> int:
    if len(digits.lstrip("-")) > most:
        raise JSONProblem(f"the integer {quote(digits)} of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JSONProblem(f"the number {quote(digits)}, which is too large")
    return value
