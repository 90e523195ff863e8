"""Words and how often each occurs: what counting hands to merging."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WordCounts:
    """Distinct words, each as UTF-8, and how often each was seen.

    `text` is uint8 [bytes], the words one after another; word i is `text[offsets[i] : offsets[i + 1]]`; `offsets` is
    int64 [words + 1]; `counts` is int64 [words], all at least 1. Words are in bytewise order, so that equal counts are
    equal arrays whatever the order of counting.
    """

    text: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to. Kernels are compiled for these, as files are mapped so."""
    view = array.view()
    view.flags.writeable = False
    return view
