"""python -m convert.verify SRC: a checkpoint here against the same one in transformers."""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convert.command import command
from convert.folders import Source, compare, open_folder, write_folder
from convert.report import Check, Layer, write_report
from eqx_moe.checkpoint.files import exists
from eqx_moe.checkpoint.jsonfile import read_json
from eqx_moe.checkpoint.names import Tensor, plan
from eqx_moe.checkpoint.progress import progress
from eqx_moe.cli import run_command
from eqx_moe.errors import EqxMoeError
from eqx_moe.generation import generate
from eqx_moe.hub import from_pretrained, load_tokenizer
from eqx_moe.models import family_of
from eqx_moe.nn.attention import Rows
from eqx_moe.nn.decoder import Decoder

#: Of the largest value; both sides compute in float32 and add up in other orders.
TOLERANCE = 1e-4
_NEW_TOKENS, _RANDOM_TOKENS = 32, 48
_PROMPT = "The first thing that one notices about the sea is that it does not stop."
_DESCRIPTION = """\
Compare a checkpoint, tensor by tensor, layer by layer, logits and greedy text, with what transformers makes of it, and
convert it to the packed layout and back, bit for bit. Writes a page with a plot, and fails if anything differs. Both
models are held in float32 at a time. Needs torch, transformers and matplotlib: pip install -e '.[oracle,train]'."""
_EXAMPLES = [
    "python -m convert.verify examples/assets/shakespeare-moe",
    'python -m convert.verify Mixtral-8x7B-v0.1 --out report --prompt "Once upon a time"',
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("verify", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FOLDER", help="where the page goes (./verify-NAME, NAME being that of SRC)"
    )
    parser.add_argument("--prompt", default=_PROMPT, metavar="TEXT", help="the text to compare on (a sentence)")
    return run_command(parser, _verify, arguments)


def _verify(args: argparse.Namespace) -> None:
    try:
        import matplotlib as matplotlib
        import torch as torch  # pyright: ignore[reportMissingImports]
        import transformers as transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EqxMoeError(f"{error}; to have all that is needed: pip install -e '.[oracle,train]'") from error
    out = args.out or pathlib.Path(f"verify-{args.source.resolve().name}")
    out.mkdir(parents=True, exist_ok=True)
    # Beside the report, where there is room for it: a temporary folder of the system may be in memory.
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as temporary, open_folder(args.source) as source:
        packed = pathlib.Path(temporary) / "packed"
        checks = [_round_trip(source, packed, pathlib.Path(temporary) / "original")]
        # transformers on a CPU does not read every container, nor know every name of a family, but what came of it.
        data = read_json(args.source / "config.json")
        as_it_is = data.get("quantization_config") is None and data["model_type"] == family_of(source.config).model_type
        theirs = _load_theirs(args.source if as_it_is else packed)
        checks.append(_tensors("tensors, bit for bit", source, theirs))
        if as_it_is:
            checks.append(_tensors("tensors after converting, bit for bit", source, _load_theirs(packed)))
    theirs = theirs.float()
    ours = from_pretrained(args.source, dtype="float32")
    tokens = _tokens(args.source, args.prompt, ours.config)
    layers, more = _numbers(ours, theirs, tokens)
    page = write_report(out, args.source, checks + more, layers, TOLERANCE)
    print("\n".join(str(check) for check in checks + more))
    print(f"written to {page}")
    failed = [check.name for check in checks + more if not check.passed]
    if failed:
        raise EqxMoeError(f"{args.source} does not agree with transformers: {', '.join(failed)}; see {page}")


def _load_theirs(folder: pathlib.Path) -> Any:
    import transformers  # pyright: ignore[reportMissingImports]

    cls: Any = transformers.AutoModelForCausalLM
    model, info = cls.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True, trust_remote_code=False
    )
    odd = {key: value for key, value in info.items() if value}
    if odd:
        raise EqxMoeError(f"transformers does not take all of {folder} as it is: {odd}")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the plain loop over experts, on any width
    return model.eval()


def _round_trip(source: Source, packed: pathlib.Path, original: pathlib.Path) -> Check:
    write_folder(source, packed, "packed", "5GB")
    with open_folder(packed) as middle:
        write_folder(middle, original, "original", "5GB")
    figure = f"{len(source.leaves)} of {len(source.leaves)} arrays equal"
    try:
        with open_folder(original) as last:
            compare(source, last)
    except EqxMoeError as error:
        return Check("round trip through both layouts, bit for bit", str(error), False)
    return Check("round trip through both layouts, bit for bit", figure, True)


