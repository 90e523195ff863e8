"""What the scanners know of each byte of a text: flags of the character that it belongs to."""

import functools
from typing import no_type_check

import numpy as np

from eqx_moe.compiled import kernel
from eqx_moe.tokenizer import unicode_table
from eqx_moe.tokenizer.machine import load64

#: Flags of a character. What a flag means exactly depends on the pattern: see `flag_table`.
WORD, NUMBER, SPACE, NEWLINE, MARKS, UPPER, LOWER, CJK = (1 << bit for bit in range(8))
CJK_WORD, CJK_MARKS = UPPER, LOWER

#: How many bytes after its end an array of flags must have, all of them zero.
PADDING = 64

_HIGH = np.uint64(0x8080808080808080)


@functools.cache
def flag_table(pattern: str) -> np.ndarray:
    """The flags of each code point: uint8 [CODE_POINTS].

    | flag | `gpt2 llama3 qwen2 o200k` | `deepseek_v3` |
    | --- | --- | --- |
    | WORD | `\\p{L}` | `[\\p{L}\\p{M}]` outside of CJK |
    | NUMBER | `\\p{N}` | `\\p{N}` |
    | SPACE | `\\s`, newlines included | the same |
    | NEWLINE | `[\\r\\n]` | the same |
    | MARKS | `[^\\s\\p{L}\\p{N}]` | `[\\p{P}\\p{S}]` outside of CJK |
    | UPPER, LOWER | `[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]`, `[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]` (`o200k` only) | - |
    | CJK | - | `[一-龥぀-ゟ゠-ヿ]`, with none of the flags above |
    | CJK_WORD, CJK_MARKS | - | what would have been WORD or MARKS, in CJK |

    For `metaspace`, U+2581 is SPACE and all else is WORD.
    """
    if pattern == "metaspace":
        flags = np.full(unicode_table.CODE_POINTS, WORD, np.uint8)
        flags[0x2581] = SPACE
        flags.flags.writeable = False
        return flags
    table = unicode_table
    of_class = np.zeros(10, np.uint8)
    of_class[table.WHITESPACE] = SPACE
    of_class[table.NEWLINE] = SPACE | NEWLINE
    of_class[[table.UPPER, table.LOWER, table.LETTER]] = WORD
    of_class[table.NUMBER] = NUMBER
    of_class[[table.PUNCTUATION, table.SYMBOL]] = MARKS
    if pattern == "deepseek_v3":
        of_class[table.MARK] = WORD
    else:
        of_class[[table.OTHER, table.MARK]] = MARKS
    if pattern == "o200k":
        of_class[[table.UPPER, table.LETTER, table.MARK]] |= UPPER
        of_class[[table.LOWER, table.LETTER, table.MARK]] |= LOWER
    flags = of_class[table.classes()]
    if pattern == "deepseek_v3":
        for part in (slice(ord("一"), ord("龥") + 1), slice(0x3040, 0x3100)):
            flags[part] = CJK | np.where(flags[part] & WORD, CJK_WORD, 0) | np.where(flags[part] & MARKS, CJK_MARKS, 0)
    flags.flags.writeable = False
    return flags


@no_type_check
@kernel
def classify(text, start, end, table, flags):
    """Give each byte of `text[start:end]` its character's flags, in `flags[start:end]`.

    Returns:
        The first place that begins no character (in a sense of Unicode's table 3-7, well-formed UTF-8), or -1.
    """
    i = start
    while i < end:
        if i + 8 <= end and load64(text, i) & _HIGH == 0:
            for k in range(8):
                flags[i + k] = table[text[i + k]]
            i += 8
            continue
        lead = np.int64(text[i])
        if lead < 0x80:
            flags[i] = table[lead]
            i += 1
        elif lead < 0xE0:
            if lead < 0xC2 or i + 2 > end or text[i + 1] & 0xC0 != 0x80:
                return i
            value = table[(lead & 0x1F) << 6 | (text[i + 1] & 0x3F)]
            flags[i] = value
            flags[i + 1] = value
            i += 2
        elif lead < 0xF0:
            if i + 3 > end or text[i + 1] & 0xC0 != 0x80 or text[i + 2] & 0xC0 != 0x80:
                return i
            point = (lead & 0xF) << 12 | np.int64(text[i + 1] & 0x3F) << 6 | (text[i + 2] & 0x3F)
            if point < 0x800 or 0xD800 <= point < 0xE000:
                return i
            value = table[point]
            flags[i] = value
            flags[i + 1] = value
            flags[i + 2] = value
            i += 3
        else:
            if i + 4 > end or text[i + 1] & 0xC0 != 0x80 or text[i + 2] & 0xC0 != 0x80 or text[i + 3] & 0xC0 != 0x80:
                return i
            point = (lead & 0xF) << 18 | np.int64(text[i + 1] & 0x3F) << 12 | np.int64(text[i + 2] & 0x3F) << 6
            point |= text[i + 3] & 0x3F
            if lead > 0xF4 or point < 0x10000 or point > 0x10FFFF:
                return i
            value = table[point]
            for k in range(4):
                flags[i + k] = value
            i += 4
    return -1


@no_type_check
@kernel
def width(text, i):
    """How many bytes the character at `text[i]` has."""
    lead = text[i]
    return 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
