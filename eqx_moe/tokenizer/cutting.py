"""Where a long text may be cut without changing its words, so that its parts can be counted apart.

The one rule: after a letter, before a character that is neither letter nor mark nor apostrophe. No pattern's word goes
over such a place: a word that has the letter ends with it, for only letters, marks (`o200k`, `deepseek_v3`) and
contractions (`o200k`) can follow a letter within a word. And what follows is cut as if the text began there, for no
pattern looks back. Nor does the part before see that it ends early: only runs of whitespace look ahead.

`deepseek_v3` also takes its CJK characters together, of which some are no letters: there the character after is none of
them. `metaspace` cuts before a space or U+2581. With NFC, neither of the two characters may be one that it changes.
"""

import functools
from typing import no_type_check

import numpy as np

from eqx_moe.compiled import kernel
from eqx_moe.tokenizer import unicode_table
from eqx_moe.tokenizer.flags import CJK, LOWER, SPACE, UPPER, WORD, flag_table, width


@functools.cache
def cut_table(pattern: str) -> np.ndarray:
    """Flags by which `find_cut` cuts a text that is not normalised yet: uint8 [CODE_POINTS]."""
    flags = flag_table(pattern)
    if pattern == "metaspace":
        flags = flags.copy()
        flags[ord(" ")] = SPACE
    elif pattern == "qwen2":
        flags = np.where(unicode_table.normal_forms() == unicode_table.STABLE, flags, LOWER).astype(np.uint8)
    flags.flags.writeable = False
    return flags


@no_type_check
@kernel
def may_cut(before, after, byte):
    """Whether a text may be cut between characters of such flags, of which the second begins with `byte`."""
    return before & (WORD | CJK) and not after & (WORD | UPPER | LOWER | CJK) and byte != 39


@no_type_check
@kernel
def last_cut(text, flags, start, stop):
    """The last place above `start` and below `stop` where a classified text may be cut, or 0."""
    for k in range(stop - 1, start, -1):
        if may_cut(flags[k - 1], flags[k], text[k]):
            return k
    return 0


@no_type_check
@kernel
def _flags_at(text, i, end, table):
    """The flags of the character that begins at `text[i]`, all of them if it is none."""
    lead = np.int64(text[i])
    if lead < 0x80:
        return table[lead]
    length = width(text, i)
    if lead < 0xC2 or lead > 0xF4 or i + length > end:
        return np.uint8(0xFF)
    point = lead & (0x7F >> length)
    for k in range(1, length):
        if text[i + k] & 0xC0 != 0x80:
            return np.uint8(0xFF)
        point = point << 6 | np.int64(text[i + k] & 0x3F)
    return table[point] if point < len(table) else np.uint8(0xFF)


@no_type_check
@kernel
def find_cut(text, start, target, end, table):
    """The first place from `target` on (which is above `start`) where `text[start:end]` may be cut, or `end`.

    The text need not be UTF-8: a place beside bytes that are not is none.
    """
    i = target
    while i < end and text[i] & 0xC0 == 0x80:
        i += 1
    if i >= end:
        return end
    k = i - 1
    while k > start and text[k] & 0xC0 == 0x80:
        k -= 1
    before = _flags_at(text, k, i, table)
    while i < end:
        after = _flags_at(text, i, end, table)
        if before != 0xFF and after != 0xFF and may_cut(before, after, text[i]):
            return i
        before = after
        i += width(text, i)
    return end
