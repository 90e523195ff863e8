"""Hugging Face folders as streams: opened leaf by leaf, written anew in another layout or dtype, compared."""

import collections
import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eqx_moe.checkpoint.files import open_plain
from eqx_moe.checkpoint.names import leaf_paths
from eqx_moe.checkpoint.progress import progress
from eqx_moe.checkpoint.streaming import Unread, open_leaves
from eqx_moe.checkpoint.writer import save_leaves
from eqx_moe.errors import EqxMoeError
from eqx_moe.hub import TIED, load_config
from eqx_moe.models import config_to_json, family_of, skeleton

# What else than weights goes along: tokenizers, templates, licences, cards. Code never does.
_ALONG = re.compile(r"[^.].*\.(json|jinja|txt|model|model\.v\d+|tiktoken|md)|(LICENSE|LICENCE|NOTICE|USE_POLICY).*")
_LEFT = re.compile(r"config\.json|params\.json|eqx_moe\.json|.*\.index\.json")
_MAX_ALONG = 512_000_000  # bytes, as for a tokenizer.json


@dataclass(frozen=True)
class Source:
    """An open checkpoint: its config, and its leaves, which are in the files yet."""

    folder: pathlib.Path
    config: Any
    leaves: Mapping[str, Unread]

    @property
    def size(self) -> int:
        """Bytes of the leaves, in the dtypes that they are read in."""
        return sum(_bytes(leaf) for leaf in self.leaves.values())


@contextlib.contextmanager
def open_folder(folder: pathlib.Path, dtype: str = "auto") -> Iterator[Source]:
    """A Hugging Face folder in any layout or container that `eqx_moe` reads; `CheckpointError` if it reads it not."""
    config = load_config(folder)
    family = family_of(config)
    with open_leaves(
        folder,
        leaf_paths(skeleton(config)),
        family.names(config),
        skipped=family.skipped(config),
        tied=TIED if config.tie_word_embeddings else (),
        dtype=dtype,
        keep_fp32=family.keep_fp32,
    ) as leaves:
        yield Source(folder, config, leaves)


def write_folder(source: Source, target: pathlib.Path, layout: str, max_shard_size: int | str) -> None:
    """Writes a checkpoint as a Hugging Face folder, with the small files that lie beside the source's weights."""
    files = small_files(source.folder)
    files["config.json"] = json_bytes(config_to_json(source.config, most_common_dtype(source)))
    names = family_of(source.config).names(source.config)[layout]
    save_leaves(target, source.leaves, names, max_shard_size=max_shard_size, other_files=files)


def compare(one: Source, other: Source) -> None:
    """Wants all leaves equal, bit for bit; `EqxMoeError` names the first that is not."""
    with progress("verifying", one.size) as bar:
        for path, leaf in one.leaves.items():
            twin = other.leaves[path]
            for index in entries(leaf):
                ours, theirs = leaf.read(index), twin.read(index)
                if ours.dtype != theirs.dtype or ours.tobytes() != theirs.tobytes():
                    at = "".join(f"[{i}]" for i in index)
                    raise EqxMoeError(f"{path}{at} of {other.folder} is not what {one.folder} has: check the disk.")
                bar.update(ours.nbytes)


def entries(leaf: Unread) -> list[tuple[int, ...]]:
    """What to read of a leaf one after another: a stack's entries, or all at once."""
    return [(i,) for i in range(leaf.shape[0])] if len(leaf.shape) > 2 else [()]


def most_common_dtype(source: Source) -> str:
    """The dtype of most bytes: what config.json says."""
    sizes: collections.Counter[str] = collections.Counter()
    for leaf in source.leaves.values():
        sizes[leaf.dtype.name] += _bytes(leaf)
    return sizes.most_common(1)[0][0]


def small_files(folder: pathlib.Path) -> dict[str, bytes]:
    """What goes along unchanged: name -> content."""
    files = {}
    for entry in sorted(folder.iterdir()):
        if _ALONG.fullmatch(entry.name) and not _LEFT.fullmatch(entry.name) and entry.is_file():
            with open_plain(entry, code="CFG-FILE", doing="converting") as file:
                if os.fstat(file.fileno()).st_size <= _MAX_ALONG:
                    files[entry.name] = file.readall()
    return files


def left_out(folder: pathlib.Path) -> list[str]:
    """The files beside the weights that do not go along."""
    kept = (_ALONG, _LEFT, re.compile(r"\..*|.*\.safetensors"))
    return sorted(e.name for e in folder.iterdir() if not any(pattern.fullmatch(e.name) for pattern in kept))


def json_bytes(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=2, allow_nan=False).encode() + b"\n"


def _bytes(leaf: Unread) -> int:
    size = leaf.dtype.itemsize
    for length in leaf.shape:
        size *= length
    return size
