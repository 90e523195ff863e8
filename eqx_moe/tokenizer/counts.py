"""Words and how often each occurs: what counting hands to merging."""

import os
import tempfile
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


def large_array(length: int, dtype: type, folder: str | os.PathLike[str] | None) -> np.ndarray:
    """An array in memory, or with a `folder` in a mapped file there, which has no name and goes with the array."""
    if folder is None or length == 0:
        return np.empty(length, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, "w+", shape=length).view(np.ndarray)
