"""`eqx-moe tokenizer`: what it writes, how it goes on after an interruption, and how it fails."""

import functools
import json
import re
import subprocess
import sys

import bpe
import numpy as np
import pytest
from tokenizers import Tokenizer

from eqx_moe.tokenizer import Counted, count_texts, report, train_bpe, write_counts
from eqx_moe.tokenizer.report import as_page, as_terminal, make_report
from eqx_moe.tokenizer.train import Training

SHORT = "It's 1234 o'clock! Naïve café, 日本語の文章です。\nHe said: 'We'll see'\r\n" * 5


@pytest.fixture
def run(run):
    return functools.partial(run, "tokenizer")


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for i, path in enumerate(paths):
        path.write_text(SHORT * (i + 1), newline="")
    return paths


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def test_help_loads_nothing():
    code = """
import sys
from eqx_moe.cli import main
statuses = [main(["tokenizer", *name, "--help"]) for name in ([], ["train"], ["count"], ["merge-counts"])]
print(statuses, sorted({"jax", "numba", "numpy", "tokenizers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[0, 0, 0, 0] []"), done.stderr
    assert done.stdout.count("examples:\n  eqx-moe tokenizer") == 3


@pytest.mark.parametrize(
    "line", ["", "train", "train a.txt", "count a.txt", "merge-counts a", "train a --out x --vocab-size many"]
)
def test_wrong_usage_is_status_2(run, line):
    status, out, err = run(*line.split())
    assert (status, out) == (2, "") and "usage:" in err


def test_train(run, files, tmp_path):
    out = tmp_path / "tokenizer.json"
    status, said, _ = run("train", *files, "--vocab-size", 300, "--pattern", "qwen2", "--out", out, "--lines")
    assert (status, said) == (0, f"300 tokens: {out}\n")
    assert Tokenizer.from_file(str(out)).to_str() == train_bpe(files, 300, "qwen2", lines=True).to_str()
    assert names(tmp_path) == ["a.txt", "b.txt", "c.txt", "tokenizer.json"]


def test_a_folder_with_everything(run, files, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    arguments = ["--special-tokens", "<s>", "</s>", "--eos-token", "</s>", "--chat-template", template]
    status, _, _ = run("train", *files, "--vocab-size", 300, "--out", tmp_path / "out", *arguments)
    assert status == 0
    assert names(tmp_path / "out") == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_several_sizes(run, files, tmp_path):
    status, said, _ = run("train", *files, "--vocab-size", 270, 300, "--out", tmp_path / "t.json")
    assert status == 0 and said.count("tokens: ") == 2
    for size in (270, 300):
        assert Tokenizer.from_file(str(tmp_path / f"t-{size}.json")).to_str() == train_bpe(files, size).to_str()


def test_several_folders_keep_their_whole_name(run, files, tmp_path):
    assert run("train", files[0], "--vocab-size", 270, 300, "--out", tmp_path / "my-v1.5")[0] == 0
    assert names(tmp_path)[-2:] == ["my-v1.5-270", "my-v1.5-300"]
    assert names(tmp_path / "my-v1.5-300") == ["tokenizer.json", "tokenizer_config.json"]


def test_counts_add_up_to_the_same_tokenizer(run, files, tmp_path):
    counts = [tmp_path / f"{i}.counts" for i in range(3)]
    for file, out in zip(files, counts, strict=True):
        assert run("count", file, "--pattern", "gpt2", "--out", out)[0] == 0
    status, said, _ = run("merge-counts", *counts, "--out", tmp_path / "all.counts")
    assert status == 0 and "different words" in said
    whole = train_bpe(files, 300, "gpt2").to_str()
    for given in ([tmp_path / "all.counts"], counts):
        out = tmp_path / "t.json"
        assert run("train", "--from-counts", *given, "--vocab-size", 300, "--out", out)[0] == 0
        assert Tokenizer.from_file(str(out)).to_str() == whole
    assert not [name for name in names(tmp_path) if name.startswith(".") or "unfinished" in name]


def test_reports(run, files, tmp_path):
    arguments = ["train", *files, "--vocab-size", 300, "--out", tmp_path / "t.json", "--report"]
    status, said, _ = run(*arguments)
    size = sum(file.stat().st_size for file in files)
    for part in (f"{size:,} bytes", "bytes per token", "LATIN", "CJK", "longest tokens", "       256   1.00"):
        assert part in said
    status, _, err = run(*arguments, tmp_path / "r.html")
    assert status == 0, err
    page = (tmp_path / "r.html").read_text()
    assert status == 0 and f"{size:,} bytes" in page and "<svg" in page and "</html>" in page


def test_a_report_may_lie_in_the_folder_that_is_made(run, files, tmp_path):
    out = tmp_path / "out"
    status, _, err = run("train", files[0], "--vocab-size", 300, "--out", out, "--report", out / "r.html")
    assert status == 0 and names(out) == ["r.html", "tokenizer.json", "tokenizer_config.json"], err


@pytest.mark.parametrize("pattern", ["llama3", "metaspace"])
def test_the_report_measures_what_the_tokenizer_does(run, files, tmp_path, pattern):
    """Bytes per token are those of the texts, encoded."""
    out = tmp_path / "t.json"
    size = 300 if pattern == "llama3" else 340
    _, said, _ = run("train", files[0], "--vocab-size", size, "--pattern", pattern, "--out", out, "--report")
    text = files[0].read_bytes().decode()
    tokens = len(Tokenizer.from_file(str(out)).encode(text).ids)
    normalised = text if pattern == "llama3" else "▁" + text.replace(" ", "▁")
    line = next(line for line in said.splitlines() if line.split()[:1] == [str(size)] and ":" not in line)
    assert line.split()[1] == f"{len(normalised.encode()) / tokens:.2f}"


@pytest.mark.parametrize(("pattern", "limit", "sizes"), [("llama3", 83, (83, 101)), ("metaspace", 20, (276, 300))])
def test_the_report_on_what_is_outside_of_the_alphabet(run, files, tmp_path, pattern, limit, sizes):
    """Bytes without a symbol are what the tokenizer makes of them: nothing, or a token each."""
    text = files[0].read_bytes().decode()
    normalised = text if pattern == "llama3" else "▁" + text.replace(" ", "▁")
    for size in sizes:
        out = tmp_path / f"{size}.json"
        options = ["--vocab-size", size, "--pattern", pattern, "--limit-alphabet", limit, "--out", out, "--report"]
        _, said, _ = run("train", files[0], *options)
        encoded = Tokenizer.from_file(str(out)).encode(text)
        line = next(line for line in said.splitlines() if line.split()[:1] == [str(size)] and ":" not in line)
        value = len(normalised.encode()) / len(encoded.ids)
        if size > sizes[0]:  # In a vocabulary of characters, an upper bound: byte tokens keep symbols apart.
            assert line.split()[1] == f"{value:.2f}" if pattern == "llama3" else float(line.split()[1]) > value
            continue
        assert line.split()[1] == f"{value:.2f}"
        # Before any merge, tokens are bytes or characters.
        fallen = [token for token in encoded.tokens if token.startswith("<0x")]
        outside = len(fallen) if pattern == "metaspace" else len(text.encode()) - len(encoded.ids)
        how = "each is a token of its own" if pattern == "metaspace" else "they are left out"
        assert outside and f" {outside} bytes ({outside / len(normalised.encode()):.1%}) are outside" in said
        assert how in said
        if pattern == "metaspace":  # 27 bytes, a line feed, and "He", of the word that these are with a "▁" before.
            assert f"{30 / 31:.1%}  CJK" in said


@pytest.mark.parametrize("pattern", ["gpt2", "metaspace"])
def test_scripts_of_a_sample_are_nearly_those_of_all_words(monkeypatch, pattern):
    """Frequent Latin words before many rare ones of other scripts, which are most of the text."""
    random = np.random.default_rng(3)
    letters = {"LATIN": "abcdefgh", "CJK": "日本語文章書物", "CYRILLIC": "абвгдежз"}
    words = {" the": 9000, " of": 7000}
    for script, count in (("LATIN", 400), ("CJK", 1200), ("CYRILLIC", 800)):
        for _ in range(count):
            words["".join(random.choice(list(letters[script]), random.integers(2, 7)))] = int(random.integers(1, 9))
    counts = count_texts([f"\n{word}" for word, times in words.items() for _ in range(times)], pattern)
    training = Training(700, pattern, [], 0, None, threads=1)
    merges = training.merge(counts)
    reports = []
    for sample in (120, 10_000):
        monkeypatch.setattr(report, "_SAMPLE", sample)
        reports.append(make_report(counts, merges, characters=pattern == "metaspace", special_tokens=[]))
    some, whole = ({name: shares for name, *shares in one.scripts} for one in reports)
    assert reports[0].sample == 240 and reports[1].sample == reports[1].unique > 1500
    for name in letters:
        np.testing.assert_allclose(some[name], whole[name], atol=0.04)
    assert "estimated from 240 of" in as_terminal(reports[0]) and "estimated" not in as_terminal(reports[1])
    assert "A vocabulary of 700." in as_page(reports[0])


def test_longest_tokens_have_no_byte_tokens(run, files, tmp_path):
    options = ["--vocab-size", 340, "--pattern", "metaspace", "--special-tokens", "<unk>", "--report"]
    _, said, _ = run("train", files[0], *options, "--out", tmp_path / "t.json")
    longest = said.split("longest tokens, in bytes\n")[1].splitlines()
    assert len(longest) == 20 and not [line for line in longest if "<0x" in line or "<unk>" in line]


@pytest.mark.parametrize("out", [".", "../inner/"])
def test_the_folder_that_one_is_in(run, files, tmp_path, monkeypatch, out):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert run("train", *files, "--vocab-size", 300, "--out", out)[0] == 0
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(names(tmp_path / "inner"))
    assert names(tmp_path) == ["a.txt", "b.txt", "c.txt", "inner"]


# --- Failing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train missing.txt --out t.json", "missing.txt"),
        ("train bad.txt --out t.json", "DATA-UTF8"),
        ("train a.txt --out nowhere/t.json", "no such folder"),
        ("train a.txt --out t.json --vocab-size 200", "at least 256.*got 200"),
        ("train a.txt --out t --eos-token </s>", "must be among --special-tokens"),
        ("train a.txt --out t.json --special-tokens <s> --bos-token <s>", "must be a folder"),
        ("train --from-counts a.txt --out t.json", "COUNTS-FORMAT"),
        ("train --from-counts a.txt --out t.json --pattern gpt2", "leave them out here"),
        ("train a.txt --out t.json --max-memory 1KB", "`max_memory` must be at least"),
        ("merge-counts a.txt --out b.counts", "COUNTS-FORMAT"),
        ("count a.txt --pattern gtp2 --out a.counts", "gtp2"),
        ("train a.txt --pattern metaspace --vocab-size 255 --out t.json", "at least 256.*256 for bytes.*got 255"),
        ("train a.txt --vocab-size 300 300 --out t.json", "sizes that differ; got 300 300"),
        ("merge-counts known.counts --out known.counts", "a file that is read.*known.counts"),
        ("count a.txt --out a.counts --pattern=", "`pattern`"),
        ("count a.txt --out a.txt", "a file that is read.*a.txt"),
        ("count a.txt --out folder", "a folder, where a file.*folder"),
        ("train a.txt --out folder.json", "a folder, where a file.*folder.json"),
        ("train a.txt --out c.txt", "a file, where.*--out is a folder.*c.txt"),
        ("train a.txt --vocab-size 270 300 --out d", "a file, where.*--out is a folder.*d-300"),
        ("train a.json --out a.json", "a file that is read.*a.json"),
        ("train --out r.json --report a.txt b.txt", "ending in .html.*a.txt.*files first"),
        ("train a.txt page.html --out r.json --report page.html", "a file that is read.*page.html"),
        ("train a.txt --out r.json --report linked.html", "a file that is read.*linked.html"),
        ("train a.txt --out r.json --report nowhere/r.html", "no such folder.*nowhere"),
        ("train a.txt --out r.json --report folder.html", "a folder, where a file.*folder.html"),
        ("train a.txt --out r.html --report r.html", "another file than --out"),
        ("train a.txt --special-tokens <s> b.txt --out r.json", "takes all that follows.*b.txt.*files first"),
    ],
)
def test_errors_are_short(run, files, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    for name in ("a.json", "page.html", "d-300"):
        (tmp_path / name).write_text(SHORT)
    (tmp_path / "linked.html").symlink_to(files[0])
    write_counts("known.counts", Counted(bpe.word_counts({"ab": 3}), "gpt2", False))
    for name in ("folder", "folder.json", "folder.html"):
        (tmp_path / name).mkdir()
    before = contents(tmp_path)
    status, out, err = run(*line.split())
    assert (status, out) == (1, "") and "Traceback" not in err and len(err) < 1000
    assert re.search(message, err), err
    assert contents(tmp_path) == before


NOT_COUNTED = [
    "count a.txt --out folder.json",
    "train a.txt --out folder.json",
    "train a.txt --out b.txt",
    "train a.txt --out r.json --report nowhere/r.html",
    "train a.txt --out r.json --report b.txt",
    "train a.txt --out r.json --special-tokens <s> b.txt",
]


@pytest.mark.parametrize("line", NOT_COUNTED)
def test_what_cannot_be_written_is_refused_before_counting(run, files, tmp_path, monkeypatch, line):
    from eqx_moe.tokenizer import count

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    asked = []
    monkeypatch.setattr(count, "count_files", lambda *args, **options: asked.append(args))
    assert run(*line.split())[0] == 1 and not asked
