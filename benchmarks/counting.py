"""Counting words: bytes a second on one thread and on two, and what the first use of the kernels costs.

    python benchmarks/counting.py /tmp/large/books-en.txt [--patterns gpt2 llama3] [--runs 7]

One process, its kernels loaded and the file in the page cache; one thread and two take turns. The first use is a
process of its own with an empty cache of kernels, and then one that finds them there.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import machine

from eqx_moe.tokenizer import count_files

FIRST_USE = """
import time, eqx_moe.tokenizer.train as training
start, cpu = time.perf_counter(), time.process_time()
training.train_bpe_from_iterator(["It's a text. "] * 9, 300, "gpt2", progress=False)
print(time.perf_counter() - start, time.process_time() - cpu)
"""


def count(path: str, pattern: str, threads: int) -> float:
    start = time.perf_counter()
    count_files([path], pattern, threads=threads, progress=False)
    return time.perf_counter() - start


def first_use() -> None:
    with tempfile.TemporaryDirectory() as empty:
        for what in ("compiled", "loaded"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST_USE],
                env=os.environ | {"NUMBA_CACHE_DIR": empty},
                capture_output=True,
                text=True,
                check=True,
            )
            seconds, cpu = map(float, done.stdout.split())
            print(f"kernels {what}: {seconds:.2f} s, {cpu:.2f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--patterns", nargs="+", default=["gpt2", "llama3"])
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    print(machine.description("eqx_moe", "numba"))
    print("\n| text | pattern | one thread, MB/s (slowest, fastest) | two threads | two / one |")
    print("| --- | --- | --- | --- | --- |")
    for path in args.files:
        size = os.path.getsize(path) / 1e6
        for pattern in args.patterns:
            count(path, pattern, 2)
            runs = [(count(path, pattern, 1), count(path, pattern, 2)) for _ in range(args.runs)]
            one, two = ([size / seconds for seconds in each] for each in zip(*runs, strict=True))
            cells = [f"{statistics.median(each):.0f} ({min(each):.0f}, {max(each):.0f})" for each in (one, two)]
            ratio = statistics.median(two) / statistics.median(one)
            print(f"| {pathlib.Path(path).stem} | {pattern} | {cells[0]} | {cells[1]} | {ratio:.2f} |", flush=True)
    print()
    first_use()


if __name__ == "__main__":
    main()