def _tensors(name: str, source: Source, theirs: Any) -> Check:
    """Each parameter of theirs, named as transformers holds it in memory, against our leaves."""
    tensors = plan(family_of(source.config).names(source.config)["packed"], source.leaves)
    buffers = dict(theirs.named_buffers())
    parameters = dict(theirs.named_parameters())
    parameters |= {name: value for name, value in theirs.state_dict().items() if name in buffers}
    odd = sorted(tensors.keys() ^ parameters.keys())
    with progress("comparing tensors", source.size) as bar:
        for path in tensors.keys() & parameters.keys():
            joined = _joined(tensors[path], source)
            if not _same_bits(joined, parameters[path]):
                odd.append(path)
            bar.update(joined.nbytes)
    figure = f"{len(tensors) - len(odd)} of {len(tensors)} equal"
    return Check(name, figure + (f"; not {', '.join(sorted(odd)[:5])}" if odd else ""), not odd)


def _joined(tensor: Tensor, source: Source) -> np.ndarray:
    parts = [source.leaves[part.leaf].read(part.index) for part in tensor.parts]
    return tensor.joined(parts) if len(parts) > 1 or tensor.strided else parts[0]


def _same_bits(ours: np.ndarray, theirs: Any) -> bool:
    import torch  # pyright: ignore[reportMissingImports]

    parameter = theirs.detach().contiguous()
    if str(parameter.dtype) != f"torch.{ours.dtype}" or tuple(parameter.shape) != ours.shape:
        return False
    return np.array_equal(parameter.reshape(-1).view(torch.uint8).numpy(), ours.reshape(-1).view(np.uint8))


def _tokens(folder: pathlib.Path, prompt: str, config: Any) -> np.ndarray:
    """The prompt's ids [1, seq], or random ones where there is no tokenizer; leaves room to go on."""
    room = config.max_position_embeddings
    if exists(folder / "tokenizer.json"):
        ids = load_tokenizer(folder).encode(prompt).ids
        if not ids:
            raise ValueError(f"`--prompt` must have at least one token; got {prompt!r}.")
    else:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, _RANDOM_TOKENS).tolist()
    return np.array([ids[: max(1, room - _NEW_TOKENS)]])


def _numbers(ours: Decoder, theirs: Any, tokens: np.ndarray) -> tuple[list[Layer], list[Check]]:
    """What both compute on the way to the next token, and which tokens they take."""
    import torch  # pyright: ignore[reportMissingImports]

    captured: list[np.ndarray] = []

    def hook(module, arguments, keywords, output):
        if not captured:
            captured.append((arguments[0] if arguments else keywords["hidden_states"]).numpy())
        captured.append((output[0] if isinstance(output, tuple) else output).numpy())

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in theirs.model.layers]
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens)).logits.numpy()
    for handle in handles:
        handle.remove()
    layers = _layers(ours, tokens, captured)
    logits = np.asarray(eqx.filter_jit(lambda model, ids: model(ids))(ours, jnp.asarray(tokens)))
    worst = max(max(layer.alone, layer.so_far) for layer in layers)
    same = float(np.mean(logits.argmax(-1) == expected.argmax(-1)))
    error = _error(logits, expected)
    new = max(1, min(_NEW_TOKENS, ours.config.max_position_embeddings - tokens.shape[1]))
    ids = torch.as_tensor(tokens)
    with torch.no_grad():
        # With a mask of its own: else `generate` takes the padding id, wherever it stands in the prompt, for padding.
        answer = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    text = answer[0, tokens.shape[1] :].tolist()
    mine = generate(ours, tokens.tolist(), max_new_tokens=new, eos_ids=[])[0]
    agreeing = next((i for i, (one, two) in enumerate(zip(mine, text, strict=True)) if one != two), new)
    return layers, [
        Check("hidden states of every layer", f"largest error {worst:.1e}", worst <= TOLERANCE),
        Check("logits", f"largest error {error:.1e}, the same token in {same:.1%} of places", error <= TOLERANCE),
        Check("greedy text", f"{agreeing} of {new} tokens equal", agreeing == new),
    ]


def _layers(model: Decoder, tokens: np.ndarray, theirs: list[np.ndarray]) -> list[Layer]:
    """The error of each layer's output: computed from their input to it, and from our own."""
    batch, seq = tokens.shape
    rows = Rows(segments=jnp.ones((batch, seq), jnp.int32), start=None, key_segments=None)
    positions = jnp.broadcast_to(jnp.arange(seq), (batch, seq))
    apply = eqx.filter_jit(lambda block, x, table: block(x, rows, table)[0])
    x = model.embed(jnp.asarray(tokens))
    layers = []
    with tqdm(total=len(model.layers), desc="comparing layers", delay=1, disable=None) as bar:
        for layer, before, after in zip(model.layers, theirs[:-1], theirs[1:], strict=True):
            table = layer.attention.rope.tables(positions, jnp.full((batch, 1), seq))
            x = apply(layer, x, table)
            layers.append(Layer(_error(apply(layer, jnp.asarray(before), table), after), _error(x, after)))
            bar.update()
    return layers


def _error(ours: jax.Array | np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, of the largest value; infinite if there is anything that is not finite."""
    error = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
    return float(error) if np.isfinite(error) else float("inf")


if __name__ == "__main__":
    sys.exit(main())
