"""Whether a text is in normal form C already: then it need not be copied."""

from typing import no_type_check

import numpy as np

from eqx_moe.compiled import kernel
from eqx_moe.tokenizer import unicode_table
from eqx_moe.tokenizer.flags import PADDING, classify
from eqx_moe.tokenizer.machine import load64

_HIGH = np.uint64(0x8080808080808080)
_BLOCK = 1 << 14


@no_type_check
@kernel
def _is_composed(text, begin, end, table):
    """Whether no character of `text[begin:end]` may change. Bytes that are not UTF-8 do not count as a change."""
    forms = np.zeros(_BLOCK + PADDING, np.uint8)
    reordering_before = False
    while begin < end:
        if begin + 8 <= end and load64(text, begin) & _HIGH == 0:
            reordering_before = False
            begin += 8
            continue
        block = text[begin : min(end, begin + _BLOCK)]
        known = classify(block, 0, len(block), table, forms)
        known = len(block) if known < 0 else known
        if known == 0:
            return True  # Not UTF-8: counting says so.
        for k in range(known):
            if block[k] & 0xC0 == 0x80:
                continue
            if forms[k] == unicode_table.CHANGING or (forms[k] and reordering_before):
                return False
            reordering_before = forms[k] != 0
        begin += known
    return True


def is_composed(text: np.ndarray, begin: int, end: int) -> bool:
    """Whether NFC certainly leaves `text[begin:end]` alone; False may be wrong.

    A mark that canonical order may move is fine as long as no other such mark is beside it.
    """
    return bool(_is_composed(text, begin, end, unicode_table.normal_forms()))
