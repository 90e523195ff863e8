"""The programs that write a Hugging Face folder anew: `from_hf` and `to_hf` differ in the layout alone."""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager

from convert.command import add_shard_size, add_target, command, new_folder
from convert.folders import Source, compare, left_out, most_common_dtype, open_folder, write_folder
from eqx_moe.cli import run_command


def rewrite(name: str, description: str, examples: Sequence[str], layout: str, arguments: Sequence[str] | None) -> int:
    """The program `convert.NAME`, which writes in `layout`."""
    parser = command(name, description, examples)
    add_target(parser)
    add_shard_size(parser)

    def do(args: argparse.Namespace) -> None:
        with open_folder(args.source, args.dtype) as source, new_folder(args.target):
            write_folder(source, args.target, layout, args.max_shard_size)
            print(written(source, args.target))
            if args.verify:
                verify(source, open_folder(args.target))

    return run_command(parser, do, arguments)


def verify(source: Source, opened: AbstractContextManager[Source]) -> None:
    """Reads what was written, and wants it equal to what it was made of."""
    with opened as result:
        compare(source, result)
    print(f"verified: {len(source.leaves)} arrays, bit for bit")


def written(source: Source, target) -> str:
    """What was done, in a line or two."""
    text = f"{source.size:,} bytes of {most_common_dtype(source)} written to {target}"
    others = left_out(source.folder)
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        text += f"\nleft out: {', '.join(map(repr, others[:8]))}{more}"
    return text
