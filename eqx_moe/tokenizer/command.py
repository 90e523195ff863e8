"""`eqx-moe tokenizer train`, `count` and `merge-counts`."""

# What trains is imported by the commands, not here: `--help` and wrong usage answer at once.
import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

_PATTERN = "gpt2, llama3 (the default), qwen2, o200k, deepseek_v3, metaspace; or a regular expression, which is slower"
_DEFAULT = "llama3"
_FILES = "text in UTF-8, also as .gz or .zst; a file is a document"


def add_commands(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `tokenizer` and its commands to the parser of `eqx-moe`; `add` is `cli._command`."""
    summary = "Train a tokenizer (byte-pair encoding) on text; count words on many machines and add the counts up."
    group = commands.add_parser("tokenizer", help=summary, description=summary)
    commands = group.add_subparsers(metavar="COMMAND", required=True)

    train = add(
        commands,
        "train",
        _train,
        "Train a tokenizer, with the vocabulary and merges of Hugging Face's trainer. If it is interrupted, the same "
        "command goes on from what is counted.",
        [
            "eqx-moe tokenizer train books/*.txt --vocab-size 32000 --pattern llama3 --out tokenizer.json",
            "eqx-moe tokenizer train a.txt.gz b.txt --special-tokens '<s>' '</s>' --eos-token '</s>' --out folder",
            "eqx-moe tokenizer train --from-counts all.counts --vocab-size 16000 32000 64000 --out tokenizer.json",
        ],
    )
    train.add_argument("files", nargs="+", metavar="FILE", help=_FILES)
    train.add_argument("--out", required=True, type=_named, help="a file ending in .json, or a folder")
    train.add_argument(
        "--vocab-size",
        nargs="+",
        type=int,
        default=[32_000],
        metavar="N",
        help="tokens (32000); several sizes give several tokenizers from one run, with the size in their names",
    )
    _add_cutting(train)
    train.add_argument("--from-counts", action="store_true", help="FILE... are counts; they know their pattern")
    train.add_argument("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="the first ids, in this order")
    for name in ("bos", "eos", "pad", "unk"):
        train.add_argument(f"--{name}-token", metavar="TOKEN", help="one of these, for transformers; needs a folder")
    train.add_argument("--chat-template", type=pathlib.Path, metavar="FILE", help="a Jinja template, for a folder")
    train.add_argument("--min-frequency", type=int, default=0, metavar="N", help="merge no pair that is rarer (0)")
    train.add_argument("--max-token-length", type=int, metavar="N", help="merges have fewer characters, or bytes")
    train.add_argument("--limit-alphabet", type=int, metavar="N", help="the most frequent characters only")
    train.add_argument(
        "--report",
        nargs="?",
        const="-",
        metavar="FILE",
        help="say how well it compresses: on a page, a file ending in .html, or here",
    )

    count = add(
        commands,
        "count",
        _count,
        "Count the words of texts, to be trained from later or elsewhere. If it is interrupted, the same command goes "
        "on from what is counted.",
        ["eqx-moe tokenizer count part-00*.txt --pattern llama3 --out part-00.counts"],
    )
    count.add_argument("files", nargs="+", metavar="FILE", help=_FILES)
    count.add_argument("--out", required=True, type=_named, metavar="FILE", help="the counts")
    _add_cutting(count)

    merge = add(
        commands,
        "merge-counts",
        _merge_counts,
        "Add counts up.",
        ["eqx-moe tokenizer merge-counts part-*.counts --out all.counts"],
    )
    merge.add_argument("files", nargs="+", metavar="FILE", help="counts")
    merge.add_argument("--out", required=True, type=_named, metavar="FILE", help="the sum")


def _named(path: str) -> pathlib.Path:
    """A path that ends in a name, beside which there may be others; `.` has none."""
    found = pathlib.Path(path)
    return found if found.name not in ("", "..") else pathlib.Path(os.path.abspath(found))


def _add_cutting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pattern", metavar="PATTERN", help=_PATTERN)
    parser.add_argument("--lines", action="store_true", help="each line is a document of its own")
    parser.add_argument("--threads", type=int, metavar="N", help="how many (one for each core)")
    parser.add_argument("--max-memory", metavar="SIZE", help="such as 8GB; what does not fit goes to disk")


def _train(args: argparse.Namespace) -> None:
    from eqx_moe.tokenizer.counts_file import add_counts, read_all
    from eqx_moe.tokenizer.export import check_out, save_tokenizer
    from eqx_moe.tokenizer.report import as_page, as_terminal, make_report
    from eqx_moe.tokenizer.train import Training
    from eqx_moe.tokenizer.whole import whole_file

    outs = _outs(args.out, args.vocab_size)
    _check_files(args, outs)
    template = args.chat_template.read_text() if args.chat_template else None
    named = {name: getattr(args, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    check_out(args.out, *named.values(), template)
    if args.from_counts and (args.pattern is not None or args.lines):
        raise ValueError("--pattern and --lines are settled where words are counted; leave them out here.")
    counted = read_all(args.files) if args.from_counts else None
    pattern = counted[0].pattern if counted else _pattern(args)
    training = Training(
        args.vocab_size, pattern, args.special_tokens, args.min_frequency, args.max_token_length,
        limit_alphabet=args.limit_alphabet, threads=args.threads, max_memory=args.max_memory,
    )  # fmt: skip
    for token in filter(None, named.values()):
        if token not in training.special_tokens:
            raise ValueError(f"a named token must be among --special-tokens; got {token!r}, which is not.")
    with contextlib.ExitStack() as stack:
        if counted:
            folder = tempfile.gettempdir() if args.max_memory else None
            words = add_counts([part.words for part in counted], folder)
        else:
            words = stack.enter_context(_counted(args, pattern))
        try:
            merges = training.merge(words)
        except KeyboardInterrupt:
            if counted:
                print("\nthe counts are as they were: the same command merges again, from the start", file=sys.stderr)
            raise
        for out, tokenizer in zip(outs, training.tokenizers(merges), strict=True):
            save_tokenizer(tokenizer, out, chat_template=template, **named)
            print(f"{tokenizer.get_vocab_size():,} tokens: {out}")
        if args.report:
            report = make_report(
                words, merges, characters=pattern == "metaspace", special_tokens=training.special_tokens
            )
            if args.report == "-":
                print(as_terminal(report), end="")
            else:
                with whole_file(args.report) as file:
                    file.write(as_page(report).encode())


def _count(args: argparse.Namespace) -> None:
    from eqx_moe.tokenizer.counts_file import Counted, write_counts

    _check_writable(args.out)
    _refuse_input("--out", args.out, args.files)
    pattern = _pattern(args)
    with _counted(args, pattern) as words:
        write_counts(args.out, Counted(words, pattern, args.lines))
    print(f"{len(words):,} different words, {int(words.counts.sum()):,} in all: {args.out}")


def _pattern(args: argparse.Namespace) -> str:
    return _DEFAULT if args.pattern is None else args.pattern


def _counted(args: argparse.Namespace, pattern: str) -> contextlib.AbstractContextManager[Any]:
    """The counts of the files, which an interruption does not lose."""
    from eqx_moe.tokenizer.resuming import counted_files

    return counted_files(
        args.files, pattern, out=args.out, lines=args.lines, threads=args.threads, max_memory=args.max_memory
    )


def _merge_counts(args: argparse.Namespace) -> None:
    from eqx_moe.tokenizer.counts_file import merge_counts

    _check_writable(args.out)
    _refuse_input("--out", args.out, args.files)
    words = merge_counts(args.files, args.out).words
    print(f"{len(words):,} different words, {int(words.counts.sum()):,} in all: {args.out}")


def _outs(out: pathlib.Path, sizes: Sequence[int]) -> list[pathlib.Path]:
    """What is written for each size. `my-v1.5` is a folder and has no suffix: only .json stays at the end."""
    if len(sizes) == 1:
        return [out]
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"--vocab-size must be sizes that differ; got {' '.join(map(str, sizes))}.")
    suffix = ".json" if out.suffix == ".json" else ""
    return [out.with_name(f"{out.name.removesuffix(suffix)}-{size}{suffix}") for size in sizes]


# --- What is refused before hours of counting ------------------------------------------------------------------------


def _check_files(args: argparse.Namespace, outs: Sequence[pathlib.Path]) -> None:
    """Refuses files that could not be written, that would replace what is read, or that an option has swallowed."""
    first = "Name the files first, or in front of the options."
    for token in args.special_tokens:
        if os.path.isfile(token):
            raise ValueError(f"--special-tokens takes all that follows it; got {token!r}, which is a file. {first}")
    read = [*args.files, *filter(None, [args.chat_template])]
    for out in outs:
        _check_writable(out, folder=out.suffix != ".json")
        _refuse_input("--out", out, read)
    if args.report not in (None, "-"):
        report = pathlib.Path(args.report)
        if report.suffix.lower() != ".html":
            raise ValueError(f"--report must be a file ending in .html, or have none; got {args.report!r}. {first}")
        _refuse_input("--report", report, read)
        folders = {out.absolute() for out in outs if out.suffix != ".json"}
        if report.absolute() in folders:
            raise ValueError(f"--report must be another file than --out; got {args.report!r} for both.")
        if report.parent.is_dir() or report.absolute().parent not in folders:  # Which will be made.
            _check_writable(report)


def _check_writable(out: pathlib.Path, *, folder: bool = False) -> None:
    """Refuses what could not be written. `folder`: `out` is to be a folder, which may be there."""
    if folder and out.exists() and not out.is_dir():
        raise NotADirectoryError(20, "a file, where without .json at its end --out is a folder", str(out))
    if not folder and out.is_dir():
        raise IsADirectoryError(21, "a folder, where a file is to be written; name another file", str(out))
    parent = out.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(2, "no such folder", str(parent))
    for place in (parent, out) if folder and out.is_dir() else (parent,):
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write", str(place))


def _refuse_input(option: str, out: pathlib.Path, files: Sequence[str | pathlib.Path]) -> None:
    """Refuses to write over a file that is read, whatever it is called there."""
    if out.exists() and any(os.path.exists(file) and os.path.samefile(out, file) for file in files):
        raise ValueError(f"{option} must not be a file that is read; got {str(out)!r}, which would be lost.")
