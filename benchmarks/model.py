"""A whole Mixtral-shaped model (178M parameters) on the CPU, float32: eqx_moe beside transformers on the same weights.

    python benchmarks/model.py     # needs the `oracle` extra; writes 1.4 GB to a temporary folder; some 20 minutes

Decoding: the difference between generating 1 + 64 tokens and 1 token from a prompt of 16, greedy, without an end token.
Prefill: generating one token from a prompt of 512: the empty cache, the forward pass, the last place's logits, the
choice, and the id back on the host. Training: one step on 4 rows of 256 tokens, with the router's load-balancing loss,
gradients clipped to norm 1 and AdamW; transformers' model with `torch.optim.AdamW` as it is by default, and `fused`.

For each task each side has a process of its own, which loads the model; the two take turns, a run each, and the one
that waits does nothing. Medians of RUNS, after warm-up and compilation. Memory is a process's VmHWM at the end less
what it was after the imports: loading, compiling and running. Both sides map what lies in the files as they want it,
and of that only the pages that were read count: eqx_moe Mixtral's files as they were released, a tensor for each matrix
of an expert ("original"), transformers 5 those that it writes itself, experts "packed". So both are measured.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import machine

RUNS = 5
# Runs before those that count. A training process needs several until it has all its pages: a virtual machine's first
# touch of memory can cost more than the step.
WARM_UP = 4
NEW, PROMPT, LONG_PROMPT = 64, 16, 512
ROWS, LENGTH = 4, 256
SHAPE = dict(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
)
# What is compiled at 8 and at 32 layers.
SMALL = SHAPE | dict(vocab_size=512, hidden_size=64, intermediate_size=96)

#: task: how its figure is called, and what that is from the seconds of a run.
TASKS = {
    "decode": ("decode at batch 1, tok/s", lambda seconds: NEW / seconds),
    "prefill": (f"prefill of {LONG_PROMPT}, tok/s", lambda seconds: LONG_PROMPT / seconds),
    "train": (f"training step of {ROWS} x {LENGTH}, tok/s", lambda seconds: ROWS * LENGTH / seconds),
}
GOALS = {"decode": 2.5, "prefill": 1.2, "train": 1.3}
LAYOUTS = ("original", "packed")


def peak() -> int:
    """Bytes that this process ever held in memory."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024


def random_ids(rows: int, length: int):
    import numpy

    return numpy.random.default_rng(0).integers(3, SHAPE["vocab_size"], (rows, length))


def ours(task: str, folder: str):
    """`load() -> model` and `prepare(model) -> run`; `run() -> (seconds, something to compare)`."""
    import jax
    import jax.numpy as jnp

    import eqx_moe
    import eqx_moe.hub
    from eqx_moe.train import Batch, adamw, init_optimizer, make_step

    jnp.zeros(1).block_until_ready()

    def load():
        model = eqx_moe.from_pretrained(folder)
        return jax.block_until_ready(model)

    def generating(model):
        prompt = random_ids(1, PROMPT if task == "decode" else LONG_PROMPT).tolist()

        def generate(new: int):
            begin = time.perf_counter()
            (ids,) = eqx_moe.generate(model, prompt, new, eos_ids=())
            assert len(ids) == new
            return time.perf_counter() - begin, ids

        return generate

    def training(model):
        optimizer = adamw(1e-4, steps=1000, warmup=0)
        ids = jnp.asarray(random_ids(ROWS, LENGTH), jnp.int32)
        batch, step = Batch(tokens=ids, segment_ids=jnp.ones_like(ids), labels=ids), make_step(optimizer)
        state = [model, init_optimizer(optimizer, model)]
        del model  # its memory goes into the first step

        def run():
            begin = time.perf_counter()
            *state[:], metrics = step(*state, batch)
            jax.block_until_ready((state, metrics))
            return time.perf_counter() - begin, float(metrics["loss"])

        return run

    return load, training if task == "train" else generating


def theirs(task: str, folder: str, *, fused: bool | None = None):
    """As `ours`."""
    import torch
    from transformers import MixtralForCausalLM

    torch.set_num_threads(machine.cores())

    def load():
        return MixtralForCausalLM.from_pretrained(folder)

    def generating(model):
        model.generation_config.eos_token_id = None
        prompt = torch.tensor(random_ids(1, PROMPT if task == "decode" else LONG_PROMPT))
        options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0)

        def generate(new: int):
            begin = time.perf_counter()
            with torch.no_grad():
                ids = model.generate(prompt, max_new_tokens=new, **options)[0, prompt.shape[1] :].tolist()
            assert len(ids) == new
            return time.perf_counter() - begin, ids

        return generate

    def training(model):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
        ids = torch.tensor(random_ids(ROWS, LENGTH))

        def run():
            begin = time.perf_counter()
            loss = model(ids, labels=ids, output_router_logits=True, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - begin, loss.item()

        return run

    return load, training if task == "train" else generating


SIDES = {
    "eqx_moe": ours,
    "transformers": theirs,
    "transformers, fused AdamW": lambda task, folder: theirs(task, folder, fused=True),
}


def work(side: str, task: str, folder: str) -> None:
    """A process of one side: warms up, says so, and then does a run for every line that it is sent."""
    load, prepare = SIDES[side](task, folder)
    before = peak()
    run = prepare(load())

    def decode():
        (short, _), (long, ids) = run(1), run(1 + NEW)
        return long - short, ids

    once = {"decode": decode, "prefill": lambda: run(1), "train": run}[task]
    _, result = once()
    for _ in range(WARM_UP):
        once()
    print(json.dumps(result), flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()[0]), flush=True)
    print(json.dumps(peak() - before))


