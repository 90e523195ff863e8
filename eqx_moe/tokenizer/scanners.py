"""Cutting text into words as the patterns of well-known tokenizers do: hand-written, over UTF-8 bytes.

A text is first *classified*: `classify` gives every byte the flags of the character that it belongs to, and finds bytes
that are not UTF-8. Then `split_<pattern>` walks over the flags, through its regular expression's alternatives in their
order; the expressions stand beside them. `tests/test_tokenizer_scanners.py` compares the pieces with those of
`tokenizers`, which is the oracle.
"""

import functools
from typing import no_type_check

import numpy as np
from numba import njit

from eqx_moe.tokenizer import unicode_table
from eqx_moe.tokenizer.machine import load64, trailing_zeros

#: Flags of a character. What a flag means exactly depends on the pattern: see `flag_table`.
WORD, NUMBER, SPACE, NEWLINE, MARKS, UPPER, LOWER, CJK = (1 << bit for bit in range(8))
CJK_WORD, CJK_MARKS = UPPER, LOWER

#: How many bytes after its end an array of flags must have, all of them zero.
PADDING = 16

_ONES = np.uint64(0x0101010101010101)
_HIGH = np.uint64(0x8080808080808080)
_APOSTROPHE = 39


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
@njit(nogil=True, cache=True)
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
@njit(nogil=True, cache=True)
def width(text, i):
    """How many bytes the character at `text[i]` has."""
    lead = text[i]
    return 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


@no_type_check
@njit(nogil=True, cache=True)
def run(flags, i, end, flag):
    """The end of the run of bytes from `i` on that have a flag."""
    wanted = np.uint64(flag) * _ONES
    while i < end:
        missing = ~load64(flags, i) & wanted
        if missing != 0:
            return min(end, i + (trailing_zeros(missing) >> 3))
        i += 8
    return end


@no_type_check
@njit(nogil=True, cache=True)
def up_to_three(text, flags, i, end):
    r"""The end of `\p{N}{1,3}` from `i` on."""
    j = i + width(text, i)
    for _ in range(2):
        if j < end and flags[j] & NUMBER:
            j += width(text, j)
    return j


@no_type_check
@njit(nogil=True, cache=True)
def last_character(text, start, end):
    """Where the last character of `text[start:end]` begins."""
    i = end - 1
    while i > start and text[i] & 0xC0 == 0x80:
        i -= 1
    return i


@no_type_check
@njit(nogil=True, cache=True)
def contraction(text, i, end, any_case):
    """The end of `'s|'t|'re|'ve|'m|'ll|'d` at the apostrophe `text[i]`, or `i`. In any case, 'ſ counts too."""
    if i + 1 >= end:
        return i
    first = text[i + 1]
    if any_case:
        if first == 0xC5 and i + 2 < end and text[i + 2] == 0xBF:
            return i + 3
        if 65 <= first <= 90:
            first += 32
    if first == 115 or first == 116 or first == 109 or first == 100:  # s t m d
        return i + 2
    if i + 2 < end:
        second = text[i + 2]
        if any_case and 65 <= second <= 90:
            second += 32
        if (second == 101 and (first == 114 or first == 118)) or (second == 108 and first == 108):  # re ve, ll
            return i + 3
    return i


@no_type_check
@njit(nogil=True, cache=True)
def blanks(text, flags, i, end):
    r"""The end of `\s+(?!\S)|\s+` from `i` on: a run of whitespace leaves its last character, if it has another."""
    j = run(flags, i, end, SPACE)
    if j == end:
        return j
    last = last_character(text, i, j)
    return last if last > i else j


@no_type_check
@njit(nogil=True, cache=True)
def lines_and_blanks(text, flags, i, end, closing):
    r"""The end of `\s*[\r\n]+|\s+(?!\S)|\s+` from `i` on: up to the last newline of the run, if it has any.

    A character with a flag of `closing` ends the text.
    """
    j = run(flags, i, end, SPACE)
    for k in range(j, i, -1):
        if flags[k - 1] & NEWLINE:
            return k
    if j == end or flags[j] & closing:
        return j
    last = last_character(text, i, j)
    return last if last > i else j


