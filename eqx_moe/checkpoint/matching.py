"""Holding a model's tensors against those in the files: all differences at once, from headers alone."""

import difflib
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from eqx_moe.checkpoint.dtypes import WEIGHT_DTYPES
from eqx_moe.checkpoint.names import Name, Skipped, Tensor, matcher, plan
from eqx_moe.checkpoint.shards import MOST_PROBLEMS, Stored, weights_file
from eqx_moe.errors import CheckpointError, quote

_ORDER = ("ST-MISSING", "ST-EXTRA", "ST-SHAPE", "ST-DTYPE")
_COMPARED = 50  # patterns of names held against each other for a suggestion


class _Problem(NamedTuple):
    code: str
    tensor: str
    expected: str
    found: str
    fix: str


def match(
    folder: pathlib.Path,
    leaves: Mapping[str, Any],
    layouts: Mapping[str, tuple[Name, ...]],
    stored: Mapping[str, Stored],
    *,
    skipped: Iterable[Skipped],
    tied: tuple[tuple[str, str], ...],
    one_dtype: bool,
) -> dict[str, Tensor]:
    """The tensors of the layout that the files are in: all present, in the right shapes and in float dtypes, and with
    nothing besides but what `skipped` and `tied` (second names) allow.

    Args:
        one_dtype: whether the tensors of one leaf must agree in their dtype.

    Raises:
        CheckpointError: ST-MISSING, ST-EXTRA, ST-SHAPE or ST-DTYPE, the first that applies; `problems` has all, up to
            5,000.
    """
    plans = [plan(names, leaves) for names in layouts.values()]
    tensors = min(plans, key=lambda tensors: _distance(tensors, stored))
    passed = [matcher(each.theirs) for each in skipped if each.beside is None or each.beside in stored]
    aliases = dict(tied)
    extra = [
        name
        for name in stored
        if name not in tensors and name not in aliases and not any(pattern.fullmatch(name) for pattern in passed)
    ]
    found = (
        _unmatched(tensors, stored, extra),
        _misshapen(tensors, stored, aliases),
        _odd_dtypes(tensors, stored, aliases),
        _unequal_dtypes(_twins(tensors, aliases, stored, one_dtype), stored),
    )
    problems = [problem for each in found for problem in itertools.islice(each, MOST_PROBLEMS)]
    if problems:
        problems.sort(key=lambda problem: _ORDER.index(problem.code))
        first = problems[0]
        raise CheckpointError(
            code=first.code,
            doing="matching the weights with config.json",
            file=stored[first.tensor].path if first.tensor in stored else str(weights_file(folder)),
            item=first.tensor,
            expected=first.expected,
            found=first.found,
            fix=first.fix,
            problems=tuple(
                f"{quote(p.tensor)}: expected {p.expected}; found {p.found}" for p in problems[:MOST_PROBLEMS]
            ),
        )
    return tensors


def _distance(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> tuple[int, int]:
    """How far a layout is from the files: fewest leaves that lack something first, then most tensors that are there.

    Not by tensors alone: a packed layout has few, so it would lack few in files that have nothing of it.
    """
    lacking = {tensor.composition.leaves for name, tensor in tensors.items() if name not in stored}
    return sum(map(len, lacking)), -len(tensors.keys() & stored.keys())


def _unmatched(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], extra: list[str]) -> Iterator[_Problem]:
    missing = list(itertools.islice((each for name, each in tensors.items() if name not in stored), MOST_PROBLEMS))
    hint = _common_prefix(tensors, stored) if missing and extra else ""
    near = {} if hint else _near([tensor.name for tensor in missing], extra)
    for tensor in missing:
        fix = hint or "a tensor is never made up: export the checkpoint again, or correct config.json"
        if found := near.get(_pattern(tensor.name)):
            fix = f"the files have {quote(found)}, which the model has not: rename it if that is the one"
        yield _Problem("ST-MISSING", tensor.name, f"a tensor of shape {tensor.shape}", "no tensor of that name", fix)
    for name in extra:
        fix = hint or "a tensor is never dropped in silence: remove it from the file, or correct config.json"
        what = "" if name else "a tensor whose name is empty, "
        found = f"{what}{stored[name].entry.dtype} {stored[name].entry.shape}, which the model has not"
        yield _Problem("ST-EXTRA", name, "only tensors of the model", found, fix)


