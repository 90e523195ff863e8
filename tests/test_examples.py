"""The programs under examples/, run as a user runs them (on a tiny checkpoint, for a few steps)."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer

import eqx_moe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("examples") / "tiny", dtype="bfloat16")


@pytest.fixture
def example(root, monkeypatch, capsys):
    """Runs an example's `main` with arguments; gives its module and what it printed."""

    def run(name: str, *arguments):
        spec = importlib.util.spec_from_file_location(f"example_{name}", root / "examples" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        if arguments:
            monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *map(str, arguments)])
            module.main()
        return module, capsys.readouterr().out

    return run


def is_png(file: pathlib.Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG")


def test_quickstart(example, folder, tmp_path):
    out_folder = tmp_path / "out"
    # Running it again replaces what an earlier run left.
    eqx_moe.save_pretrained(tiny.model(seed=9), out_folder / "model", max_shard_size=10_000)
    (out_folder / "loss.png").write_text("old")
    _, out = example("quickstart", "--model", folder, "--steps", 8, "--out", out_folder)
    assert "identical, bit for bit" in out and str(out_folder / "model") in out
    assert is_png(out_folder / "loss.png")
    before, after = (float(out.split(mark)[0].split()[-1]) for mark in (" before", " after"))
    assert after < before
    assert not list((out_folder / "model").glob("*index*"))


def test_finetune(example, folder, tmp_path, hub):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny.TEXT.splitlines() if line))
    arguments = ["--data", text, "--out", tmp_path / "out", "--steps", 20, "--lr", 1e-2, "--seq", 32]
    _, out = example("finetune", folder, *arguments, "--push", "org/tuned")
    first, last = (float(part.split()[-1]) for part in out.splitlines()[0].split(" in the ")[:2])
    assert last < first - 0.3
    assert eqx_moe.load_config(tmp_path / "out").dtype == "bfloat16"
    tuned = eqx_moe.from_pretrained(tmp_path / "out")
    assert f"pushed to {hub.url}/org/tuned/commit/" in out
    pushed = hub.repos["org/tuned"].files()
    assert all(pushed[file.name] == file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert not np.array_equal(tuned.embed.weight, eqx_moe.from_pretrained(folder).embed.weight)


TINY_RECIPE = dict(
    vocab=300, hidden=12, layers=1, heads=3, kv_heads=1, experts=5, k=2, expert_ffn=17, context=23, steps=3, batch=7
)


def test_pretrain(example, tmp_path, monkeypatch):
    module, _ = example("pretrain")
    text = tmp_path / "text.txt"
    text.write_bytes(module.DATA.read_bytes()[:20_000])
    monkeypatch.setattr(module, "DATA", text)
    loss = module.run(module.Recipe(**TINY_RECIPE), tmp_path / "out", seed=1, dense=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{loss:.4f} nats per byte" in card and "| 1, 3 of 7 x 23 tokens |" in card and card.count("ROMEO:\n") == 3
    assert is_png(tmp_path / "out" / "loss.png")
    model = eqx_moe.from_pretrained(tmp_path / "out")
    assert type(model.config) is eqx_moe.MixtralConfig and model.config.dtype == "bfloat16"


def test_pretrain_dense_is_as_large_as_what_a_token_uses(example):
    from eqx_moe.models import count_parameters

    module, _ = example("pretrain")
    recipe = module.Recipe(**TINY_RECIPE)
    _, active = count_parameters(module.make_model(recipe, dense=False, seed=0))
    dense = module.make_model(recipe, dense=True, seed=0)
    assert type(dense.config) is eqx_moe.LlamaConfig
    # The router is what it has not.
    assert count_parameters(dense) == (active - 5 * 12, active - 5 * 12)


def test_pretrain_spellings(example):
    module, _ = example("pretrain")
    tokenizer = tiny.tokenizer()
    plain = module.DropoutTokens(tiny.TEXT, tokenizer, 0.0, seed=0)
    assert plain.ids(0).tolist() == plain.ids(1).tolist() == tokenizer.encode(tiny.TEXT).ids
    dropped = module.DropoutTokens(tiny.TEXT, tokenizer, 0.3, seed=0)
    first, second = dropped.ids(0).tolist(), dropped.ids(1).tolist()
    assert first != second and len(first) > len(plain.ids(0))
    assert tokenizer.decode(first) == tokenizer.decode(second) == tiny.TEXT
    assert module.DropoutTokens(tiny.TEXT, tokenizer, 0.3, seed=0).ids(1).tolist() == second
    assert module.DropoutTokens(tiny.TEXT, tokenizer, 0.3, seed=1).ids(1).tolist() != second


class OneMachine:
    """What the example asks of Ray and of Spark, done here: neither is installed."""

    def __init__(self, texts=()):
        self.texts = texts

    @staticmethod
    def remote(function):
        return types.SimpleNamespace(remote=function)

    @staticmethod
    def get(results):
        return results

    def mapPartitions(self, function):
        return types.SimpleNamespace(toLocalIterator=lambda: [data for text in self.texts for data in function([text])])


def test_counting_on_many_machines(root, example, tmp_path, monkeypatch):
    """On processes, with Ray, with Spark: the tokenizer is the one of a single machine."""
    from eqx_moe.tokenizer import train_bpe

    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text(tiny.TEXT * (i + 1) + "naïve 日本 " * i)
    expected = train_bpe(files, 300).to_str()
    program, out = root / "examples" / "count_on_many_machines.py", tmp_path / "out.json"
    line = [sys.executable, program, *files, "--vocab-size", "300", "--out", out]
    subprocess.run(line, check=True, capture_output=True)
    assert Tokenizer.from_file(str(out)).to_str() == expected

    monkeypatch.setitem(sys.modules, "ray", OneMachine)
    example("count_on_many_machines", *files, "--vocab-size", 300, "--out", out, "--ray")
    assert Tokenizer.from_file(str(out)).to_str() == expected

    module, _ = example("count_on_many_machines")
    counted = module.read_all(module.on_spark(OneMachine([file.read_text() for file in files]), tmp_path))
    words = module.add_counts([part.words for part in counted])
    assert module.train_bpe_from_counts(words, 300, module.PATTERN).to_str() == expected


@pytest.mark.parametrize("name", ["quickstart", "finetune", "pretrain", "count_on_many_machines"])
def test_help(root, name):
    done = subprocess.run([sys.executable, root / "examples" / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"python examples/{name}.py" in done.stdout, done.stderr


def test_data_is_what_notice_says(root):
    files = {f"examples/data/{file.name}" for file in (root / "examples" / "data").iterdir()}
    notice = (root / "NOTICE").read_text()
    assert {line for line in notice.splitlines() if line.startswith("examples/data/")} == files


def test_the_bundled_checkpoint(bundled):
    """Small, loadable, and as good as its card says that it must be."""
    assert (bundled / "model.safetensors").stat().st_size <= 6_000_000
    model, tokenizer = eqx_moe.from_pretrained(bundled), eqx_moe.load_tokenizer(bundled)
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    card = (bundled / "README.md").read_text()
    assert float(card.split("**")[1].split()[0]) < 1.60
