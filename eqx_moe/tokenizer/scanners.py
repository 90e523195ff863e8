"""Cutting text into words as the patterns of well-known tokenizers do: hand-written, over UTF-8 bytes.

A text is first *classified*: `classify` gives every byte the flags of the character that it belongs to, and finds bytes
that are not UTF-8. Then `split_<pattern>` walks over the flags, through its regular expression's alternatives in their
order; the expressions stand beside them. `tests/test_tokenizer_scanners.py` compares the pieces with those of
`tokenizers`, which is the oracle.
"""

from typing import no_type_check

import numpy as np

from eqx_moe.compiled import kernel
from eqx_moe.tokenizer.flags import (
    CJK,
    CJK_MARKS,
    CJK_WORD,
    LOWER,
    MARKS,
    NEWLINE,
    NUMBER,
    PADDING,
    SPACE,
    UPPER,
    WORD,
    classify,
    flag_table,
    width,
)
from eqx_moe.tokenizer.machine import load64, matches64, trailing_zeros

_ONES = np.uint64(0x0101010101010101)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ONE = np.uint64(1)
_APOSTROPHE = 39


@no_type_check
@kernel
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
@kernel
def up_to_three(text, flags, i, end):
    r"""The end of `\p{N}{1,3}` from `i` on."""
    j = i + width(text, i)
    for _ in range(2):
        if j < end and flags[j] & NUMBER:
            j += width(text, j)
    return j


@no_type_check
@kernel
def last_character(text, start, end):
    """Where the last character of `text[start:end]` begins."""
    i = end - 1
    while i > start and text[i] & 0xC0 == 0x80:
        i -= 1
    return i


@no_type_check
@kernel
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
@kernel
def blanks(text, flags, i, end):
    r"""The end of `\s+(?!\S)|\s+` from `i` on: a run of whitespace leaves its last character, if it has another."""
    j = run(flags, i, end, SPACE)
    if j == end:
        return j
    last = last_character(text, i, j)
    return last if last > i else j


@no_type_check
@kernel
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
@kernel
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
@kernel
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
@kernel
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
@kernel
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
@kernel
def is_ascii_letter(byte):
    return 65 <= byte <= 90 or 97 <= byte <= 122


@no_type_check
@kernel
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
@kernel
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
@kernel
def next_metaspace(text, flags, i, end):
    """A piece begins at each U+2581 (which has three bytes) and at the beginning of the text."""
    return run(flags, i + 3 if flags[i] & SPACE else i, end, WORD)


@no_type_check
@kernel
def firsts(last, followers):
    """Bits of the last bytes of characters, moved to their first bytes."""
    while last & followers:
        wide = last & followers
        last = last & ~wide | wide >> _ONE
    return last


@no_type_check
@kernel
def starts_gpt2(text, flags, i, end):
    """Where pieces begin, or the text ends, among the 63 bytes after `i`, where one begins: bit k for `text[i + k]`.

    It is what `next_gpt2` says, for 64 bytes at once, all of which must be in `text`. As a piece begins at `i`, nothing
    has to be known of what stands before.
    """
    left = min(end - i, 64)
    inside = _ALL >> np.uint64(64 - left)
    word = matches64(flags, i, WORD, WORD) & inside
    number = matches64(flags, i, NUMBER, NUMBER) & inside
    space = matches64(flags, i, SPACE, SPACE) & inside
    marks = inside & ~(word | number | space)
    after_blank = matches64(text, i, 0xFF, 32) << _ONE
    # A run begins, and takes a blank before it along.
    starts = (word & ~(word << _ONE) | number & ~(number << _ONE) | marks & ~(marks << _ONE)) & ~after_blank
    # A run of whitespace begins; its last character is left to what follows, unless nothing does, or nobody knows.
    last = space & ~(space >> _ONE) & (inside >> _ONE)
    starts |= space & ~(space << _ONE) | firsts(last, matches64(text, i, 0xC0, 0x80))
    if left < 64:
        starts |= _ONE << np.uint64(left)
    contractions = matches64(text, i, 0xFF, _APOSTROPHE) & marks & ~(marks << _ONE) & ~after_blank & (word >> _ONE)
    while contractions:
        k = trailing_zeros(contractions)
        contractions &= contractions - _ONE
        after = contraction(text, i + k, end, False) - i
        if after >= 64:
            return starts & ((_ONE << np.uint64(k + 1)) - _ONE) & ~_ONE
        if after > k:
            starts = starts & ~(_ONE << np.uint64(k + 1)) | _ONE << np.uint64(after)
    return starts & ~_ONE


