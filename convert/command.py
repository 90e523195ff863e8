"""What the programs have in common: usage, and where a result may go. `eqx_moe.cli.run_command` runs them."""

import argparse
import contextlib
import os
import pathlib
import textwrap
from collections.abc import Iterator, Sequence

from eqx_moe.checkpoint.dtypes import FORMAT_NAMES
from eqx_moe.cli import nothing_half_made
from eqx_moe.errors import CheckpointError
from eqx_moe.sizes import parse_size


def command(name: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the argument SRC; what a program needs besides is added to it."""
    parser = argparse.ArgumentParser(
        prog=f"python -m convert.{name}",
        description=description,
        epilog="examples:\n" + textwrap.indent("\n".join(examples), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=pathlib.Path, help="a checkpoint folder")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def add_target(parser: argparse.ArgumentParser) -> None:
    """The arguments of a program that writes a checkpoint."""
    parser.add_argument("target", metavar="DST", type=pathlib.Path, help="the folder to write: an empty or a new one")
    parser.add_argument(
        "--dtype",
        choices=sorted(map(str, FORMAT_NAMES)),
        default="auto",
        help="cast all weights but those that the family keeps in float32 (as they are stored; FP8 becomes bfloat16)",
    )
    parser.add_argument("--verify", action="store_true", help="read the result again and compare it bit for bit")


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="bytes of a file at most (%(default)s)"
    )


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[None]:
    """Wants a folder that is empty or not there yet. If what follows fails, folders made for it go again.

    Raises:
        CheckpointError: CFG-FOLDER if there is something else.
    """
    # A killed conversion leaves hidden files, which the next one makes again.
    taken = [entry.name for entry in target.iterdir() if entry.name[0] != "."] if target.is_dir() else []
    if taken or (os.path.lexists(target) and not target.is_dir()):
        raise CheckpointError(
            code="CFG-FOLDER",
            doing="converting",
            file=str(target),
            expected="a folder that is empty or not there yet",
            found="one that holds files" if taken else "something else of that name",
            fix="name another DST, or remove it",
        )
    with nothing_half_made(target):
        yield


def _size(text: str) -> str:
    """An argparse type: `5GB` is one."""
    try:
        parse_size(int(text) if text.isdigit() else text, "--max-shard-size")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
