"""Training a byte-pair encoding: eqx_moe beside Hugging Face's tokenizers, gigatoken, ffbpe and rustbpe.

    pip install -e '.[bench]'
    python benchmarks/enlarge.py /path/to/data /tmp/large
    python benchmarks/bpe.py /tmp/large/books-en.txt /tmp/large/multilingual.txt [--runs 5] [--only NAME...]

A vocabulary of 32,000, GPT-2's pattern, files on disk and in the page cache. Each run is a process of its own; the runs
of all trainers take turns. The clock covers the training call, the loading of compiled kernels included; imports stand
apart. Memory is the peak of anonymous memory (RssAnon, looked at every 5 ms) above what the imports left, without
mapped files. A first run, which compiles, is not counted.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

import machine

SIZE = 32_000
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

OURS = """
from eqx_moe.tokenizer import train_bpe
def train(path):
    tokenizer = train_bpe(path, {size}, "gpt2", lines={lines}, progress=False)
    return tokenizer.to_str()
"""

HUGGING_FACE = """
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
def train(path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size={size}, initial_alphabet=alphabet, show_progress=False)
    if {lines}:
        tokenizer.train([path], trainer)
    else:
        with open(path, newline="") as file:
            tokenizer.train_from_iterator([file.read()], trainer)
    return tokenizer.to_str()
"""

GIGATOKEN = """
import gigatoken
def train(path):
    vocabulary, merges = gigatoken.train_bpe(gigatoken.TextFileSource([path]), {size}, [])
    return merges
"""

FFBPE = """
from ffbpe import BpeTrainer, PreTokenizer
def train(path):
    with open(path, newline="") as file:
        text = file.read()
    counter = PreTokenizer([], pat_str={pattern!r}).word_counter()
    counter.add_source([text])
    trainer = BpeTrainer([], initial_alphabet="byte_level", tie_break="smallest_pair_id")
    trainer.add_word_counter(counter)
    trainer.train({size})
    return trainer.validate_model()
"""

RUSTBPE = """
import rustbpe
def train(path):
    with open(path, newline="") as file:
        text = file.read()
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter([text]), {size}, pattern={pattern!r})
    return tokenizer
"""

MEASURE = """
import sys, time
began = time.perf_counter()
{code}
print("imported", time.perf_counter() - began, flush=True)
sys.stdin.readline()
began = time.perf_counter()
result = train(sys.argv[1])
print("trained", time.perf_counter() - began, flush=True)
"""

TRAINERS = {
    "eqx_moe": (OURS, False),
    "gigatoken": (GIGATOKEN, False),
    "ffbpe": (FFBPE, False),
    "rustbpe (ties otherwise)": (RUSTBPE, False),
    "tokenizers": (HUGGING_FACE, False),
    "eqx_moe, by lines": (OURS, True),
    "tokenizers, by lines": (HUGGING_FACE, True),
}


def anonymous(process: int) -> float:
    """A process's anonymous memory in MB."""
    try:
        with open(f"/proc/{process}/status") as file:
            return next((int(line.split()[1]) / 1000 for line in file if line.startswith("RssAnon")), 0.0)
    except OSError:
        return 0.0


def run(name: str, path: pathlib.Path) -> tuple[float, float, float]:
    """Seconds of imports, seconds of training, and the peak of memory in MB."""
    code, lines = TRAINERS[name]
    program = MEASURE.format(code=code.format(size=SIZE, lines=lines, pattern=GPT2))
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        imported = float(process.stdout.readline().split()[-1])
        base = peak = anonymous(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        said = [line for line in process.stdout if line.startswith("trained")]
    assert process.returncode == 0 and said, f"{name} failed"
    return imported, float(said[0].split()[-1]), peak - base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    options = parser.parse_args()
    print(machine.description("eqx_moe", "tokenizers", "gigatoken", "ffbpe", "rustbpe"))
    for path in options.files:
        print(f"\n{path.name}, {path.stat().st_size / 1e6:.0f} MB\n")
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in options.only}
        for name in options.only:
            if name.startswith("eqx_moe"):
                run(name, path)  # Compiles.
        for _ in range(options.runs):
            for name in options.only:
                results[name].append(run(name, path))
        print("| trainer | s | fastest, slowest | MB | imports s | eqx_moe is |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, runs in results.items():
            imports, seconds, memory = (statistics.median(column) for column in zip(*runs, strict=True))
            ours = "eqx_moe, by lines" if name.endswith("by lines") else "eqx_moe"
            factor = seconds / statistics.median(each[1] for each in results[ours]) if ours in results else float("nan")
            times = [each[1] for each in runs]
            print(
                f"| {name} | {seconds:.2f} | {min(times):.2f}, {max(times):.2f} | {memory:.0f} | {imports:.2f} "
                f"| {factor:.1f}x as fast |",
                flush=True,
            )


if __name__ == "__main__":
    main()
