"""python -m convert.to_mistral SRC DST: a Hugging Face folder -> Mistral's own layout."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from convert.command import add_target, command, new_folder
from convert.folders import json_bytes, open_folder, small_files
from convert.mistral import CONSOLIDATED, PARAMS, config_of, names, open_mistral, params_of, reordered, to_pairs
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
        generation = files.pop("generation_config.json", None)
        with new_folder(args.target):
            leaves = reordered(source.leaves, source.config, to_pairs)
            save_leaves(args.target, leaves, names(source.config), max_shard_size=_ONE_FILE, other_files=files)
            # What has checksums of the file has them under its name.
            (args.target / CHECKSUMS).unlink(missing_ok=True)
            # Last: until then the folder is none that anything loads.
            os.rename(args.target / SINGLE, args.target / CONSOLIDATED)
            print(written(source, args.target))
            if unsaid := _unsaid(source.config):
                print(f"not in params.json, which has no place for them: {unsaid}")
            if generation is not None:
                print("left out: 'generation_config.json', which the layout does not have")
            if args.verify:
                verify(source, open_mistral(args.target))


def _unsaid(config: Any) -> str:
    """What who reads params.json will take otherwise, because it has no place there."""
    again = config_of(params_of(config), PARAMS)
    # Said, if in other words.
    names = {field.name for field in dataclasses.fields(config)} - {"head_dim", "rope_parameters"}
    odd = [name for name in sorted(names) if getattr(config, name) != getattr(again, name)]
    return ", ".join(f"{name} {getattr(config, name)!r} (will be read as {getattr(again, name)!r})" for name in odd)


if __name__ == "__main__":
    sys.exit(main())