@no_type_check
@kernel
def starts_llama3(text, flags, i, end, digits):
    """As `starts_gpt2`, for `next_llama3`; what is left out are pieces from the first on that would be hard to tell."""
    left = min(end - i, 64)
    inside = _ALL >> np.uint64(64 - left)
    word = matches64(flags, i, WORD, WORD) & inside
    number = matches64(flags, i, NUMBER, NUMBER) & inside
    space = matches64(flags, i, SPACE, SPACE) & inside
    newline = matches64(flags, i, NEWLINE, NEWLINE) & inside
    marks = inside & ~(word | number | space)
    followers = matches64(text, i, 0xC0, 0x80)
    # Marks take a blank before them along. One by itself, without a blank, is taken along by a word; so is a blank.
    marks_start = marks & ~(marks << _ONE) & ~(matches64(text, i, 0xFF, 32) << _ONE)
    alone = marks_start
    for _ in range(3):
        alone |= alone << _ONE & followers
    starts = marks_start | word & ~((word | space & ~newline | alone) << _ONE)
    # A newline by itself is taken along by marks before it, but by nothing after it.
    lone = newline & ~(space << _ONE) & ~(space >> _ONE)
    starts |= space & ~(space << _ONE) & ~(lone & marks << _ONE)
    last = space & ~newline & ~(space >> _ONE) & (inside >> _ONE)
    starts |= firsts(last, followers)
    if digits == 1:
        starts |= number & ~followers
    else:
        starts |= number & ~(number << _ONE)
    if left < 64:
        starts |= _ONE << np.uint64(left)
    known = _ALL
    if newline & ~lone:
        k = trailing_zeros(newline & ~lone)
        while k > 0 and space >> np.uint64(k - 1) & _ONE:
            k -= 1
        known = (_ONE << np.uint64(k)) - _ONE
    if digits != 1:
        many = number & number << np.uint64(1) & number << np.uint64(2) & number << np.uint64(3)
        if many:
            known &= (_ONE << np.uint64(trailing_zeros(many) - 2)) - _ONE
    contractions = matches64(text, i, 0xFF, _APOSTROPHE) & marks_start & (word >> _ONE) & known
    while contractions:
        k = trailing_zeros(contractions)
        contractions &= contractions - _ONE
        after = contraction(text, i + k, end, True) - i
        if after >= 64:
            known &= (_ONE << np.uint64(k + 1)) - _ONE
        elif after > k:
            starts |= _ONE << np.uint64(after)
    return starts & known & ~_ONE


@no_type_check
@kernel
def put_down(starts, i, ends, count):
    """Write the places of bits to `ends`, from `count` on; returns up to where."""
    while starts:
        ends[count] = i + trailing_zeros(starts)
        starts &= starts - _ONE
        count += 1
    return count


# The loops below are alike and stay apart: one that is given its function as an argument cannot be cached by Numba, and
# one for both of Llama-3's and Qwen2's numbers of digits takes a quarter longer.


@no_type_check
@kernel
def split_gpt2(text, flags, i, end, ends):
    """Write where the pieces of `text[i:end]` end, as many as `ends` holds; returns how many."""
    count = 0
    while i < end and count < len(ends):
        before = count
        if i + 64 <= len(text) and count + 64 <= len(ends):
            count = put_down(starts_gpt2(text, flags, i, end), i, ends, count)
        if count == before:
            ends[count] = next_gpt2(text, flags, i, end)
            count += 1
        i = ends[count - 1]
    return count


@no_type_check
@kernel
def split_llama3(text, flags, i, end, ends):
    """As `split_gpt2`, for Llama-3's pattern."""
    count = 0
    while i < end and count < len(ends):
        before = count
        if i + 64 <= len(text) and count + 64 <= len(ends) and not flags[i] & NEWLINE:
            count = put_down(starts_llama3(text, flags, i, end, 3), i, ends, count)
        if count == before:
            ends[count] = next_llama3(text, flags, i, end, 3)
            count += 1
        i = ends[count - 1]
    return count


@no_type_check
@kernel
def split_qwen2(text, flags, i, end, ends):
    r"""As `split_gpt2`, for Qwen2's pattern: Llama-3's with `\p{N}` in place of `\p{N}{1,3}`."""
    count = 0
    while i < end and count < len(ends):
        before = count
        if i + 64 <= len(text) and count + 64 <= len(ends) and not flags[i] & NEWLINE:
            count = put_down(starts_llama3(text, flags, i, end, 1), i, ends, count)
        if count == before:
            ends[count] = next_llama3(text, flags, i, end, 1)
            count += 1
        i = ends[count - 1]
    return count


@no_type_check
@kernel
def split_o200k(text, flags, i, end, ends):
    """As `split_gpt2`, for o200k's pattern."""
    count = 0
    while i < end and count < len(ends):
        i = next_o200k(text, flags, i, end)
        ends[count] = i
        count += 1
    return count


@no_type_check
@kernel
def split_deepseek_v3(text, flags, i, end, ends):
    """As `split_gpt2`, for DeepSeek-V3's pattern."""
    count = 0
    while i < end and count < len(ends):
        i = next_deepseek_v3(text, flags, i, end)
        ends[count] = i
        count += 1
    return count


@no_type_check
@kernel
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
