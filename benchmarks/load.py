"""Time and memory of loading and saving 1 GB, Mixtral layout, float32: eqx_moe beside transformers, NumPy and the disk.

    python benchmarks/load.py            # needs the `oracle` extra; writes 4 GB to a temporary folder (TMPDIR)
    python benchmarks/load.py loading    # or saving: one half; some four minutes each

Every run is a process of its own; the ways take turns, and figures are medians of RUNS. Memory is what a process had at
most while it loaded or saved (VmHWM, reset before) less what it had then.

Loaded are two folders of the same values: as eqx_moe writes them, which it maps, and as transformers writes them, which
it has to read. The files are in the page cache. After the first load one value of every page is added up ("touch"), and
the same process drops the model and loads again, of which the fastest of AGAIN counts: memory that a virtual machine
has not used lately costs at its first touch what the host takes to provide it, and that is no work of any of these.
`np.fromfile` reads each tensor into an array of its own.

Saved is a model in memory: into a new folder, beside writing the same bytes in as many files with fsync; and over an
earlier model, beside files that are written over in place with fsync, and beside new files, fsync and rename.
"""

import gc
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import machine
import numpy as np

RUNS, AGAIN = 5, 3
SHAPE = dict(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2304,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
)
SHARDS, SHARD_SIZE = 4, "300MB"
WRITERS = ("eqx_moe", "transformers")


