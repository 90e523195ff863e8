"""`max_memory` over a text with more words than fit, in a program of its own that watches its memory."""

import subprocess
import sys

import bpe
import numpy as np
import pytest

PROGRAM = """
import hashlib, sys, threading, time
from eqx_moe.tokenizer import count_files, train_bpe
from eqx_moe.tokenizer.report import make_report
from eqx_moe.tokenizer.train import Training

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1000 for line in file if line.startswith("RssAnon"))

train_bpe([], 300, "gpt2")  # Kernels are loaded, or compiled.
base, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous() - base)
        time.sleep(0.002)
watching = threading.Thread(target=watch)
watching.start()
bound = sys.argv[2] if len(sys.argv) > 2 else None
training = Training(2000, "gpt2", [], 0, None, threads=2, max_memory=bound)
words = count_files([sys.argv[1]], "gpt2", **training.counting())
merges = training.merge(words)
(tokenizer,) = training.tokenizers(merges)
if bound:
    make_report(words, merges, characters=False, special_tokens=[])
done = True
watching.join()
print(peak, hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""


def write(path, size: int):
    """Letters and blanks drawn at random: a new word every 16 bytes or so."""
    random = np.random.default_rng(5678)
    letters = np.frombuffer(b"etaoinshrdlcumwfgypbvk", np.uint8)
    shares = np.arange(len(letters), 0, -1.0)
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 22):
            text = letters[random.choice(len(letters), 1 << 22, p=shares / shares.sum())]
            text[random.random(len(text)) < 0.14] = ord(" ")
            file.write(text.tobytes())


def train(path, *bound: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, path, *bound], capture_output=True, text=True, check=True)
    peak, digest = done.stdout.split()
    return int(peak), digest


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon stands in Linux's /proc")
@pytest.mark.parametrize("size", [48_000_000, pytest.param(400_000_000, marks=pytest.mark.full)])
def test_max_memory_bounds_training(size, tmp_path):
    """At 400 MB: 24 million different words."""
    write(tmp_path / "words.txt", size)
    peak, digest = train(tmp_path / "words.txt", "150MB")
    assert peak < 150_000_000
    free, expected = train(tmp_path / "words.txt")
    assert digest == expected
    assert free > 150_000_000, "a text that fits proves nothing"


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon stands in Linux's /proc")
def test_max_memory_bounds_training_on_two_gigabytes(tmp_path):
    """20 million different words."""
    bpe.write_rare_words(tmp_path / "words.txt", 20_000_000)
    peak, digest = train(tmp_path / "words.txt", "200MB")
    print(f"{peak / 1e6:.0f} MB")
    assert peak < 200_000_000
    free, expected = train(tmp_path / "words.txt")
    print(f"{free / 1e6:.0f} MB without a bound")
    assert digest == expected
