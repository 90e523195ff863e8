"""Time and peak memory of loading and saving a 1 GB Mixtral-layout checkpoint: eqx_moe beside transformers and NumPy.

    python benchmarks/load.py [FOLDER]     # needs the `oracle` extra; writes 4 GB (to a temporary folder by default)

Loaded are a checkpoint as eqx_moe writes it, which is mapped, and the same as transformers writes it, which is read.
Beside them stands `np.fromfile` of every tensor into an array of its own. Every load is a process of its own; the peak
is its VmHWM after the load less the one after the imports. Files are in the page cache. Saves stand beside writing the
same bytes in four files with fsync.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

RUNS = 5

CONFIG = """
import jax, eqx_moe
config = eqx_moe.MixtralConfig(
    vocab_size=8192, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=4, num_local_experts=9, max_position_embeddings=4096)
"""

WRITE = (
    CONFIG
    + """
eqx_moe.save_pretrained(eqx_moe.init(config, key=jax.random.key(0)), {folder!r}, max_shard_size="300MB")
from transformers import MixtralForCausalLM
MixtralForCausalLM.from_pretrained({folder!r}).save_pretrained({other!r}, max_shard_size="300MB")
"""
)

FROMFILE = """
import pathlib
import numpy as np
from eqx_moe.checkpoint import open_weights
def load(folder):
    with open_weights(pathlib.Path(folder)) as stored:
        return [
            (each.file.seek(each.entry.start), np.fromfile(each.file, np.float32, each.size // 4))
            for each in stored.values()
        ]
"""

OURS = """
import jax, eqx_moe, eqx_moe.hub
jax.numpy.zeros(1).block_until_ready()
def load(folder):
    model = eqx_moe.from_pretrained(folder, dtype="auto")
    jax.block_until_ready(jax.tree.leaves(model))
    return model
"""

THEIRS = """
import torch, transformers
from transformers import MixtralForCausalLM
def load(folder):
    return MixtralForCausalLM.from_pretrained(folder)
"""

SAVE = (
    CONFIG
    + """
import os, pathlib, shutil
import numpy as np
shutil.rmtree({folder!r}, ignore_errors=True)  # both write new files
model = eqx_moe.init(config, key=jax.random.key(0))
jax.block_until_ready(jax.tree.leaves(model))
leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(model)]
def plain(folder):
    pathlib.Path(folder).mkdir(exist_ok=True)
    for i in range(4):
        with open(f"{{folder}}/{{i}}", "wb") as file:
            for leaf in leaves[i::4]:
                file.write(leaf.data)
            file.flush()
            os.fsync(file.fileno())
def ours(folder):
    eqx_moe.save_pretrained(model, folder, max_shard_size="300MB")
load = {what}
"""
)

MEASURE = """
import json, time
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, start = peak(), time.perf_counter()
model = load({folder!r})
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""


def run(program: str) -> str:
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return found.stdout.strip().splitlines()[-1] if found.stdout.strip() else ""


def table(programs: dict[str, str], size: int) -> None:
    """Runs the programs in turns and prints the medians."""
    figures: dict[str, list] = {name: [] for name in programs}
    for _ in range(RUNS):
        for name, program in programs.items():
            figures[name].append(json.loads(run(program)))
    print(f"{'':34}{'seconds':>9}{'peak MB':>9}{'peak / checkpoint':>19}")
    for name, rows in figures.items():
        seconds, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:34}{seconds:9.2f}{peak / 1e6:9.0f}{peak / size:19.2f}")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        folder, other, saved = (str(root / name) for name in ("eqx_moe", "transformers", "saved"))
        run(WRITE.format(folder=folder, other=other))
        size = sum(file.stat().st_size for file in pathlib.Path(folder).glob("*.safetensors"))
        stack = 9 * 2048 * 1024 * 4
        print(f"checkpoint: {size / 1e6:.0f} MB, one expert stack: {stack / 1e6:.0f} MB; medians of {RUNS}")
        loads = {"eqx_moe": OURS, "transformers": THEIRS, "np.fromfile": FROMFILE}
        table(
            {
                f"{name}, file by {pathlib.Path(place).name}": program + MEASURE.format(folder=place)
                for place in (folder, other)
                for name, program in loads.items()
            },
            size,
        )
        saves = {"eqx_moe": "ours", "write and fsync": "plain"}
        program = SAVE + MEASURE
        table({name: program.format(what=what, folder=saved + what) for name, what in saves.items()}, size)


if __name__ == "__main__":
    main()