def measured(act: Callable[[], Any]) -> tuple[Any, float, float, int]:
    """What `act` gives, its seconds, its seconds of CPU, and the bytes of memory that it takes at most."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    result = act()
    return result, time.perf_counter() - start, time.process_time() - cpu, memory("VmHWM") - before


def memory(kind: str) -> int:
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(kind)).split()[1]) * 1024


# --- Loading: a way to load, and the arrays of what it gives --------------------------------------------------------


def with_eqx_moe(folder: str):
    import jax

    import eqx_moe
    import eqx_moe.hub  # what is imported lazily, before the clock runs

    jax.numpy.zeros(1).block_until_ready()

    def load():
        return jax.block_until_ready(eqx_moe.from_pretrained(folder, dtype="auto"))

    return load, lambda model: [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def with_transformers(folder: str):
    from transformers import MixtralForCausalLM

    def load():
        return MixtralForCausalLM.from_pretrained(folder)

    return load, lambda model: [parameter.detach().numpy() for parameter in model.parameters()]


def with_fromfile(folder: str):
    from eqx_moe.checkpoint import open_weights

    def load():
        with open_weights(pathlib.Path(folder)) as stored:
            return [
                np.fromfile(tensor.path, np.float32, tensor.size // 4, offset=tensor.entry.start)
                for tensor in stored.values()
            ]

    return load, list


LOADS = {"eqx_moe": with_eqx_moe, "transformers": with_transformers, "np.fromfile": with_fromfile}


def load(way: str, folder: str) -> list[float]:
    act, arrays = LOADS[way](folder)
    model, first, _, peak = measured(act)
    _, touch, *_ = measured(lambda: sum(float(array.reshape(-1)[::1024].sum()) for array in arrays(model)))
    again = []
    for _ in range(AGAIN):
        del model
        gc.collect()
        model, seconds, *_ = measured(act)
        again.append(seconds)
    return [first, min(again), touch, peak]


# --- Saving ---------------------------------------------------------------------------------------------------------


def save(way: str, folder: str, source: str) -> list[float]:
    import jax

    import eqx_moe
    import eqx_moe.hub

    model = eqx_moe.from_pretrained(source, dtype="auto")
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(model)]
    os.sync()

    def ours():
        eqx_moe.save_pretrained(model, folder, max_shard_size=SHARD_SIZE)

    def plain(ending: str = ""):
        os.makedirs(folder, exist_ok=True)
        for i in range(SHARDS):
            with open(f"{folder}/{i}{ending}", "wb") as file:
                for leaf in leaves[i::SHARDS]:
                    file.write(leaf.data)
                file.flush()
                os.fsync(file.fileno())

    def renamed():
        plain(".new")
        for i in range(SHARDS):
            os.replace(f"{folder}/{i}.new", f"{folder}/{i}")

    return list(measured({"eqx_moe": ours, "written": plain, "renamed": renamed}[way])[1:])


# --- The tables -----------------------------------------------------------------------------------------------------


def write_models(root: str) -> None:
    import jax
    from transformers import MixtralForCausalLM

    import eqx_moe

    ours, theirs = (os.path.join(root, writer) for writer in WRITERS)
    model = eqx_moe.init(eqx_moe.MixtralConfig(**SHAPE), key=jax.random.key(0))
    eqx_moe.save_pretrained(model, ours, max_shard_size=SHARD_SIZE)
    MixtralForCausalLM.from_pretrained(ours).save_pretrained(theirs, max_shard_size=SHARD_SIZE)
    for mine, their in zip(jax.tree.leaves(model), jax.tree.leaves(eqx_moe.from_pretrained(theirs)), strict=True):
        np.testing.assert_array_equal(mine, their)
    for folder in (ours, theirs):
        assert len(list(pathlib.Path(folder).glob("*.safetensors"))) == SHARDS, os.listdir(folder)
    os.sync()


def checkpoint_size(root: str) -> int:
    """Bytes of the files of weights that eqx_moe wrote."""
    return sum(file.stat().st_size for file in pathlib.Path(root, "eqx_moe").glob("*.safetensors"))


def run(*arguments: str) -> list[float]:
    """The figures of a process of its own."""
    found = subprocess.run([sys.executable, __file__, "--work", *arguments], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def medians(ways: dict[Any, Callable[[], list[float]]]) -> dict[Any, list[float]]:
    """The ways take turns; the median of each of their figures."""
    runs: dict[Any, list[list[float]]] = {way: [] for way in ways}
    for _ in range(RUNS):
        for way, act in ways.items():
            runs[way].append(act())
    return {way: [statistics.median(figures) for figures in zip(*rows, strict=True)] for way, rows in runs.items()}


def compare_loads(root: str) -> None:
    size = checkpoint_size(root)
    found = medians(
        {
            (writer, way): lambda writer=writer, way=way: run("load", way, f"{root}/{writer}")
            for writer in WRITERS
            for way in LOADS
        }
    )
    print("\n| files written by | loaded with | first load, s | loaded again, s | touch, s | peak MB |")
    print("|---|---|---|---|---|---|")
    for (writer, way), (first, again, touch, peak) in found.items():
        print(f"| {writer} | {way} | {first:.3f} | {again:.3f} | {touch:.3f} | {peak / 1e6:.0f} |")
    print("\n| goal for loading with eqx_moe | files by eqx_moe: first, again | files by transformers |\n|---|---|---|")
    for label, peer, ratio in (
        ("within 1.5x of the time of np.fromfile", "np.fromfile", lambda mine, theirs: mine / theirs),
        ("at least 2x as fast as transformers", "transformers", lambda mine, theirs: theirs / mine),
    ):
        cells = [
            ", ".join(f"{ratio(found[writer, 'eqx_moe'][i], found[writer, peer][i]):.2f}" for i in (0, 1))
            for writer in WRITERS
        ]
        print(f"| {label} | {cells[0]} | {cells[1]} |")
    peaks = [f"{found[writer, 'eqx_moe'][3] / size:.2f}" for writer in WRITERS]
    print(f"| peak within 1.15x of the model's bytes | {peaks[0]} | {peaks[1]} |")


def compare_saves(root: str) -> None:
    new, over = f"{root}/new", f"{root}/over"

    def into_new(way: str) -> list[float]:
        shutil.rmtree(new, ignore_errors=True)
        return run("save", way, new, f"{root}/transformers")

    def over_earlier(way: str) -> list[float]:
        # The earlier model is there already: each way has a folder that it has saved to before.
        if not os.path.exists(f"{over} {way}"):
            run("save", way, f"{over} {way}", f"{root}/transformers")
        return run("save", way, f"{over} {way}", f"{root}/transformers")

    found = medians(
        {
            ("a new folder", "eqx_moe"): lambda: into_new("eqx_moe"),
            ("a new folder", "write and fsync"): lambda: into_new("written"),
            ("an earlier model", "eqx_moe"): lambda: over_earlier("eqx_moe"),
            ("an earlier model", "written over in place, fsync"): lambda: over_earlier("written"),
            ("an earlier model", "new files, fsync, rename"): lambda: over_earlier("renamed"),
        }
    )
    print("\n| saved into | how | seconds | eqx_moe / this | CPU seconds | peak MB beside the model |")
    print("|---|---|---|---|---|---|")
    for (where, way), (seconds, cpu, peak) in found.items():
        ratio = found[where, "eqx_moe"][0] / seconds
        print(f"| {where} | {way} | {seconds:.2f} | {ratio:.2f} | {cpu:.2f} | {peak / 1e6:.0f} |")


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work, *arguments = sys.argv[2:]
        print(json.dumps({"load": load, "save": save}[work](*arguments)))
        return
    if sys.argv[1:2] == ["--write"]:
        return write_models(sys.argv[2])
    halves = {"loading": compare_loads, "saving": compare_saves}
    wanted = sys.argv[1:] or list(halves)
    if unknown := set(wanted) - set(halves):
        raise SystemExit(f"{', '.join(sorted(unknown))}? Give loading, saving, or nothing for both.")
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    print(machine.description(), flush=True)
    with tempfile.TemporaryDirectory() as root:
        subprocess.run([sys.executable, __file__, "--write", root], check=True)
        size, busy = checkpoint_size(root) / 1e6, os.getloadavg()[0]
        print(f"{size:.0f} MB in {SHARDS} files; medians of {RUNS}; load average {busy:.1f}")
        for half in wanted:
            halves[half](root)


if __name__ == "__main__":
    main()
