"""Write eqx_moe/tokenizer/unicode_runs.py by asking `tokenizers`: `python tests/make_unicode_table.py`.

Every code point goes through `tokenizers`' own patterns (`\\p{Lu}` and so on) and its own normalisers, so that the
table says what that library does, and not what some other copy of the Unicode database says.
`tests/test_tokenizer_unicode.py` asks again.
"""

import base64
import pathlib
import zlib

import numpy as np
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from eqx_moe.tokenizer import unicode_table as table

TARGET = pathlib.Path(table.__file__).with_name("unicode_runs.py")

PATTERNS = {
    table.NEWLINE: r"[\r\n]",
    table.WHITESPACE: r"\s",
    table.UPPER: r"[\p{Lu}\p{Lt}]",
    table.LOWER: r"\p{Ll}",
    table.LETTER: r"[\p{Lm}\p{Lo}]",
    table.MARK: r"\p{M}",
    table.NUMBER: r"\p{N}",
    table.PUNCTUATION: r"\p{P}",
    table.SYMBOL: r"\p{S}",
}

HEADER = '''"""Unicode classes of all code points: written by tests/make_unicode_table.py, read by unicode_table.py.

Unicode {unicode}, as tokenizers {version} has it. Derived from the Unicode Character Database, Copyright 1991-2024
Unicode, Inc., under the Unicode License V3 (see NOTICE).
"""

CLASSES = (
{classes}
)

NORMAL_FORMS = (
{forms}
)
'''


def scalar_values() -> np.ndarray:
    """Every code point that can stand in a text: all but the surrogates."""
    points = np.arange(table.CODE_POINTS)
    return points[(points < 0xD800) | (points > 0xDFFF)]


def members(pattern: str) -> np.ndarray:
    """Which code points a pattern for one character matches: bool [CODE_POINTS]."""
    points = scalar_values()
    found = np.ones(len(points), bool)
    split = pre_tokenizers.Split(Regex(f"{pattern}+"), "removed")
    for _, (start, end) in split.pre_tokenize_str("".join(map(chr, points))):
        found[start:end] = False
    result = np.zeros(table.CODE_POINTS, bool)
    result[points] = found
    return result


def classes() -> np.ndarray:
    """The class of each code point: uint8 [CODE_POINTS]. The earlier pattern wins: a newline is whitespace too."""
    result = np.full(table.CODE_POINTS, table.OTHER, np.uint8)
    for number, pattern in PATTERNS.items():
        result[members(pattern) & (result == table.OTHER)] = number
    return result


def normal_forms() -> np.ndarray:
    """What NFC may do to each code point: uint8 [CODE_POINTS]; see unicode_table.py for the three values."""
    nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    result = np.full(table.CODE_POINTS, table.STABLE, np.uint8)
    joining = set()
    for point in scalar_values().tolist():
        character = chr(point)
        joining.update(nfd(character)[1:])
        if nfc(character) != character:
            result[point] = table.CHANGING
        elif nfd(character) == character:
            # Canonical order moves it past a mark of class 1 (U+0334), or a mark of class 240 (U+0345) past it.
            pairs = f"{character}\u0334", f"\u0345{character}"
            if any(nfd(pair) != pair for pair in pairs):
                result[point] = table.REORDERING
    result[[ord(character) for character in joining]] = table.CHANGING
    return result


def packed(values: np.ndarray) -> str:
    """Runs of equal values, as Python source: where each begins, then its value, both uint32, zlib, base85."""
    starts = np.concatenate([[0], 1 + np.flatnonzero(values[1:] != values[:-1])])
    # Differences compress better than places.
    runs = np.concatenate([np.diff(starts, prepend=0), values[starts]]).astype("<u4")
    text = base64.b85encode(zlib.compress(runs.tobytes(), 9)).decode()
    lines = [text[k : k + 110] for k in range(0, len(text), 110)]
    return "\n".join(f'    b"{line}"' for line in lines)


def main():
    text = HEADER.format(
        unicode=table.UNICODE_VERSION,
        version=tokenizers.__version__,
        classes=packed(classes()),
        forms=packed(normal_forms()),
    )
    TARGET.write_text(text)
    print(f"{TARGET}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
