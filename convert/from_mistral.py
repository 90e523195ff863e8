"""python -m convert.from_mistral SRC DST: Mistral's own layout -> a Hugging Face folder."""

import argparse
import sys
from collections.abc import Sequence

from convert.command import add_shard_size, add_target, command, new_folder
from convert.folders import open_folder, write_folder
from convert.mistral import open_mistral
from convert.rewriting import verify, written
from eqx_moe.cli import run_command

_DESCRIPTION = """\
Write a folder that eqx_moe and transformers load from one in Mistral's own layout: consolidated*.safetensors and
params.json, a Mistral or a Mixtral. The first Mixtral files, with stacks block_sparse_moe.w1, .w2, .w3, are read once
they are safetensors: a pickle never is. `convert.to_mistral` goes back. What params.json does not say is the length of
texts (32,768 are taken) and special ids (1 begins a text and 2 ends it). Memory holds one tensor, never the model."""
_EXAMPLES = [
    "python -m convert.from_mistral mixtral-8x22b-v0.3 Mixtral-8x22B",
    "python -m convert.from_mistral mistral-nemo Nemo --dtype bfloat16 --max-shard-size 2GB --verify",
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("from_mistral", _DESCRIPTION, _EXAMPLES)
    add_target(parser)
    add_shard_size(parser)
    return run_command(parser, _convert, arguments)


def _convert(args: argparse.Namespace) -> None:
    with open_mistral(args.source, args.dtype) as source, new_folder(args.target):
        write_folder(source, args.target, "original", args.max_shard_size)
        print(written(source, args.target))
        if args.verify:
            verify(source, open_folder(args.target))


if __name__ == "__main__":
    sys.exit(main())
