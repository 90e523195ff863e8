"""python -m convert.to_mistral SRC DST: a Hugging Face folder -> Mistral's own layout."""

import argparse
import os
import sys
from collections.abc import Sequence

from convert.command import add_target, command, new_folder
from convert.folders import json_bytes, open_folder, small_files
from convert.mistral import CONSOLIDATED, PARAMS, names, open_mistral, params_of, reordered, to_pairs
from convert.rewriting import verify, written
from eqx_moe.checkpoint.checksums import CHECKSUMS
from eqx_moe.checkpoint.shards import SINGLE
from eqx_moe.checkpoint.writer import save_leaves
from eqx_moe.cli import run_command

_DESCRIPTION = """\
Write a Mistral or a Mixtral in Mistral's own layout, consolidated.safetensors and params.json, from a Hugging Face
folder in any layout. The inverse of `convert.from_mistral`. The layout is one file; memory holds one tensor."""
_EXAMPLES = [
    "python -m convert.to_mistral Mixtral-8x7B-v0.1 consolidated",
    "python -m convert.to_mistral Mixtral-8x7B-v0.1 consolidated --dtype bfloat16 --verify",
]
_ONE_FILE = 2**63


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("to_mistral", _DESCRIPTION, _EXAMPLES)
    add_target(parser)
    return run_command(parser, _convert, arguments)


def _convert(args: argparse.Namespace) -> None:
    with open_folder(args.source, args.dtype) as source:
        files = small_files(args.source) | {PARAMS: json_bytes(params_of(source.config))}
        files.pop("generation_config.json", None)
        with new_folder(args.target):
            leaves = reordered(source.leaves, source.config, to_pairs)
            save_leaves(args.target, leaves, names(source.config), max_shard_size=_ONE_FILE, other_files=files)
            # What has checksums of the file has them under its name.
            (args.target / CHECKSUMS).unlink(missing_ok=True)
            # Last: until then the folder is none that anything loads.
            os.rename(args.target / SINGLE, args.target / CONSOLIDATED)
            print(written(source, args.target))
            if args.verify:
                verify(source, open_mistral(args.target))


if __name__ == "__main__":
    sys.exit(main())
