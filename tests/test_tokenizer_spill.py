"""Counting within a bound of memory: the same counts, by way of the disk."""

import gzip
import subprocess
import sys

import bpe
import numpy as np
import pytest

from eqx_moe.tokenizer import count
from eqx_moe.tokenizer.count import count_files, count_texts


def text_of(seed: int, words: int) -> str:
    """Words of 1 to 40 letters of three alphabets, many of which are beginnings of others."""
    rng = np.random.default_rng(seed)
    alphabets = [list("ab"), list("éü\0"), list("日本")]
    parts = []
    for _ in range(words):
        length = int(min(rng.geometric(0.15), 40))
        parts.append("".join(rng.choice(alphabets[rng.integers(3)], length)))
    return " ".join(parts)


def same(one, two) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("text", "offsets", "counts"))


@pytest.fixture
def small(monkeypatch):
    """Bounds of a few hundred kilobytes are possible, as if kernels took no memory."""
    monkeypatch.setattr(count, "_FIXED", 0)
    monkeypatch.setattr(count, "_LEAST", 1 << 15)


@pytest.fixture
def runs(monkeypatch):
    """How many runs each merge began with."""
    merged, seen = count.Spill.merged, []
    monkeypatch.setattr(count.Spill, "merged", lambda spill: seen.append(len(spill._bounds) - 1) or merged(spill))
    return seen


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("pattern", ["gpt2", "metaspace", r"[a-z]+|\S"])
def test_same_counts_by_way_of_the_disk(threads, pattern, tmp_path, small, runs):
    files = [tmp_path / "a.txt", tmp_path / "b.gz"]
    files[0].write_text(text_of(1, 5000))
    files[1].write_bytes(gzip.compress(text_of(2, 5000).encode()))
    options = dict(pattern=pattern, threads=threads, lines=pattern.startswith("["))
    if options["lines"]:  # A regular expression's documents cannot be cut: they have to be short.
        files[0].write_text(text_of(1, 5000).replace(" a", "\na"))
        files[1].write_bytes(gzip.compress(text_of(2, 5000).replace(" a", "\na").encode()))
    bounded = count_files(files, max_memory=threads * 120_000, **options)
    assert same(bounded, count_files(files, **options))
    assert runs and runs[0] > 2


def test_texts_and_nothing(small, runs):
    texts = [text_of(seed, 40) for seed in range(70)]
    assert same(count_texts(texts, "llama3", threads=2, max_memory="200KB"), count_texts(texts, "llama3"))
    assert runs[0] > 2
    assert same(count_texts([], "gpt2", max_memory="200KB"), count_texts([], "gpt2"))
    assert same(count_texts(["a"], "gpt2", max_memory="200KB"), count_texts(["a"], "gpt2"))


def test_blocks_of_the_merge(small, monkeypatch, tmp_path):
    """Merging goes on where a block was full, of words and of bytes; a word may be longer than a block."""
    from eqx_moe.tokenizer import spill

    text = text_of(3, 6000) + " " + "x" * 3000
    expected = count_texts([text], "gpt2")
    (tmp_path / "a.txt").write_text(text)
    for block, size in ((7, 1 << 19), (1 << 14, 100)):
        monkeypatch.setattr(spill, "_BLOCK", block)
        monkeypatch.setattr(spill, "_BLOCK_BYTES", size)
        assert same(count_files([tmp_path / "a.txt"], "gpt2", threads=1, max_memory="400KB"), expected)


def test_too_little_memory(small, tmp_path):
    with pytest.raises(ValueError, match=r"`max_memory` must be at least 65,536 bytes for 2 threads; got 5000"):
        count_texts(["a"], "gpt2", threads=2, max_memory=5000)
    with pytest.raises(ValueError, match=r'max_memory.*"200 sheep"|200 sheep'):
        count_texts(["a"], "gpt2", max_memory="200 sheep")
    (tmp_path / "a.txt").write_text("a" * 90_000)
    with pytest.raises(ValueError, match=r"cannot be cut.*90,000 bytes.*1,440,000 would do") as caught:
        count_files([tmp_path / "a.txt"], "gpt2", threads=1, max_memory=100_000)
    assert len(count_files([tmp_path / "a.txt"], "gpt2", threads=1, max_memory=1_440_000)) == 1
    assert "got 100,000" in str(caught.value)


_MEASURED = """
import os, pathlib, sys, threading, time
from eqx_moe.tokenizer.count import count_files

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10

before, highest, done = anonymous(), 0, False

def watch():
    global highest
    while not done:
        highest = max(highest, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
counts = count_files([sys.argv[1]], "gpt2", threads=2, max_memory=int(sys.argv[2]), progress=False)
done = True
watcher.join()
print(highest - before, len(counts), int(counts.counts.sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("words", "bound"),
    [(300_000, 40 << 20), pytest.param(20_000_000, 200 * 10**6, marks=pytest.mark.full)],
)
def test_the_bound_holds(words, bound, tmp_path, root):
    """All words are different: without a bound, they would take some 100 bytes each, 2 GB for the larger number."""
    bpe.write_rare_words(tmp_path / "a.txt", words)
    # The kernels are compiled, if they are, elsewhere.
    count_texts(["a"], "gpt2", max_memory="100MB")
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "a.txt"), str(bound)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    peak, different, total = map(int, result.stdout.split())
    assert different > words * 0.99 and total > 15 * words
    assert peak <= bound
