"""The `eqx-moe` command."""

# JAX is imported by the commands, not here: `--help` and wrong usage answer at once.
import argparse
import contextlib
import os
import pathlib
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from eqx_moe.errors import CheckpointError, EqxMoeError
from eqx_moe.tokenizer.command import add_commands as add_tokenizer_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an `eqx-moe` command line; see `run_command`."""
    return run_command(_parser(), lambda args: args.run(args), arguments)


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None
) -> int:
    """Runs a command line and returns its exit status: 0, 1 (failed), 2 (wrong usage), 130 (Ctrl-C).

    What a command has to say goes to stdout; errors, warnings and progress go to stderr. The parser has a `--debug`.
    """
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said why.
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with _short_warnings(parser.prog):
            run(args)
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


def _describe(error: Exception) -> str:
    if isinstance(error, (EqxMoeError, ValueError)):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    # Not one that was foreseen: the first line of what it says, and how to see the rest.
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]} (--debug shows where)"


@contextlib.contextmanager
def _short_warnings(prog: str) -> Iterator[None]:
    """Warnings as one line each, without the line of code that they come from."""

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"{prog}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# --- Usage -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eqx-moe", description="Open mixture-of-experts language models: look at them, run them, fine-tune them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "Say what a checkpoint is: its config, its size, its files; and what it takes on many devices. No weights are "
        "read or downloaded, and a folder with nothing but a config.json will do.",
        [
            "eqx-moe inspect examples/assets/shakespeare-moe",
            "eqx-moe inspect mistralai/Mixtral-8x7B-v0.1",
            "eqx-moe inspect MODEL --mesh data=8,expert=8 --batch-size 64 --seq 4096 --dtype bfloat16",
        ],
    )
    inspect.add_argument("model", metavar="MODEL", help="a checkpoint folder, or a repo on the Hub")
    inspect.add_argument(
        "--mesh",
        type=_mesh,
        metavar="AXIS=N,...",
        help="plan training on so many devices along data, expert and tensor: bytes on each, and bytes that each sends",
    )
    inspect.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="rows a step, with --mesh (one for each device that takes rows)",
    )
    inspect.add_argument(
        "--seq", type=_at_least_two, metavar="N", help="tokens a row, with --mesh (2048, or the model's positions)"
    )
    inspect.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights, optimizer state and activations, with --mesh (float32)",
    )

    generate = _command(
        commands,
        "generate",
        _generate,
        "Continue a text. The continuation is written to stdout while it comes.",
        [
            'eqx-moe generate examples/assets/shakespeare-moe --prompt "ROMEO:"',
            'eqx-moe generate MODEL --prompt "Once" --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 3',
        ],
    )
    generate.add_argument("model", metavar="MODEL", help="a checkpoint folder, or a repo on the Hub")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    generate.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="at most so many (%(default)s)"
    )
    generate.add_argument(
        "--temperature",
        type=_not_negative,
        default=0.0,
        metavar="T",
        help="0 takes the most probable token (%(default)s)",
    )
    generate.add_argument("--top-k", type=_positive, metavar="K", help="draw from the K most probable tokens only")
    generate.add_argument(
        "--top-p", type=_share, metavar="P", help="draw from the most probable tokens that make up P together only"
    )
    generate.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the draws (%(default)s)")

    finetune = _command(
        commands,
        "finetune",
        _finetune,
        "Train all weights of a checkpoint on text, with AdamW. The result is OUT/model.",
        [
            "eqx-moe finetune examples/assets/shakespeare-moe --data notes.txt --out tuned",
            "eqx-moe finetune MODEL --data a.jsonl b.jsonl --out tuned --steps 500 --lr 1e-5 --batch-size 16",
        ],
    )
    finetune.add_argument("model", metavar="MODEL", help="a checkpoint folder, or a repo on the Hub")
    finetune.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help='.txt (a file is a document) or .jsonl (a line is an object with the document under "text")',
    )
    finetune.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="OUT", help="a folder; OUT/model is written"
    )
    finetune.add_argument("--steps", type=_positive, default=100, metavar="N", help="training steps (%(default)s)")
    finetune.add_argument("--lr", type=_learning_rate, default=1e-4, help="the highest learning rate (%(default)s)")
    finetune.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="rows a step (%(default)s)")
    finetune.add_argument(
        "--seq", type=_at_least_two, metavar="N", help="tokens a row (512, or as many as the model has positions)"
    )
    finetune.add_argument(
        "--router-aux-loss",
        type=_not_negative,
        metavar="COEF",
        help="the weight of the load-balancing loss (what config.json says: 0.001 to 0.02 for most, 0.9 for gpt-oss)",
    )
    finetune.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the order of the data (%(default)s)")

    push = _command(
        commands,
        "push",
        _push,
        "Upload a checkpoint folder to the Hub, in one commit. Running it again sends what is missing.",
        [
            "eqx-moe push tuned/model your-name/your-model",
            "eqx-moe push tuned/model your-name/your-model --private",
        ],
    )
    push.add_argument("folder", metavar="DIR", help="a checkpoint folder")
    push.add_argument("repo", metavar="REPO_ID", help="your-name/your-model; made if it is not there")
    push.add_argument("--private", action="store_true", help="if the repo is made, make it a private one")

    add_tokenizer_commands(commands, _command)
    return parser


def _command(commands, name: str, run, summary: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog="examples:\n" + textwrap.indent("\n".join(examples), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.set_defaults(run=run)
    return parser


def _number(kind: type, low: int | float, high: int | float, expected: str):
    """An argparse type: a number in [low, high], NaN excluded."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {expected}; got {text!r}")
        return value

    return parse


