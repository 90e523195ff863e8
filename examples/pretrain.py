"""Trains the checkpoint that comes with eqx_moe, a small Mixtral that has read Shakespeare, from nothing.

    python examples/pretrain.py                    # writes examples/assets/shakespeare-moe
    python examples/pretrain.py --dense --out DIR  # a dense model of the same active size, trained alike
    python examples/pretrain.py --steps 100 --out DIR

The tokenizer and the model see the first 90% of the text, the reported loss is that of the last 10%. Everything is
drawn from `--seed`: the same command on the same machine gives the same weights.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import pathlib
import random
import sys
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import eqx_moe
from eqx_moe import train
from eqx_moe.family.config import RopeParameters
from eqx_moe.models import count_parameters

HERE = pathlib.Path(__file__).parent
DATA = HERE / "data" / "tinyshakespeare.txt"
END = "<|endoftext|>"
PROMPT = "ROMEO:\n"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every number of the run."""

    # The tokenizer: byte-level BPE. In training each merge is left out with probability `bpe_dropout`, drawn anew for
    # every epoch, so that the text is never spelled twice in the same way (Provilkov et al. 2020): the regulariser.
    vocab: int = 512
    bpe_dropout: float = 0.1
    # The model.
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    experts: int = 8
    k: int = 2
    expert_ffn: int = 128
    context: int = 128
    router_aux_loss_coef: float = 0.01
    init_std: float = 0.02
    # The optimizer: Muon for the matrices inside the layers, AdamW for everything else.
    steps: int = 1500
    batch: int = 32
    warmup: int = 50
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0


# --- The tokenizer ---------------------------------------------------------------------------------------------------


def train_tokenizer(text: str, vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


class DropoutTokens:
    """The ids of one text under BPE-dropout: `ids(epoch)` is another spelling for each epoch.

    `tokenizers` has the same dropout, but without a seed. Words repeat, so up to 64 spellings of each are drawn once,
    and an epoch picks one for every occurrence.
    """

    POOL = 64

    def __init__(self, text: str, tokenizer: Tokenizer, dropout: float, seed: int):
        ranks = {tuple(pair): rank for rank, pair in enumerate(json.loads(tokenizer.to_str())["model"]["merges"])}
        vocab = tokenizer.get_vocab()
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]  # pyright: ignore[reportOptionalMemberAccess]
        counts = collections.Counter(words)
        generator = random.Random(seed)
        spellings = []
        first, number = {}, {}
        for word, count in counts.items():
            first[word], number[word] = len(spellings), min(count, self.POOL) if dropout > 0 else 1
            for _ in range(number[word]):
                spellings.append([vocab[part] for part in spell(word, ranks, dropout, generator)])
        self.seed = seed
        self.first = np.array([first[word] for word in words])
        self.number = np.array([number[word] for word in words])
        self.length = np.array([len(spelling) for spelling in spellings])
        self.start = np.cumsum(self.length) - self.length
        self.flat = np.array(list(itertools.chain.from_iterable(spellings)), np.int32)

    def ids(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, epoch))
        chosen = self.first + generator.integers(0, self.number)
        length = self.length[chosen]
        # The places of all chosen spellings in `flat`, one after the other.
        before = np.cumsum(length) - length
        return self.flat[np.repeat(self.start[chosen] - before, length) + np.arange(length.sum())]


def spell(word: str, ranks: dict[tuple[str, str], int], dropout: float, generator: random.Random) -> list[str]:
    """BPE of one word; before every merge, each pair that could be merged is passed over with probability `dropout`."""
    parts = list(word)
    while True:
        pairs = enumerate(itertools.pairwise(parts))
        merges = [(ranks[pair], i) for i, pair in pairs if pair in ranks and generator.random() >= dropout]
        if not merges:
            return parts
        _, i = min(merges)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


# --- The model and its optimizer -------------------------------------------------------------------------------------