def _misshapen(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], aliases: Mapping[str, str]
) -> Iterator[_Problem]:
    tied = ((name, tensors[original]) for name, original in aliases.items() if original in tensors)
    for name, tensor in itertools.chain(tensors.items(), tied):
        if name in stored and (found := stored[name].entry.shape) != (shape := tensor.shape):
            hint = " (the transpose would fit)" if found == shape[::-1] else ""
            fix = "correct config.json, or export the tensor again as the model has it"
            yield _Problem("ST-SHAPE", name, f"the shape {shape}", f"{found}{hint}", fix)


def _odd_dtypes(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], aliases: Mapping[str, str]
) -> Iterator[_Problem]:
    for name in (tensors.keys() | aliases.keys()) & stored.keys():
        dtype = stored[name].entry.dtype
        if dtype not in WEIGHT_DTYPES:
            hint = " (quantised, but not FP8 with its scales)" if dtype[:2] in ("F8", "F6", "F4", "U8") else ""
            fix = "export the checkpoint in bfloat16 or float32"
            yield _Problem("ST-DTYPE", name, f"a dtype among {', '.join(WEIGHT_DTYPES)}", f"{dtype}{hint}", fix)


def _twins(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str], stored: Mapping[str, Stored], one_dtype: bool
) -> dict[str, str]:
    """Tensors that must have the dtype of another: tied ones, and with `one_dtype` those of one leaf."""
    twins = {
        name: original
        for name, original in aliases.items()
        if original in tensors and name in stored and original in stored
    }
    if one_dtype:
        first: dict[str, str] = {}
        for name, tensor in tensors.items():
            if name in stored:
                for leaf in tensor.composition.leaves:
                    twins.setdefault(name, first.setdefault(leaf, name))
    return twins


def _unequal_dtypes(twins: Mapping[str, str], stored: Mapping[str, Stored]) -> Iterator[_Problem]:
    for name, other in twins.items():
        dtype, due = stored[name].entry.dtype, stored[other].entry.dtype
        if dtype != due and dtype in WEIGHT_DTYPES and due in WEIGHT_DTYPES:
            fix = "export both in one dtype, or name one for all when loading: dtype='float32'"
            yield _Problem("ST-DTYPE", name, f"{due}, as {quote(other)} has, which belongs with it", dtype, fix)


def _near(missing: list[str], extra: list[str]) -> dict[str, str]:
    """The pattern of a missing name -> the extra name most like it. A thousand misspelled experts are one pattern."""
    patterns = list(dict.fromkeys(map(_pattern, missing)))[:_COMPARED]
    candidates = dict(itertools.islice(((_pattern(name), name) for name in reversed(extra)), _COMPARED))
    close = {pattern: difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.75) for pattern in patterns}
    return {pattern: candidates[found[0]] for pattern, found in close.items() if found}


def _common_prefix(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> str:
    """A sentence if all names in the files carry, or lack, one and the same prefix."""
    name = next(iter(stored))
    for ours in tensors:
        if name.endswith(ours) and name != ours:
            prefix = name.removesuffix(ours)
            if all(other.startswith(prefix) for other in stored):
                return f"all names in the files carry the prefix {quote(prefix)}: export them without it"
        if ours.endswith(name) and name != ours:
            prefix = ours.removesuffix(name)
            if not any(other.startswith(prefix) for other in stored):
                return f"the names in the files lack the prefix {quote(prefix)}: export the whole model"
    return ""


def _pattern(name: str) -> str:
    return re.sub(r"[0-9]+", "*", name)