def compare(task: str, sides: list[str], folder: str) -> dict[str, dict]:
    """Figures of each side: `runs` (seconds), `peak` (bytes), `result` of the first run."""
    processes = {
        side: subprocess.Popen(
            [sys.executable, __file__, "--work", side, task, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in sides
    }

    def answer(side: str):
        line = processes[side].stdout.readline()
        if not line:
            raise SystemExit(f"{side} failed at {task}")
        return json.loads(line)

    try:
        found = {side: {"result": answer(side), "runs": []} for side in sides}
        for _ in range(RUNS):
            for side, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                found[side]["runs"].append(answer(side))
        for side, process in processes.items():
            process.stdin.close()
            found[side]["peak"] = answer(side)
            process.wait()
    finally:
        for process in processes.values():
            process.kill()
    return found


def rates(task: str, found: dict[str, dict]) -> list[list]:
    """Rows of the table of speeds."""
    label, figure = TASKS[task]
    mine, *peers = (figure(statistics.median(each["runs"])) for each in found.values())
    labels, goals = [label, "the same, their AdamW fused"], [f">= {GOALS[task]}", ""]
    # Only training has a second peer.
    rows = zip(labels, peers, goals, strict=False)
    return [[name, mine, peer, mine / peer, goal] for name, peer, goal in rows]


def described(task: str, found: dict[str, dict]) -> str:
    """Every run, and whether both sides found the same."""
    _, figure = TASKS[task]
    spread = {side: [round(figure(seconds), 1) for seconds in each["runs"]] for side, each in found.items()}
    if task == "train":
        losses = {side: round(each["result"], 4) for side, each in found.items()}
        return f"{task}: first losses {losses}; all runs: {spread}"
    mine, peer = (each["result"] for each in found.values())
    same = sum(a == b for a, b in zip(mine, peer, strict=True))
    return f"{task}: {same} of {len(mine)} ids are the same; all runs: {spread}"


def compile_seconds(form: str, layers: int) -> float:
    """The first training step less a later one, in a process of its own."""
    command = [sys.executable, __file__, "--compile", form, str(layers)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(found.stdout.strip().splitlines()[-1])


def compile_step(form: str, layers: int) -> None:
    import jax
    import jax.numpy as jnp

    import eqx_moe
    from eqx_moe.train import Batch, adamw, init_optimizer, make_step

    optimizer = adamw(1e-4, steps=1000)
    model = eqx_moe.init(eqx_moe.MixtralConfig(**SMALL | {"num_hidden_layers": layers}), key=jax.random.key(0))
    if form == "stacked":
        model = eqx_moe.stack(model)
    state, step = init_optimizer(optimizer, model), make_step(optimizer)
    ids = jnp.ones((ROWS, LENGTH), jnp.int32)
    batch, seconds = Batch(tokens=ids, segment_ids=ids, labels=ids), []
    for _ in range(2):
        begin = time.perf_counter()
        model, state, _ = jax.block_until_ready(step(model, state, batch))
        seconds.append(time.perf_counter() - begin)
    print(seconds[0] - seconds[1])


def write_model(folder: str) -> None:
    import jax

    import eqx_moe

    model = eqx_moe.init(eqx_moe.MixtralConfig(**SHAPE), key=jax.random.key(0))
    for layout in LAYOUTS:
        eqx_moe.save_pretrained(model, os.path.join(folder, layout), layout=layout)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(model)) / 1e6:.0f}M parameters")


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(*sys.argv[2:])
    if sys.argv[1:2] == ["--compile"]:
        return compile_step(sys.argv[2], int(sys.argv[3]))
    if sys.argv[1:2] == ["--write"]:
        return write_model(sys.argv[2])
    machine.keep_large_blocks()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    print(machine.description(), flush=True)
    speeds, memories, notes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write", folder], check=True)
        for layout in LAYOUTS:
            for task in TASKS:
                sides = list(SIDES) if task == "train" else list(SIDES)[:2]
                found = compare(task, sides, os.path.join(folder, layout))
                both = [found[side]["peak"] / 1e6 for side in sides[:2]]
                memories.append([f"{layout}: peak memory, {task}, MB", *both, both[0] / both[1], "<= 1"])
                speeds += [[f"{layout}: {label}", *row] for label, *row in rates(task, found)]
                notes.append(f"{layout}: {described(task, found)}")
    compiling = {
        form: [statistics.median(compile_seconds(form, layers) for _ in range(3)) for layers in (8, 32)]
        for form in ("stacked", "layer by layer")
    }
    print(f"\nmedians of {RUNS}\n\n| | eqx_moe | transformers | ratio | goal |\n|---|---|---|---|---|")
    for label, mine, peer, ratio, goal in speeds + memories:
        digits = 0 if "MB" in label else 1
        print(f"| {label} | {mine:.{digits}f} | {peer:.{digits}f} | {ratio:.2f} | {goal} |")
    print(
        "\n| compiling the training step (narrow model) | 8 layers | 32 layers | ratio | goal |\n|---|---|---|---|---|"
    )
    for form, (few, many) in compiling.items():
        goal = "<= 1.5" if form == "stacked" else ""
        print(f"| {form}, seconds, medians of 3 | {few:.1f} | {many:.1f} | {many / few:.2f} | {goal} |")
    print()
    print("\n".join(notes))


if __name__ == "__main__":
    main()