def make_config(recipe: Recipe, dense: bool) -> eqx_moe.MixtralConfig | eqx_moe.LlamaConfig:
    common: dict[str, Any] = dict(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        initializer_range=recipe.init_std,
        rms_norm_eps=1e-5,
        rope_parameters=RopeParameters(rope_theta=10_000.0),
        bos_token_id=0,
        eos_token_id=0,
    )
    if dense:
        return eqx_moe.LlamaConfig(intermediate_size=recipe.k * recipe.expert_ffn, **common)
    return eqx_moe.MixtralConfig(
        intermediate_size=recipe.expert_ffn,
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.k,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
        **common,
    )


def make_model(recipe: Recipe, dense: bool, seed: int) -> eqx_moe.Decoder:
    """Random weights; those that write into the residual stream are smaller, as in GPT-2."""
    model = eqx_moe.init(make_config(recipe, dense), key=jax.random.key(seed))

    def writer(layer) -> jax.Array:
        return layer.mlp.down.weight if layer.moe is None else layer.moe.experts.down

    def writers(model: eqx_moe.Decoder) -> list[jax.Array]:
        attention = [layer.attention.o.weight for layer in model.layers]
        return attention + [writer(layer) for layer in model.layers]

    return eqx.tree_at(writers, model, replace_fn=lambda weight: weight / (2 * recipe.layers) ** 0.5)


def make_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(recipe.warmup, steps // 2), steps, 0.0)

    def dimensions(params):
        def of(path, leaf, is_matrix):
            name = jax.tree_util.keystr(path)
            inside = "layers" in name and "router" not in name and is_matrix
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2) if inside else None

        return jax.tree_util.tree_map_with_path(of, params, train.are_matrices(params))

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.contrib.muon(
            schedule(recipe.muon_lr),
            beta=0.95,
            weight_decay=recipe.weight_decay,
            weight_decay_mask=train.are_matrices,
            adam_b2=recipe.b2,
            # Decay is multiplied by the learning rate: the same decay a step for both kinds of weights.
            adam_weight_decay=recipe.weight_decay * recipe.muon_lr / recipe.adam_lr,
            adam_learning_rate=schedule(recipe.adam_lr),
            muon_weight_dimension_numbers=dimensions,
        ),
    )


# --- What is written -------------------------------------------------------------------------------------------------


def sample(model: eqx_moe.Decoder, tokenizer: Tokenizer, seed: int, length: int) -> str:
    prompt = tokenizer.encode(PROMPT).ids
    (ids,) = eqx_moe.generate(model, [prompt], max_new_tokens=length, temperature=0.8, seed=seed)
    return PROMPT + tokenizer.decode(ids)


