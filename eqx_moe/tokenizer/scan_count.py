"""The kernels that count: text is classified, cut into words and counted, block by block, in one call."""

from typing import no_type_check

import numpy as np
from numba import njit

from eqx_moe.compiled import kernel
from eqx_moe.tokenizer import scanners
from eqx_moe.tokenizer.cutting import last_cut
from eqx_moe.tokenizer.flags import PADDING, classify
from eqx_moe.tokenizer.machine import copy
from eqx_moe.tokenizer.word_table import add_pieces

#: How many bytes are looked at together, if the text can be cut so, and how many words: what near caches hold.
_BLOCK = 1 << 15
_PIECES = 1 << 11

#: Why a kernel came back.
DONE, NO_ROOM, NOT_UTF8 = range(3)


@no_type_check
@njit(nogil=True)
def _count(split, text, bounds, by_line, begin, table, slots, records, arena, state):
    """Count the words of the documents `text[bounds[d] : bounds[d + 1]]`, from the place `begin` on.

    `by_line`: each line is a document of its own, its end included.

    Returns:
        Why it came back; where: everything before is counted; and with NO_ROOM the length of the word there. With
        NOT_UTF8, the place of the first byte that begins no character (what is before may be counted or not).
    """
    flags = np.zeros(2 * _BLOCK + PADDING, np.uint8)
    ends = np.empty(_PIECES, np.int64)
    for document in range(len(bounds) - 1):
        end = bounds[document + 1]
        while begin < end:
            block = text[begin:end]
            known, stop = 0, 0
            while stop == 0:
                reach = min(len(block), known + _BLOCK)
                if reach < len(block):
                    for _ in range(3):  # Not between the bytes of a character.
                        if block[reach] & 0xC0 == 0x80:
                            reach -= 1
                if reach + PADDING > len(flags):
                    larger = np.zeros(2 * reach + PADDING, np.uint8)
                    copy(flags, 0, larger, 0, known)
                    flags = larger
                wrong = classify(block, known, reach, table, flags)
                if wrong >= 0:
                    return NOT_UTF8, begin + wrong, 0
                stop = reach if reach == len(block) else last_cut(block, flags, max(known - 1, 0), reach)
                known = reach
            here = 0
            while here < stop:
                line_end = stop
                if by_line:
                    line_end = here
                    while line_end < stop and block[line_end] != 10:
                        line_end += 1
                    line_end = min(line_end + 1, stop)
                while here < line_end:
                    number = split(block, flags, here, line_end, ends)
                    counted = add_pieces(block, here, ends, number, slots, records, arena, state)
                    if counted < number:
                        here = ends[counted - 1] if counted else here
                        return NO_ROOM, begin + here, ends[counted] - here
                    here = ends[number - 1]
            begin += stop
    return DONE, begin, 0


@no_type_check
@kernel
def count_gpt2(text, bounds, by_line, begin, table, slots, records, arena, state):
    return _count(scanners.split_gpt2, text, bounds, by_line, begin, table, slots, records, arena, state)


@no_type_check
@kernel
def count_llama3(text, bounds, by_line, begin, table, slots, records, arena, state):
    return _count(scanners.split_llama3, text, bounds, by_line, begin, table, slots, records, arena, state)


@no_type_check
@kernel
def count_qwen2(text, bounds, by_line, begin, table, slots, records, arena, state):
    return _count(scanners.split_qwen2, text, bounds, by_line, begin, table, slots, records, arena, state)


@no_type_check
@kernel
def count_o200k(text, bounds, by_line, begin, table, slots, records, arena, state):
    return _count(scanners.split_o200k, text, bounds, by_line, begin, table, slots, records, arena, state)


@no_type_check
@kernel
def count_deepseek_v3(text, bounds, by_line, begin, table, slots, records, arena, state):
    return _count(scanners.split_deepseek_v3, text, bounds, by_line, begin, table, slots, records, arena, state)


@no_type_check
@kernel
def count_metaspace(text, bounds, by_line, begin, table, slots, records, arena, state):
    return _count(scanners.split_metaspace, text, bounds, by_line, begin, table, slots, records, arena, state)


KERNELS = {
    "gpt2": count_gpt2,
    "llama3": count_llama3,
    "qwen2": count_qwen2,
    "o200k": count_o200k,
    "deepseek_v3": count_deepseek_v3,
    "metaspace": count_metaspace,
}
