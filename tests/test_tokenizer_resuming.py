"""Counting that is interrupted goes on where it was, and gives the same counts."""

import functools
import gzip
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from test_tokenizer_counts import hard_text
from tokenizers import Tokenizer

from eqx_moe.errors import DataError
from eqx_moe.tokenizer import count, resuming, train_bpe
from eqx_moe.tokenizer.count import PATTERNS, START, count_files, count_parts
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.counts_file import add_counts


def parts_of(counts: WordCounts) -> list[bytes]:
    return [np.ascontiguousarray(part).tobytes() for part in (counts.text, counts.offsets, counts.counts)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An empty file, a plain one, packed ones, and another; chunks of which are small."""
    monkeypatch.setattr(count, "CHUNK", 700)
    texts = [hard_text(seed, parts).encode() for seed, parts in ((4, 3000), (5, 2500), (6, 2000), (7, 100))]
    contents = {"a.txt": b"", "b.txt": texts[0], "c.gz": gzip.compress(texts[1])}
    if importlib.util.find_spec("zstandard"):
        import zstandard

        contents["d.zst"] = zstandard.compress(texts[2])
    contents["e.txt"] = texts[3]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [str(tmp_path / name) for name in contents]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("pattern", [*PATTERNS, r"\p{L}+|\p{N}"])
def test_each_part_may_be_the_last_of_a_run(files, pattern, lines):
    """Counted anew from the end of each part on."""
    place, parts = START, []
    while following := next(count_parts(files, pattern, every=1500, start=place, lines=lines), None):
        place, words = following
        parts.append(words)
    assert len(parts) > (4 if pattern in PATTERNS or lines else 3)
    assert parts_of(add_counts(parts)) == parts_of(count_files(files, pattern, lines=lines))


def interrupting_after(chunks: int, file: str, seconds: float = 0):
    """`file_chunks`, with an interrupt after some chunks of a file, and some time."""
    really = count.file_chunks

    def file_chunks(*args):
        for number, chunk in enumerate(really(*args)):
            if number == chunks and args[0] == file:
                time.sleep(seconds)
                raise KeyboardInterrupt
            yield chunk

    return file_chunks


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("stop_at", [0, 1, 5, 14])
def test_an_interrupt_comes_after_what_was_counted(files, monkeypatch, threads, stop_at):
    interrupting = interrupting_after(stop_at, files[1])
    with monkeypatch.context() as patch:
        patch.setattr(count, "file_chunks", interrupting)
        parts = count_parts(files, "gpt2", every=1 << 30, threads=threads)
        found = []
        with pytest.raises(KeyboardInterrupt):
            for part in parts:
                found.append(part)
    # What no thread had begun is left to the next run.
    assert len(found) <= 1 and (found or stop_at <= 2 * threads + 1)
    start = found[0][0] if found else START
    rest = [words for _, words in count_parts(files, "gpt2", every=1 << 30, start=start)]
    assert parts_of(add_counts([*(words for _, words in found), *rest])) == parts_of(count_files(files, "gpt2"))


def test_an_interrupt_after_text_that_cannot_be_counted(files, tmp_path, monkeypatch):
    """Some of its words are among the others already."""
    (tmp_path / "b.txt").write_bytes(b"many words " * 100 + b"\xff" + b"many words " * 100)
    monkeypatch.setattr(count, "file_chunks", interrupting_after(2, files[1], seconds=1))
    parts = count_parts(files, "gpt2", every=1 << 30, threads=1)
    with pytest.raises(DataError, match="DATA-UTF8"):
        next(parts)


@pytest.mark.parametrize("lines", [False, True])
def test_progress_goes_on_too(files, lines):
    shown = []
    (place, _), *_ = count_parts(files, "gpt2", every=1500, lines=lines)
    list(count_parts(files, "gpt2", every=1500, start=place, lines=lines, progress=lambda *done: shown.append(done)))
    sizes, totals = zip(*shown, strict=True)
    assert 1500 <= place.done < sizes[0] and list(sizes) == sorted(sizes)
    assert len(set(totals)) == 1 and sizes[-1] <= totals[0]


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run):
    return functools.partial(run, "tokenizer")


@pytest.fixture
def starts(monkeypatch):
    """Each call that counts, as the bytes that were counted before, parts being small; `stop` interrupts the next one
    after so many parts."""

    class Starts(list):
        stop: int | None = None

    starts, really = Starts(), resuming.count_parts

    def count_parts(*args, start, **options):
        starts.append(start.done)
        for number, part in enumerate(really(*args, start=start, **options)):
            if number == starts.stop:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(resuming, "_EVERY", 1500)
    monkeypatch.setattr(resuming, "count_parts", count_parts)
    return starts


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_what_is_counted_is_not_counted_again(run, files, tmp_path, starts, stop):
    out = tmp_path / "t.json"
    arguments = ["train", *files, "--vocab-size", 300, "--out", out]
    starts.stop = stop
    status, said, err = run(*arguments)
    assert (status, said) == (130, "") and ("goes on" in err) == (stop > 0)
    starts.stop = None
    status, _, err = run(*arguments)
    assert status == 0 and ("were counted before" in err) == (stop > 0)
    assert starts[0] == 0 and (starts[1] >= 1500 * stop) == (starts[1] > 0 or stop == 0)
    assert not (tmp_path / "t.json.unfinished").exists()
    assert Tokenizer.from_file(str(out)).to_str() == train_bpe(files, 300).to_str()


@pytest.mark.parametrize("change", ["a file", "cut off", "--lines", "--pattern", "more files"])
def test_what_has_changed_is_counted_again(run, files, tmp_path, starts, change):
    """From there on; what was counted of files before it stays."""
    out = tmp_path / "t.json"
    arguments = ["train", *files, "--vocab-size", 300, "--out", out]
    starts.stop = 5
    assert run(*arguments)[0] == 130
    kept = sorted((tmp_path / "t.json.unfinished").iterdir())
    assert len(kept) == 5
    options: dict[str, Any] = {}
    starts.stop = None
    if change == "a file":
        (tmp_path / "b.txt").write_bytes(b"wholly other words " * 9)
    elif change == "cut off":
        kept[1].write_bytes(kept[1].read_bytes()[:-1])
    elif change == "more files":
        files.append(files[1])
        arguments.insert(2, files[1])
        files[:] = [files[0], files[-1], *files[1:-1]]
    else:
        options = {"lines": True} if change == "--lines" else {"pattern": "gpt2"}
        arguments += [change] if change == "--lines" else [change, "gpt2"]
    assert run(*arguments)[0] == 0
    assert starts[1] == 0 if options or change == "a file" else starts[1] > 1400
    assert Tokenizer.from_file(str(out)).to_str() == train_bpe(files, 300, **options).to_str()


def test_an_error_says_that_counts_are_kept(run, tmp_path, files, starts):
    (tmp_path / "f.txt").write_bytes(b"abc\xff")
    arguments = ["train", *files, tmp_path / "f.txt", "--vocab-size", 300, "--out", tmp_path / "t.json"]
    status, _, err = run(*arguments)
    assert status == 1 and "DATA-UTF8" in err and "t.json.unfinished" in err and "goes on" in err
    assert "Traceback" not in err and len(err) < 1000
    (tmp_path / "f.txt").write_text("abc")
    status, _, err = run(*arguments)
    assert status == 0 and starts[1] > 0


def test_a_file_that_is_gone_meanwhile(run, files, tmp_path, starts):
    arguments = ["count", *files, "--out", tmp_path / "c.counts"]
    starts.stop = 1
    assert run(*arguments)[0] == 130
    os.remove(files[-1])
    status, _, err = run(*arguments)
    assert status == 1 and "DATA-FILE" in err and "c.counts.unfinished" in err


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(k, marks=pytest.mark.full) for k in range(3, 41))])
def test_ctrl_c_at_a_random_moment(tmp_path, seed):
    """A real signal, wherever it hits: nothing half-written, and the next run gives the whole result."""
    text = tmp_path / "a.txt"
    text.write_text(hard_text(8, 10_000) * 40, newline="")
    out, pattern = tmp_path / "t.json", r"\p{L}+|\p{N}"  # Slow, so that counting takes half of the time.
    options = ["--lines", "--pattern", pattern, "--vocab-size", "300", "--out", out]
    line = [sys.executable, "-m", "eqx_moe.cli", "tokenizer", "train", text, *options]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    after = random.Random(seed).uniform(0.3, 3.5)
    print(f"interrupted after {after:.3f} s")
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    print(err)
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert {path.name for path in tmp_path.iterdir()} <= {"a.txt", "t.json.unfinished", "t.json"}
    assert subprocess.run(line, capture_output=True).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "t.json"}
    assert Tokenizer.from_file(str(out)).to_str() == train_bpe(text, 300, pattern, lines=True).to_str()
