"""Time and peak memory of loading a 1 GB Mixtral-layout checkpoint: eqx_moe beside transformers.

    python benchmarks/load.py [FOLDER]     # needs the `oracle` extra; writes 1 GB (to a temporary folder by default)

Every load is a process of its own; the peak is its VmHWM after the load less the one after the imports. Files
are in the page cache.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

RUNS = 5

WRITE = """
import jax, eqx_moe
config = eqx_moe.MixtralConfig(
    vocab_size=8192, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=4, num_local_experts=9, max_position_embeddings=4096)
eqx_moe.save_pretrained(eqx_moe.init(config, key=jax.random.key(0)), {folder!r}, max_shard_size="300MB")
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


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve())
        run(WRITE.format(folder=folder))
        size = sum(file.stat().st_size for file in pathlib.Path(folder).glob("*.safetensors"))
        stack = 9 * 2048 * 1024 * 4
        print(f"checkpoint: {size / 1e6:.0f} MB, one expert stack: {stack / 1e6:.0f} MB; medians of {RUNS}")
        programs = {"eqx_moe": OURS, "transformers": THEIRS}
        figures: dict[str, list] = {name: [] for name in programs}
        for _ in range(RUNS):
            for name, program in programs.items():
                figures[name].append(json.loads(run(program + MEASURE.format(folder=folder))))
        print(f"{'':14}{'seconds':>9}{'peak MB':>9}{'peak / checkpoint':>19}")
        for name, rows in figures.items():
            seconds, peak = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{name:14}{seconds:9.2f}{peak / 1e6:9.0f}{peak / size:19.2f}")


if __name__ == "__main__":
    main()
