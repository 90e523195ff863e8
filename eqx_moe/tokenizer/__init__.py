"""Train byte-pair encodings: natively, on every core, with the vocabulary and merges of Hugging Face `tokenizers`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eqx_moe.tokenizer.count import count_files as count_files
    from eqx_moe.tokenizer.count import count_texts as count_texts
    from eqx_moe.tokenizer.counts import WordCounts as WordCounts
    from eqx_moe.tokenizer.counts_file import Counted as Counted
    from eqx_moe.tokenizer.counts_file import merge_counts as merge_counts
    from eqx_moe.tokenizer.counts_file import read_counts as read_counts
    from eqx_moe.tokenizer.counts_file import write_counts as write_counts
    from eqx_moe.tokenizer.export import save_tokenizer as save_tokenizer
    from eqx_moe.tokenizer.train import train_bpe as train_bpe
    from eqx_moe.tokenizer.train import train_bpe_from_counts as train_bpe_from_counts
    from eqx_moe.tokenizer.train import train_bpe_from_iterator as train_bpe_from_iterator

# The same list for run time. Numba is only loaded when one of these is used.
_PUBLIC = {
    "Counted": "counts_file",
    "WordCounts": "counts",
    "count_files": "count",
    "count_texts": "count",
    "merge_counts": "counts_file",
    "read_counts": "counts_file",
    "save_tokenizer": "export",
    "train_bpe": "train",
    "train_bpe_from_counts": "train",
    "train_bpe_from_iterator": "train",
    "write_counts": "counts_file",
}


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {sorted(_PUBLIC)}.")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*_PUBLIC]