def write_curve(history: list[dict[str, float]], file: pathlib.Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no loss curve.", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = np.array([metrics["cross_entropy"] for metrics in history])
    width = max(1, len(losses) // 200)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(np.arange(len(losses)) + 1, losses, linewidth=0.4, alpha=0.4)
    axes.plot(np.arange(len(smooth)) + width, smooth, color="C0")
    axes.set(xlabel="step", ylabel="nats per token", title="Training loss (with BPE-dropout)")
    figure.savefig(file, dpi=120)
    plt.close(figure)


CARD = """---
library_name: eqx_moe
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# {title}

A small {kind} language model trained from scratch on tiny Shakespeare (public domain) by `examples/pretrain.py` of
eqx_moe. It exists so that programs have a real checkpoint to run on; its text has the shape of Shakespeare's and no
sense.

| | |
|---|---|
| Command | `{command}` |
| Seed, steps | {seed}, {steps} of {batch} x {context} tokens |
| Time | {minutes:.1f} minutes of training on {cores} CPU cores |
| Parameters | {total:,} in all, {active:,} active for a token |
| Validation loss | **{loss:.4f} nats per byte** ({token_loss:.4f} per token) |

The loss is that of the weights in this folder (bfloat16), on the last 10% of the file ({bytes:,} bytes), which neither
the tokenizer nor the model has seen: windows of {context} tokens, each token scored once, with at least half a window
before it but at the very beginning. Only one spelling of the text is scored, so the true loss per byte is a little
lower.

Recipe: {recipe}

## Samples

Unselected: prompt `{prompt}`, temperature 0.8, {length} new tokens, seeds 0, 1 and 2.

{samples}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "assets" / "shakespeare-moe", help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    parser.add_argument("--dense", action="store_true", help="a Llama with as many active parameters instead")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be positive")
    if args.dense and args.out == parser.get_default("out"):
        parser.error("--dense needs an --out of its own")
    run(Recipe(steps=args.steps), args.out, args.seed, args.dense)


def run(recipe: Recipe, out: pathlib.Path, seed: int, dense: bool) -> float:
    """Trains, measures, writes; returns the validation loss in nats per byte."""
    raw = DATA.read_bytes()
    split = len(raw) * 9 // 10
    text, held_out = raw[:split].decode(), raw[split:].decode()
    began = time.perf_counter()

    tokenizer = train_tokenizer(text, recipe.vocab)
    spellings = DropoutTokens(text, tokenizer, recipe.bpe_dropout, seed)
    model = make_model(recipe, dense, seed)
    total, active = count_parameters(model)
    print(f"{type(model.config).__name__}: {total:,} parameters, {active:,} active for a token")

    def epoch(number: int) -> train.Rows:
        # The first tokens are left out in turn, so that rows begin at other places in every epoch.
        offset = int(np.random.default_rng((seed, number)).integers(0, recipe.context))
        return train.pack([spellings.ids(number)[offset:]], recipe.context)

    model, history = train.fit(
        model,
        train.batches(epoch, recipe.batch, seed=seed),
        steps=recipe.steps,
        optimizer=make_optimizer(recipe, recipe.steps),
        on_step=report,
    )
    minutes = (time.perf_counter() - began) / 60

    # What is measured is what is written: the weights rounded to bfloat16.
    model = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype) if eqx.is_array(leaf) else leaf, model
    )
    # The first token has nothing before it; the end of another text stands there.
    ids = np.array([tokenizer.token_to_id(END), *tokenizer.encode(held_out).ids], np.int32)
    rows = train.windows(ids, recipe.context)
    found = train.evaluate(model, train.in_order(rows, recipe.batch), byte_count=len(raw) - split, progress=True)
    assert found.tokens == len(ids) - 1 and found.nats_per_byte is not None
    print(f"validation: {found.nats_per_byte:.4f} nats per byte, {found.nats_per_token:.4f} per token")

    length = recipe.context - len(tokenizer.encode(PROMPT).ids)
    samples = [sample(model, tokenizer, number, length) for number in range(3)]
    eqx_moe.save_pretrained(model, out, tokenizer=tokenizer, dtype="bfloat16")
    card = CARD.format(
        title="Shakespeare, dense" if dense else "Shakespeare MoE",
        kind="Llama" if dense else "Mixtral-like mixture-of-experts",
        command="python " + " ".join(["examples/pretrain.py", *sys.argv[1:]]),
        seed=seed,
        steps=recipe.steps,
        batch=recipe.batch,
        context=recipe.context,
        minutes=minutes,
        cores=cores(),
        total=total,
        active=active,
        loss=found.nats_per_byte,
        token_loss=found.nats_per_token,
        bytes=len(raw) - split,
        recipe=", ".join(f"{name} {value}" for name, value in dataclasses.asdict(recipe).items()),
        prompt=PROMPT.replace("\n", "\\n"),
        length=length,
        samples="\n".join(f"Seed {number}:\n\n```\n{text.rstrip()}\n```\n" for number, text in enumerate(samples)),
    )
    (out / "README.md").write_text(card)
    write_curve(history, out / "loss.png")
    print(f"written to {out}")
    return found.nats_per_byte


def cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(step: int, model: eqx_moe.Decoder, metrics: dict[str, float]) -> None:
    """A line now and then for those who read a log file; a terminal has the progress bar."""
    if step % 100 == 0 and not sys.stderr.isatty():
        print(f"step {step}: loss {metrics['loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
