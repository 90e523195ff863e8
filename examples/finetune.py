"""Fine-tunes any supported checkpoint on text of your own: the whole training loop in the open.

    python examples/finetune.py examples/assets/shakespeare-moe --data examples/data/christmas-carol.txt --out tuned
    python examples/finetune.py path/to/Mixtral --data notes.jsonl --out tuned --steps 500 --lr 1e-5 --seq 1024

SRC is a folder in the Hugging Face layout, or a repo "org/name" on the Hub; --push uploads the result to one. DATA is
.txt (a file is a document) or .jsonl (a line is an object with a "text"). `eqx_moe.train.fit` and `eqx-moe finetune` do
the same in one call; this file is for reading and changing.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import numpy as np
import optax
from tqdm import tqdm

import eqx_moe
from eqx_moe import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, or the name of a repo on the Hub")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl files")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="where the new checkpoint goes")
    parser.add_argument("--push", metavar="REPO", help="your-name/your-model: also upload it to the Hub")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-4, help="the highest learning rate (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step (%(default)s)")
    parser.add_argument("--seq", type=int, default=128, help="tokens a row (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be positive")

    # 1. The model, in float32: small updates would be rounded away in bfloat16.
    model = eqx_moe.from_pretrained(args.source, dtype="float32")
    tokenizer = eqx_moe.load_tokenizer(args.source)

    # 2. Text -> ids -> rows of equal length. A row may hold several short documents; segment ids keep them apart.
    ends = model.generation_config.eos_token_id
    documents = train.tokenize(
        train.read_texts(args.data),
        tokenizer,
        vocab_size=model.config.vocab_size,
        end_id=ends[0] if ends else None,
    )
    rows = train.pack(documents, args.seq)
    # Shuffled batches without end, on the device.
    batches = train.batches(rows, args.batch_size, seed=args.seed)

    # 3. An optimizer from optax. A model is a pytree, so that its gradients and moments have its shape.
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.lr, args.steps // 20, args.steps, args.lr / 10)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        # Norms and biases do not decay.
        optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=train.are_matrices),
    )
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    # 4. One step. Everything that goes in is donated: its memory is used for what comes out.
    @eqx.filter_jit(donate="all")
    def step(model, state, batch, key):
        (_, metrics), grads = eqx.filter_value_and_grad(train.loss, has_aux=True)(model, batch, key)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, metrics

    # 5. The loop.
    key = jax.random.key(args.seed)  # For the router's jitter, in models that have one.
    losses = []
    with tqdm(range(args.steps), desc="training", disable=None) as bar:
        for i in bar:
            model, state, metrics = step(model, state, next(batches), jax.random.fold_in(key, i))
            losses.append(float(metrics["cross_entropy"]))
            if not np.isfinite(losses[-1]):
                raise SystemExit(f"The loss is {losses[-1]} at step {i + 1}: try a smaller --lr.")
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    edge = max(1, len(losses) // 10)
    print(
        f"loss: {np.mean(losses[:edge]):.3f} in the first tenth of the steps, {np.mean(losses[-edge:]):.3f} in the last"
    )

    # 6. Back to a Hugging Face folder, in the dtype that the checkpoint came in.
    eqx_moe.save_pretrained(model, args.out, tokenizer=tokenizer, dtype=model.config.dtype)

    if args.push:
        base = None if pathlib.Path(args.source).is_dir() else args.source
        print(
            "pushed to",
            eqx_moe.push_to_hub(model, args.push, tokenizer=tokenizer, dtype=model.config.dtype, base_model=base),
        )

    # 7. What came of it.
    prompt = documents[0][: args.seq // 4].tolist()
    (new,) = eqx_moe.generate(model, [prompt], max_new_tokens=args.seq // 2, temperature=0.8)
    print(f"\n{tokenizer.decode(prompt)} ... {tokenizer.decode(new)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
