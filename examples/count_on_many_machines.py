"""Train one tokenizer on texts that lie on many machines: each counts the words of its own, and only counts travel.

    python examples/count_on_many_machines.py part-*.txt --vocab-size 8000 --out tokenizer.json

Here the workers are processes of this machine. With `--ray` they are Ray tasks (`pip install ray`), which then have to
see the same files. On Spark the same function runs in `mapPartitions`; see `on_spark`.
"""

import argparse
import concurrent.futures
import pathlib
import tempfile
from collections.abc import Iterable

from eqx_moe.tokenizer import Counted, count_files, count_texts, save_tokenizer, train_bpe_from_counts, write_counts
from eqx_moe.tokenizer.counts_file import add_counts, read_all

PATTERN = "llama3"


def count(path: str) -> bytes:
    """The counts of one file, as the bytes of a counts file: what a worker sends."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "counts")
        write_counts(out, Counted(count_files([path], PATTERN, threads=1, progress=False), PATTERN, False))
        return out.read_bytes()


def on_processes(paths: list[str], folder: pathlib.Path) -> list[pathlib.Path]:
    """Counts with processes, and keeps what they send."""
    with concurrent.futures.ProcessPoolExecutor() as pool:
        return keep(pool.map(count, paths), folder)


def on_ray(paths: list[str], folder: pathlib.Path) -> list[pathlib.Path]:
    """The same with Ray tasks."""
    import ray  # pyright: ignore[reportMissingImports]

    remote = ray.remote(count)
    return keep(ray.get([remote.remote(path) for path in paths]), folder)


def on_spark(texts, folder: pathlib.Path) -> list[pathlib.Path]:
    """The same with a Spark RDD of texts (`spark.read.text(...).rdd.map(lambda row: row.value)`)."""

    def count_partition(part: Iterable[str]) -> Iterable[bytes]:
        with tempfile.TemporaryDirectory() as scratch:
            out = pathlib.Path(scratch, "counts")
            write_counts(out, Counted(count_texts(part, PATTERN, threads=1, progress=False), PATTERN, False))
            yield out.read_bytes()

    return keep(texts.mapPartitions(count_partition).toLocalIterator(), folder)


def keep(counts: Iterable[bytes], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes counts as they arrive, so that they need not be in memory together."""
    files = []
    for data in counts:
        files.append(folder / f"{len(files)}.counts")
        files[-1].write_bytes(data)
    return files


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--ray", action="store_true", help="count in Ray tasks")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        files = (on_ray if options.ray else on_processes)(options.files, folder)
        words = add_counts([counted.words for counted in read_all(files)], folder)
        save_tokenizer(train_bpe_from_counts(words, options.vocab_size, PATTERN), options.out)


if __name__ == "__main__":
    main()
