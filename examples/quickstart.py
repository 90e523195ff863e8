"""The main job in one go: load a checkpoint, write some text, fine-tune it, save it, load it back.

    python examples/quickstart.py [--out DIR]

It takes a minute or two on two CPU cores, most of it spent in compiling and fine-tuning.
"""

import argparse
import pathlib
import sys

import jax.numpy as jnp
import numpy as np

import eqx_moe
from eqx_moe import train
from eqx_moe.generation import decode_stream
from eqx_moe.models import count_parameters

HERE = pathlib.Path(__file__).parent
CHECKPOINT = HERE / "assets" / "shakespeare-moe"
TEXT = HERE / "data" / "christmas-carol.txt"
PROMPT = "ROMEO:\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=CHECKPOINT, help="a checkpoint folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of fine-tuning (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("quickstart-out"), help="%(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    heading("1. Load")
    model = eqx_moe.from_pretrained(args.model, dtype="float32")
    tokenizer = eqx_moe.load_tokenizer(args.model)
    print_table(describe(model, args.model))

    heading("2. Generate")
    context = min(model.config.max_position_embeddings, 128)
    prompt = tokenizer.encode(PROMPT).ids
    write_text(model, tokenizer, prompt, context - len(prompt))

    heading(f"3. Fine-tune on {TEXT.name}")
    (document,) = train.tokenize(train.read_texts([TEXT]), tokenizer, vocab_size=model.config.vocab_size)
    split = len(document) * 9 // 10
    rows, held_out = train.pack([document[:split]], context), train.windows(document[split:][: 20 * context], context)
    before = train.evaluate(model, train.in_order(held_out, 8))
    tuned, history = train.fit(
        model,
        train.batches(rows, 8, seed=0),
        steps=args.steps,
        optimizer=train.adamw(1e-3, args.steps),
    )
    after = train.evaluate(tuned, train.in_order(held_out, 8))
    print(f"held-out loss: {before.nats_per_token:.3f} before, {after.nats_per_token:.3f} after {args.steps} steps")
    plot = args.out / "loss.png"
    drawn = write_plot(history, before.nats_per_token, after.nats_per_token, plot)

    heading("4. Generate again")
    prompt = tokenizer.encode("Scrooge ").ids
    write_text(tuned, tokenizer, prompt, context - len(prompt))

    heading("5. Save, load again, compare")
    folder = args.out / "model"
    # In float32, as trained: rounded to bfloat16 the logits could not be the same.
    eqx_moe.save_pretrained(tuned, folder, tokenizer=tokenizer, dtype="float32")
    again = eqx_moe.from_pretrained(folder, dtype="auto")
    tokens = jnp.asarray(held_out.tokens[:2])
    if not np.array_equal(np.asarray(tuned(tokens)), np.asarray(again(tokens))):
        raise SystemExit("The logits of the saved model differ from those of the model in memory.")
    print("the logits of both are identical, bit for bit")
    print(f"\nmodel: {folder.resolve()}")
    if drawn:
        print(f"plot:  {plot.resolve()}")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def describe(model: eqx_moe.Decoder, folder: pathlib.Path) -> dict[str, str]:
    config = model.config
    rows = {
        "checkpoint": str(folder),
        "config": type(config).__name__,
        "layers, hidden": f"{config.num_hidden_layers}, {config.hidden_size}",
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key-value",
        "vocabulary": str(config.vocab_size),
        "positions": str(config.max_position_embeddings),
    }
    total, active = count_parameters(model)
    if active < total:
        rows["experts"] = f"{config.num_local_experts} a layer, {config.num_experts_per_tok} for a token"
        rows["parameters"] = f"{total:,} in all, {active:,} active for a token"
    else:
        rows["parameters"] = f"{total:,}"
    return rows


def write_text(model: eqx_moe.Decoder, tokenizer, prompt: list[int], length: int) -> None:
    """Streams a continuation to stdout."""
    sys.stdout.write(tokenizer.decode(prompt))
    ids = eqx_moe.stream(model, prompt, max_new_tokens=length, temperature=0.8, seed=0)
    for piece in decode_stream(tokenizer, ids, prompt):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def write_plot(history: list[dict[str, float]], before: float, after: float, file: pathlib.Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no loss plot (pip install matplotlib)")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(history) + 1), [metrics["cross_entropy"] for metrics in history], label="training batches")
    axes.plot([0, len(history)], [before, after], "o", label="text held out")
    axes.set(xlabel="step", ylabel="nats per token", title="Fine-tuning")
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


if __name__ == "__main__":
    main()
