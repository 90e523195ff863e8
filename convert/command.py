"""What the programs have in common: usage, exit status, errors in one short paragraph, where a result may go."""

import argparse
import contextlib
import os
import pathlib
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence

from eqx_moe.checkpoint.dtypes import FORMAT_NAMES
from eqx_moe.checkpoint.writer import parse_size
from eqx_moe.errors import CheckpointError, EqxMoeError


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


def run(
    parser: argparse.ArgumentParser, do: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None
) -> int:
    """Runs a command line and returns its exit status: 0, 1 (failed), 2 (wrong usage), 130 (Ctrl-C)."""
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said why.
        return stop.code if isinstance(stop.code, int) else 2

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"{parser.prog}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            do(args)
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"{parser.prog}: {_describe(error)}", file=sys.stderr)
        return 1


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
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _size(text: str) -> str:
    """An argparse type: `5GB` is one."""
    try:
        parse_size(int(text) if text.isdigit() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace("`max_shard_size` ", "")) from error
    return text


def _describe(error: Exception) -> str:
    if isinstance(error, (EqxMoeError, ValueError)):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    # Not one that was foreseen: the first line of what it says, and how to see the rest.
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]} (--debug shows where)"