@no_type_check
@njit(nogil=True, cache=True)
def next_gpt2(text, flags, i, end):
    r"""`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`"""
    j = i
    if text[i] == 32 and i + 1 < end and not flags[i + 1] & SPACE:
        j += 1
    if flags[j] & WORD:
        return run(flags, j, end, WORD)
    if flags[j] & SPACE:
        return blanks(text, flags, i, end)
    if flags[j] & NUMBER:
        return run(flags, j, end, NUMBER)
    if text[i] == _APOSTROPHE:
        k = contraction(text, i, end, False)
        if k > i:
            return k
    return run(flags, j, end, MARKS)


@no_type_check
@njit(nogil=True, cache=True)
def next_llama3(text, flags, i, end, digits):
    r"""`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|`
    `\s*[\r\n]+|\s+(?!\S)|\s+`
    """
    here = flags[i]
    if here & WORD:
        return run(flags, i, end, WORD)
    if here & NUMBER:
        return up_to_three(text, flags, i, end) if digits == 3 else i + width(text, i)
    if text[i] == _APOSTROPHE:
        k = contraction(text, i, end, True)
        if k > i:
            return k
    j = i + width(text, i)
    if j < end and flags[j] & WORD and not here & NEWLINE:
        return run(flags, j, end, WORD)
    if here & MARKS:
        j = i
    if j < end and flags[j] & MARKS and (j == i or text[i] == 32):
        return run(flags, run(flags, j, end, MARKS), end, NEWLINE)
    return lines_and_blanks(text, flags, i, end, 0)


@no_type_check
@njit(nogil=True, cache=True)
def word_o200k(flags, i, end):
    r"""The end of `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+` from `i` on, or `i`."""
    j = run(flags, i, end, UPPER)
    k = run(flags, j, end, LOWER)
    if k > j:
        return k
    # The first set gives characters back until the second finds one that is in both.
    while j > i and not flags[j - 1] & LOWER:
        j -= 1
    return j


@no_type_check
@njit(nogil=True, cache=True)
def next_o200k(text, flags, i, end):
    r"""A word in either of two forms, and the rest of Llama-3's alternatives with a slash added:

    `[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?`
    `[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?`
    `\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    """
    here = flags[i]
    if here & NUMBER:
        return up_to_three(text, flags, i, end)
    j = i + width(text, i)
    before = j < end and not here & (WORD | NEWLINE)  # This character can be the one before a word.
    k = i
    if before:
        k = word_o200k(flags, j, end)
        k = i if k == j else k
    if k == i:
        k = word_o200k(flags, i, end)
    # From here on no character of both sets is ahead, so that nothing follows a run of the first set.
    if k == i and before:
        k = run(flags, j, end, UPPER)
        k = i if k == j else k
    if k == i:
        k = run(flags, i, end, UPPER)
    if k > i:
        return contraction(text, k, end, True) if k < end and text[k] == _APOSTROPHE else k
    if here & MARKS:
        j = i
    if j < end and flags[j] & MARKS and (j == i or text[i] == 32):
        k = run(flags, j, end, MARKS)
        while k < end and (flags[k] & NEWLINE or text[k] == 47):  # /
            k += 1
        return k
    return lines_and_blanks(text, flags, i, end, 0)


@no_type_check
@njit(nogil=True, cache=True)
def is_ascii_letter(byte):
    return 65 <= byte <= 90 or 97 <= byte <= 122


@no_type_check
@njit(nogil=True, cache=True)
def unmatched(text, flags, i, end, kind, word):
    """The end of the characters from `i` on whose flags are `kind`, or of a word, if just one of them is before it."""
    j = i + width(text, i)
    if j < end and flags[j] & word:
        return run(flags, j, end, word)
    while j < end and flags[j] == kind:
        k = j + width(text, j)
        if k < end and flags[k] & word:
            break
        j = k
    return j


