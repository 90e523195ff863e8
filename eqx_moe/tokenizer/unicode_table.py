"""The class of every code point, pinned: what `\\p{L}`, `\\p{N}`, `\\s` and so on are when a text is cut into words.

Neither `unicodedata` (its version is Python's) nor the `regex` package (another version again) is asked at run time.
The tables are what `tokenizers` itself answers, written down by tests/make_unicode_table.py.
"""

import base64
import functools
import zlib

import numpy as np

UNICODE_VERSION = "16.0"
CODE_POINTS = 0x110000

#: Classes: a partition of all code points.
OTHER, WHITESPACE, NEWLINE, UPPER, LOWER, LETTER, MARK, NUMBER, PUNCTUATION, SYMBOL = range(10)

#: What NFC may do to a code point: leave it alone whatever stands beside it; move it past another mark; or replace it
#: or join it with what stands before it.
STABLE, REORDERING, CHANGING = range(3)


def _expand(packed: bytes) -> np.ndarray:
    """uint8 [CODE_POINTS] from what tests/make_unicode_table.py writes: differences of runs' starts, then values."""
    steps, values = np.frombuffer(zlib.decompress(base64.b85decode(packed)), "<u4").reshape(2, -1)
    starts = np.cumsum(steps, dtype=np.int64)
    table = np.repeat(values.astype(np.uint8), np.diff(starts, append=CODE_POINTS))
    table.flags.writeable = False
    return table


@functools.cache
def classes() -> np.ndarray:
    """The class of each code point: uint8 [CODE_POINTS]. Surrogates are `OTHER`; UTF-8 has none."""
    from eqx_moe.tokenizer.unicode_runs import CLASSES

    return _expand(CLASSES)


@functools.cache
def normal_forms() -> np.ndarray:
    """What NFC may do to each code point: uint8 [CODE_POINTS]."""
    from eqx_moe.tokenizer.unicode_runs import NORMAL_FORMS

    return _expand(NORMAL_FORMS)