def _mesh(text: str) -> dict[str, int]:
    """An argparse type: `data=2,expert=4` as a mapping. Whether such axes exist, the library says."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        name = name.strip()
        if not name or not equals or name in axes:
            raise argparse.ArgumentTypeError(
                f"must be different axes with their sizes, as in data=2,expert=4; got {text!r}"
            )
        axes[name] = _positive(size)
    return axes


_positive = _number(int, 1, 2**31 - 1, "a positive integer")
_at_least_two = _number(int, 2, 2**31 - 1, "an integer, at least 2")
_seed = _number(int, 0, 2**32 - 1, "an integer in [0, 2**32)")
_not_negative = _number(float, 0, 1e6, "a number, at least 0")
_share = _number(float, 1e-9, 1, "a number in (0, 1]")
_learning_rate = _number(float, 1e-12, 1e3, "a positive number")


# --- The commands ----------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> None:
    import dataclasses

    from eqx_moe.checkpoint.names import leaf_paths, plan
    from eqx_moe.hub import look_into
    from eqx_moe.models import count_parameters, family_of, skeleton

    if args.mesh is None and (args.batch_size or args.seq or args.dtype):
        raise ValueError(
            "--batch-size, --seq and --dtype are for a plan; name its devices too, as in --mesh data=2,expert=4."
        )
    found = look_into(args.model)
    config = found.config
    dtype = args.dtype or "float32"
    family, model = family_of(config), skeleton(config, dtype=dtype)
    tensors = {name: plan(table, leaf_paths(model)).keys() for name, table in family.names(config).items()}
    total, active = count_parameters(model)
    rows = {
        "model": f"{family.model_type} ({family.architecture})",
        "parameters": f"{total:,}" if active == total else f"{total:,} in all, {active:,} active for a token",
    }
    rows |= {"weights": "none here"} if found.stored is None else _weights(found.stored, tensors)
    planned = f"{_plan(args, config, model, dtype)}\n" if args.mesh else ""
    _print_table(rows)
    print(planned, end="")
    print("\nconfig")
    shown = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "extra"}
    for key, text in config.extra:
        shown[key] = f"{text} (not read here)"
    rope = dataclasses.asdict(shown["rope_parameters"])
    shown["rope_parameters"] = {key: value for key, value in rope.items() if value is not None}
    _print_table({f"  {_cell(key)}": _cell(value) for key, value in shown.items()})
    print("\nfiles")
    _print_table({f"  {_cell(name)}": f"{size:>15,} bytes" for name, size in found.files.items()})


def _weights(stored: Mapping[str, Any], tensors: Mapping[str, Set[str]]) -> dict[str, str]:
    """What is in the files; `tensors` are those that each layout would have."""
    import collections

    sizes: collections.Counter[str] = collections.Counter()
    for tensor in stored.values():
        sizes[tensor.entry.dtype] += tensor.entry.stop - tensor.entry.start
    missing = {name: len(wanted - stored.keys()) for name, wanted in tensors.items()}
    layout = min(missing, key=lambda name: missing[name])
    rows = {
        "weights": "\n".join(f"{size:,} bytes of {dtype}" for dtype, size in sizes.most_common()),
        "tensors": f"{len(stored):,}",
        # A dense model has one layout under both names.
        "layout": layout if len(set(map(frozenset, tensors.values()))) > 1 else "the one that dense models have",
    }
    if missing[layout]:
        rows["incomplete"] = f"{missing[layout]} tensors of the model are in no file; it will not load"
    return rows


def _plan(args: argparse.Namespace, config: Any, model: Any, dtype: str) -> str:
    import math

    from jax.sharding import AbstractMesh

    from eqx_moe import train

    mesh = AbstractMesh(tuple(args.mesh.values()), tuple(args.mesh))
    rows = args.batch_size or math.prod(size for axis, size in args.mesh.items() if axis in ("data", "expert"))
    length = args.seq or min(2048, config.max_position_embeddings)
    if length > config.max_position_embeddings:
        raise ValueError(
            f"--seq must be at most {config.max_position_embeddings}, the model's positions; got {length}."
        )
    step = train.plan_step(model, mesh, rows=rows, length=length, optimizer=train.adamw(1e-4, 1))
    return f"\n{step.sharding}\n\n{dtype} with AdamW, layers stacked and rematerialised:\n{step}"


def _print_table(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        for i, line in enumerate(value.splitlines() or [""]):
            print(f"{name if i == 0 else '':<{width}}  {line}")


def _cell(value: object) -> str:
    """Text from a file, safe to print: no control characters, and not too long."""
    text = value if isinstance(value, str) else str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 100 else text[:97] + "..."


def _generate(args: argparse.Namespace) -> None:
    from eqx_moe.generation import decode_stream, stream
    from eqx_moe.hub import from_pretrained, load_tokenizer, pinned

    commit = pinned(args.model)
    tokenizer = load_tokenizer(args.model, revision=commit)
    model = from_pretrained(args.model, revision=commit)
    prompt = tokenizer.encode(args.prompt).ids
    ids = stream(
        model,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    for piece in decode_stream(tokenizer, ids, prompt):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def _finetune(args: argparse.Namespace) -> None:
    target = args.out / "model"
    _refuse_taken(target)

    import dataclasses

    import jax

    from eqx_moe import train
    from eqx_moe.hub import from_pretrained, load_config, load_tokenizer, pinned, save_pretrained

    # What is cheap to find wrong comes before what takes time.
    commit = pinned(args.model)
    config = load_config(args.model, revision=commit)
    tokenizer = load_tokenizer(args.model, revision=commit)
    if args.router_aux_loss is not None and not hasattr(config, "router_aux_loss_coef"):
        raise ValueError(f"--router-aux-loss is for models with such a loss; got a {type(config).__name__}.")
    seq = args.seq or min(512, config.max_position_embeddings)
    if seq > config.max_position_embeddings:
        raise ValueError(f"--seq must be at most {config.max_position_embeddings}, the model's positions; got {seq}.")
    texts = train.read_texts(args.data)
    # In float32 whatever is stored: small updates would be rounded away in 16 bits.
    model = from_pretrained(args.model, dtype="float32", revision=commit)
    if args.router_aux_loss is not None:
        changed = dataclasses.replace(model.config, router_aux_loss_coef=args.router_aux_loss)
        model = dataclasses.replace(model, config=changed)
    ends = model.generation_config.eos_token_id
    end_id = ends[0] if ends else None
    documents = train.tokenize(texts, tokenizer, vocab_size=config.vocab_size, end_id=end_id)
    rows = train.pack(documents, seq)
    print(f"{len(texts)} documents, {sum(map(len, documents)):,} tokens, {len(rows)} rows of {seq}")

    model, history = train.fit(
        model,
        train.batches(rows, args.batch_size, seed=args.seed),
        steps=args.steps,
        optimizer=train.adamw(args.lr, args.steps),
        key=jax.random.key(args.seed),
    )
    edge = max(1, args.steps // 10)
    losses = [metrics["cross_entropy"] for metrics in history]
    first, last = sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge
    print(f"loss {first:.4f} in the first {edge} of {args.steps} steps, {last:.4f} in the last {edge}")
    with nothing_half_made(target):
        save_pretrained(model, target, tokenizer=tokenizer, dtype=model.config.dtype)
    print(f"written to {target}")


def _refuse_taken(target: pathlib.Path) -> None:
    """Hours of training should not end in "cannot write there": looked at before, and again by saving itself."""

    def refuse(file: pathlib.Path, expected: str, found: str, fix: str) -> None:
        raise CheckpointError(
            code="CFG-FOLDER", doing="fine-tuning", file=str(file), expected=expected, found=found, fix=fix
        )

    another = "name another --out"
    if target.is_dir() and any(target.iterdir()):
        refuse(target, "a folder that is empty or not there yet", "one that holds files", f"{another}, or remove it")
    parent = target
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        refuse(parent, "a folder", "something else of that name", another)
    if not os.access(parent, os.W_OK | os.X_OK):
        refuse(parent, "a folder that can be written to", "no permission to write", another)


@contextlib.contextmanager
def nothing_half_made(target: pathlib.Path) -> Iterator[None]:
    """If saving fails or is interrupted, folders that it made and left empty go again."""
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _push(args: argparse.Namespace) -> None:
    from eqx_moe.push import push_folder

    address, left_out = push_folder(args.folder, args.repo, private=True if args.private else None)
    print(f"pushed to {address}")
    if left_out:
        print(f"not part of a model, and left out: {', '.join(map(_cell, left_out))}")


if __name__ == "__main__":
    sys.exit(main())