@no_type_check
@njit(nogil=True, cache=True)
def next_deepseek_v3(text, flags, i, end):
    r"""Three splits, each of the pieces of the one before: `\p{N}{1,3}`, `[一-龥぀-ゟ゠-ヿ]+`, and

    ``[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|``
    `\s*[\r\n]+|\s+(?!\S)|\s+`

    What matches nothing (control characters) is a piece too, as long as it lasts. The last split sees texts that end
    where a number or CJK begins or ends; those have flags of their own, so that only whitespace must look out for them.
    """
    here = flags[i]
    if here & NUMBER:
        return up_to_three(text, flags, i, end)
    if here & WORD:
        return run(flags, i, end, WORD)
    if here & CJK_WORD:
        return run(flags, i, end, CJK_WORD)
    if here & CJK_MARKS:
        return run(flags, i, end, CJK_MARKS)
    if here & CJK:
        return unmatched(text, flags, i, end, CJK, CJK_WORD)
    j = i + width(text, i)
    if here & MARKS:
        if text[i] < 0x80 and j < end and is_ascii_letter(text[j]):
            while j < end and is_ascii_letter(text[j]):
                j += 1
            return j
        j = i
    elif here & SPACE and j < end and flags[j] & WORD and not here & NEWLINE:
        return run(flags, j, end, WORD)
    if j < end and flags[j] & MARKS and (j == i or text[i] == 32):
        return run(flags, run(flags, j, end, MARKS), end, NEWLINE)
    if here & SPACE:
        return lines_and_blanks(text, flags, i, end, NUMBER | CJK)
    return unmatched(text, flags, i, end, 0, WORD)


@no_type_check
@njit(nogil=True, cache=True)
def next_metaspace(text, flags, i, end):
    """A piece begins at each U+2581 (which has three bytes) and at the beginning of the text."""
    return run(flags, i + 3 if flags[i] & SPACE else i, end, WORD)


@no_type_check
@njit(nogil=True, cache=True)
def split_gpt2(text, flags, i, end, ends):
    """Write where the pieces of `text[i:end]` end, as many as `ends` holds; returns how many."""
    count = 0
    while i < end and count < len(ends):
        i = next_gpt2(text, flags, i, end)
        ends[count] = i
        count += 1
    return count


@no_type_check
@njit(nogil=True, cache=True)
def split_llama3(text, flags, i, end, ends):
    """As `split_gpt2`, for Llama-3's pattern."""
    count = 0
    while i < end and count < len(ends):
        i = next_llama3(text, flags, i, end, 3)
        ends[count] = i
        count += 1
    return count


@no_type_check
@njit(nogil=True, cache=True)
def split_qwen2(text, flags, i, end, ends):
    r"""As `split_gpt2`, for Qwen2's pattern: Llama-3's with `\p{N}` in place of `\p{N}{1,3}`."""
    count = 0
    while i < end and count < len(ends):
        i = next_llama3(text, flags, i, end, 1)
        ends[count] = i
        count += 1
    return count


@no_type_check
@njit(nogil=True, cache=True)
def split_o200k(text, flags, i, end, ends):
    """As `split_gpt2`, for o200k's pattern."""
    count = 0
    while i < end and count < len(ends):
        i = next_o200k(text, flags, i, end)
        ends[count] = i
        count += 1
    return count


@no_type_check
@njit(nogil=True, cache=True)
def split_deepseek_v3(text, flags, i, end, ends):
    """As `split_gpt2`, for DeepSeek-V3's pattern."""
    count = 0
    while i < end and count < len(ends):
        i = next_deepseek_v3(text, flags, i, end)
        ends[count] = i
        count += 1
    return count


@no_type_check
@njit(nogil=True, cache=True)
def split_metaspace(text, flags, i, end, ends):
    """As `split_gpt2`, for text in which U+2581 stands for each space."""
    count = 0
    while i < end and count < len(ends):
        i = next_metaspace(text, flags, i, end)
        ends[count] = i
        count += 1
    return count


SPLITS = {
    "gpt2": split_gpt2,
    "llama3": split_llama3,
    "qwen2": split_qwen2,
    "o200k": split_o200k,
    "deepseek_v3": split_deepseek_v3,
    "metaspace": split_metaspace,
}


def pieces(text: str, pattern: str) -> list[str]:
    """The pieces of a text as it stands (no normalisation), for a pattern of `SPLITS`: one text, to look at."""
    data = np.frombuffer(text.encode(), np.uint8)
    flags = np.zeros(len(data) + PADDING, np.uint8)
    assert classify(data, 0, len(data), flag_table(pattern), flags) == -1
    ends = np.empty(len(data), np.int64)
    count = SPLITS[pattern](data, flags, 0, len(data), ends)
    starts = [0, *ends[:count].tolist()]
    return [bytes(data[start:end]).decode() for start, end in zip(starts, starts[1:], strict=False)]
