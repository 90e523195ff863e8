"""How known tokenizers cut text into words, and the layout of tokenizer.json that goes with it.

The expressions are as the tokenizers' own files have them; `scanners` walks through the same ones by hand.
"""

import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Layout:
    """What tokenizer.json says besides vocabulary and merges.

    `expressions`: each cuts what the one before has left, and what lies between its matches stays whole. None means
    GPT-2's, which the step `ByteLevel` brings along. `nfc`: texts are normalised first. `ignore_merges`: a word that is
    a token is that token, whatever the merges say. `metaspace`: U+2581 for spaces, words begin with it, characters
    rather than bytes, and bytes only for characters that are no token.
    """

    expressions: tuple[str, ...] | None = None
    nfc: bool = False
    ignore_merges: bool = False
    metaspace: bool = False


LAYOUTS = {
    "gpt2": Layout(),
    "llama3": Layout((_LLAMA3,), ignore_merges=True),
    "qwen2": Layout((_LLAMA3.replace("{1,3}", ""),), nfc=True),
    "o200k": Layout(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ignore_merges=True,
    ),
    "deepseek_v3": Layout(
        (
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "metaspace": Layout(metaspace=True),
}

#: The tokens of a vocabulary of characters that stand for single bytes.
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def check_pattern(pattern: str) -> None:
    """Refuses what is neither a pattern's name nor a regular expression."""
    if pattern not in LAYOUTS:
        split_by(pattern)


def split_by(pattern: str) -> pre_tokenizers.Split:
    """What cuts by a regular expression.

    Raises:
        ValueError: it is none, or looks like a name that was mistyped.
    """
    names = f"`pattern` must be one of {', '.join(LAYOUTS)}, or a regular expression; got {pattern!r}"
    if re.fullmatch(r"[\w .-]*", pattern):
        raise ValueError(f"{names}.")
    try:
        return pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # `tokenizers` has none of its own.
        raise ValueError(f"{names}: {error}.") from error


def layout(pattern: str) -> Layout:
    """The layout of a pattern's name, or of a regular expression."""
    return LAYOUTS.get(pattern) or Layout((pattern,))


def pipeline(pattern: str) -> dict[str, Any]:
    """The parts of tokenizer.json around the model: normalizer, pre_tokenizer, post_processor, decoder."""
    found = layout(pattern)
    if found.metaspace:
        return {
            "normalizer": _sequence(
                "normalizers",
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ),
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": _sequence(
                "decoders",
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ),
        }
    pre = _byte_level(use_regex=found.expressions is None)
    if found.expressions is not None:
        splits = [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
            for expression in found.expressions
        ]
        pre = _sequence("pretokenizers", *splits, pre)
    return {
        "normalizer": {"type": "NFC"} if found.nfc else None,
        "pre_tokenizer": pre,
        "post_processor": _byte_level(trim_offsets=False),
        "decoder": _byte_level(),
    }


def _sequence(name: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: list(steps)}


def _byte_level(*, trim_offsets: bool = True, use_regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": use_regex}
