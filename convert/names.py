"""python -m convert.names SRC: the expanded name table of a checkpoint."""

import argparse
import sys
from collections.abc import Iterator, Sequence

from convert.command import command
from eqx_moe.checkpoint.matching import match
from eqx_moe.checkpoint.names import Part, leaf_paths, matcher
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.shards import open_weights
from eqx_moe.cli import run_command
from eqx_moe.hub import TIED, load_config
from eqx_moe.models import family_of, skeleton

_DESCRIPTION = """\
Print a row for each tensor of a checkpoint: what it is in the model, its name in the files, its shape and its dtype.
No weights are read; a tensor that is missing, or that the model has not, is an error that names it."""
_EXAMPLES = [
    "python -m convert.names examples/assets/shakespeare-moe",
    "python -m convert.names Mixtral-8x7B-v0.1 | grep 'layers.0.moe'",
]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(command("names", _DESCRIPTION, _EXAMPLES), _print, arguments)


def _print(args: argparse.Namespace) -> None:
    rows = [("ours", "theirs", "shape", "dtype"), *_rows(args.source)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _rows(folder) -> Iterator[tuple[str, str, str, str]]:
    config = load_config(folder)
    family = family_of(config)
    tied = TIED if config.tie_word_embeddings else ()
    leaves = leaf_paths(skeleton(config))
    with open_weights(folder) as stored:
        readable = decoded(stored)
        tensors = match(
            folder, leaves, family.names(config), readable, skipped=family.skipped(config), tied=tied, one_dtype=False
        )
        for name, tensor in tensors.items():
            yield " + ".join(map(_ours, tensor.parts)), name, *_form(stored[name].entry)
        for name, original in tied:
            if name in stored:
                yield f"= {original}", name, *_form(stored[name].entry)
        for skipped in family.skipped(config):
            for name in filter(matcher(skipped.theirs).fullmatch, stored):
                yield f"- ({skipped.reason})", name, *_form(stored[name].entry)
        for name in sorted(stored.keys() - readable.keys()):
            yield "scales, decoded on read", name, *_form(stored[name].entry)


def _ours(part: Part) -> str:
    return part.leaf + "".join(f"[{i}]" for i in part.index)


def _form(entry) -> tuple[str, str]:
    return " x ".join(map(str, entry.shape)), entry.dtype


if __name__ == "__main__":
    sys.exit(main())
