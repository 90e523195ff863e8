"""The `eqx-moe` command: what it prints, what it writes, and how it fails."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from test_family_configs import PUBLISHED

import eqx_moe
from eqx_moe import train
from eqx_moe.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(tiny.TEXT)
    return file


def assert_short(err: str, *parts: str):
    """An error in one short paragraph."""
    assert err.startswith("eqx-moe: ") and "Traceback" not in err and "\n\n" not in err and len(err) < 1000
    for part in parts:
        assert part in err


# --- Usage -----------------------------------------------------------------------------------------------------------


def test_help_loads_no_jax():
    code = """
import sys
from typing import Any
from eqx_moe.cli import main
statuses = [main([*command, "--help"]) for command in ([], ["inspect"], ["generate"], ["finetune"], ["push"])]
print(statuses, "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[0, 0, 0, 0, 0] False"), done.stderr
    assert done.stdout.count("examples:\n  eqx-moe") == 4


@pytest.mark.parametrize(
    "line",
    [
        "",
        "explode",
        "inspect",
        "generate folder",
        "inspect folder --mesh data",
        "inspect folder --mesh data=0",
        "inspect folder --mesh data=2,data=4",
        "inspect folder --mesh data=2,expert=x",
        "inspect folder --mesh data=2 --batch-size 0",
        "inspect folder --mesh data=2 --dtype int8",
        "generate folder --prompt a --max-new-tokens 0",
        "generate folder --prompt a --max-new-tokens x",
        "generate folder --prompt a --temperature -1",
        "generate folder --prompt a --temperature nan",
        "generate folder --prompt a --top-p 1.5",
        "generate folder --prompt a --top-k 0",
        "generate folder --prompt a --seed -1",
        "finetune folder --out x",
        "finetune folder --data a.txt",
        "finetune folder --data a.txt --out x --steps 0",
        "finetune folder --data a.txt --out x --lr 0",
        "finetune folder --data a.txt --out x --router-aux-loss -1",
        "finetune folder --data a.txt --out x --seq 1",
    ],
)
def test_wrong_usage_is_status_2(run, line):
    status, out, err = run(*line.split())
    assert (status, out) == (2, "") and "usage:" in err


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect(run, folder):
    status, out, err = run("inspect", folder)
    assert (status, err) == (0, "")
    model = tiny.model()
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    active = total - 3 * (3 * 12 * 17)
    for part in ("mixtral", f"{total:,} in all, {active:,} active", f"{4 * total:,} bytes of F32", "original"):
        assert part in out
    for line in ("num_local_experts        5", "model.safetensors", "tokenizer.json"):
        assert line in out


def test_inspect_reads_headers_only(run, folder, tmp_path, monkeypatch):
    """Shards and the packed layout too; and the data of the weights is never asked for."""
    eqx_moe.save_pretrained(tiny.model(), tmp_path / "packed", layout="packed", max_shard_size=10_000)
    monkeypatch.setattr("eqx_moe.checkpoint.reader.load_leaves", None)
    status, out, _ = run("inspect", tmp_path / "packed")
    assert status == 0 and "packed" in out and "model.safetensors.index.json" in out and "-of-" in out


def test_inspect_of_a_dense_model(run, tmp_path):
    tiny.write(tmp_path, tiny.DENSE, dtype="bfloat16")
    status, out, _ = run("inspect", tmp_path)
    assert status == 0 and "llama" in out and "active" not in out and "bytes of BF16" in out and "dense" in out


@pytest.fixture
def config_only(folder, tmp_path):
    """What a user has of a model that no machine at hand can hold."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def test_inspect_plans_from_a_config_alone(run, config_only):
    status, out, err = run(
        "inspect", config_only, "--mesh", "data=2,expert=5,tensor=1", "--batch-size", 20, "--seq", 16
    )
    assert (status, err) == (0, "") and "none here" in out
    mesh = jax.sharding.AbstractMesh((2, 5, 1), ("data", "expert", "tensor"))
    step = train.plan_step(tiny.model(), mesh, rows=20, length=16, optimizer=train.adamw(1e-4, 1))
    assert f"{step.sharding}\n" in out and f"{step}\n" in out
    assert "20 rows of 16 tokens" in out and f"{step.arguments + step.temporaries:,}" in out


def test_inspect_plans_a_row_for_each_device_that_takes_rows(run, folder):
    status, out, _ = run("inspect", folder, "--mesh", "tensor=3,data=2,expert=5")
    limit = tiny.model().config.max_position_embeddings
    assert status == 0 and f"10 rows of {limit} tokens" in out and "model.safetensors" in out


@pytest.mark.parametrize(
    ("name", "mesh", "total", "experts", "weights"),
    [
        # FP8 and MXFP4 as released; the layer of DeepSeek-V3 that predicts a token further ahead does not count.
        ("DeepSeek-V3", "data=8,expert=8", 671_026_419_200, 256, "61 x layers.*.attention.kv_b.weight"),
        ("gpt-oss-120b", "data=4,expert=4,tensor=2", 116_829_156_672, 128, "36 x layers.*.attention.sinks"),
    ],
)
def test_inspect_plans_released_models_from_their_configs(run, tmp_path, name, mesh, total, experts, weights):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
    status, out, err = run("inspect", tmp_path, "--mesh", mesh, "--dtype", "bfloat16")
    assert (status, err) == (0, "") and "none here" in out and "\nbfloat16 with AdamW" in out
    assert f"parameters  {total:,} in all" in out and weights in out
    # Two bytes each, but that the selection biases of routers stay float32.
    (everything,) = re.findall(r"^all +([\d,]+) in all", out, re.MULTILINE)
    assert int(everything.replace(",", "")) == 2 * (total + (58 * 256 if name == "DeepSeek-V3" else 0))
    status, out, err = run("inspect", tmp_path, "--mesh", "expert=7")
    assert (status, out) == (1, "")
    assert_short(err, "7 devices", f"{experts} experts")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--mesh", "data=2,expert=3"], ["3 devices", "5 experts"]),
        (["--mesh", "data=2,pipe=3"], ["pipe", "data", "expert", "tensor"]),
        (["--mesh", "data=2", "--seq", "100000"], ["--seq", "100000"]),
        (["--seq", "16"], ["--seq", "--mesh"]),
        (["--dtype", "bfloat16"], ["--dtype", "--mesh"]),
    ],
)
def test_inspect_refuses_a_mesh_in_one_paragraph(run, config_only, options, parts):
    status, out, err = run("inspect", config_only, *options)
    assert (status, out) == (1, "")
    assert_short(err, *parts)


@pytest.mark.filterwarnings("default")
def test_inspect_says_that_tensors_are_missing(run, folder, tmp_path):
    eqx_moe.save_pretrained(tiny.model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config["surprise"] = "\x1b[31mred"
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, err = run("inspect", tmp_path)
    assert status == 0 and "will not load" in out and "\x1b" not in out
    assert err.startswith("eqx-moe: warning: ") and "surprise" in err and ".py" not in err


@pytest.mark.parametrize("command", ["inspect {}", "generate {} --prompt a", "finetune {} --data a.txt --out {}/out"])
def test_no_such_model(run, tmp_path, command):
    status, out, err = run(*command.format(tmp_path / "absent", tmp_path).split())
    assert (status, out) == (1, "")
    assert_short(err, "absent", "found", "fix")
    assert not list(tmp_path.iterdir())


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate(run, folder):
    model, tokenizer = eqx_moe.from_pretrained(folder), tiny.tokenizer()
    prompt = "The wren"
    options: dict[str, Any] = dict(max_new_tokens=23, temperature=0.9, top_k=40, top_p=0.9, seed=4)
    ids = list(eqx_moe.stream(model, tokenizer.encode(prompt).ids, **options))
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    status, out, err = run("generate", folder, "--prompt", prompt, *flags)
    assert (status, err) == (0, "")
    assert out.removesuffix("\n").rstrip("\ufffd") == tokenizer.decode(ids).rstrip("\ufffd")


def test_generate_refuses(run, folder, tmp_path):
    status, out, err = run("generate", folder, "--prompt", "")
    assert (status, out) == (1, "")
    assert_short(err, "empty")
    status, out, err = run("generate", folder, "--prompt", "wren " * 99)
    assert (status, out) == (1, "")
    assert_short(err, "61 positions")


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="empty"):
        main(["generate", str(folder), "--prompt", "", "--debug"])


def test_an_unforeseen_error_is_one_line(run, folder, monkeypatch):
    def explode(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("eqx_moe.hub.from_pretrained", explode)
    status, _, err = run("generate", folder, "--prompt", "a")
    assert status == 1 and err == "eqx-moe: RuntimeError: first line (--debug shows where)\n"


def test_a_reader_that_goes_away_is_no_error(folder):
    """As in `eqx-moe inspect MODEL | head -0`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "eqx_moe.cli", "inspect", folder], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.stderr == ""


# --- decoding text while it comes ------------------------------------------------------------------------------------


def decoded(ids, prompt=()) -> list[str]:
    from eqx_moe.generation import decode_stream

    return list(decode_stream(tiny.tokenizer(), ids, prompt))


def test_characters_are_shown_whole():
    written = "naïve ☕ 👩‍🔬 漢字 " * 9
    ids = tiny.tokenizer().encode(written).ids
    pieces = decoded(ids)
    assert "".join(pieces) == written and len(pieces) > 50
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(decoded(ids[7:], prompt=ids[:7])) == written[len(tiny.tokenizer().decode(ids[:7])) :]


def test_an_unfinished_character_is_left_out():
    ids = tiny.tokenizer().encode("a👩").ids
    assert "".join(decoded(ids[:-1])) == "a"


def test_bytes_that_are_no_text_do_not_stop_the_stream():
    generator = np.random.default_rng(0)
    for _ in range(200):
        ids = generator.integers(1, 283, generator.integers(1, 60)).tolist()
        shown, whole = "".join(decoded(ids)), tiny.tokenizer().decode(ids)
        assert whole.startswith(shown) and set(whole[len(shown) :]) <= {"\ufffd"} and len(whole) - len(shown) <= 3


# --- finetune --------------------------------------------------------------------------------------------------------


def test_finetune(run, tmp_path, text):
    source = tiny.write(tmp_path / "source", dtype="bfloat16")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"text": "A wren."}) + "\n" + json.dumps({"text": tiny.TEXT}) + "\n")
    out = tmp_path / "new" / "tuned"
    arguments = ["--steps", 12, "--lr", 1e-2, "--batch-size", 3, "--seq", 19]
    status, printed, err = run("finetune", source, "--data", text, lines, "--out", out, *arguments)
    assert (status, err) == (0, ""), err
    assert "3 documents" in printed and str(out / "model") in printed
    assert [file.name for file in out.iterdir()] == ["model"]
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    tuned = eqx_moe.from_pretrained(out / "model")
    tokenizer = eqx_moe.load_tokenizer(out / "model")
    documents = train.tokenize([tiny.TEXT], tokenizer, vocab_size=283)
    losses = [
        train.evaluate(model, train.in_order(train.pack(documents, 19), 4)).nats_per_token
        for model in (eqx_moe.from_pretrained(source), tuned)
    ]
    assert losses[1] < losses[0] - 0.3
    # A second time into the same folder: refused before anything is done, and nothing is touched.
    before = {file: file.read_bytes() for file in (out / "model").iterdir()}
    status, printed, err = run("finetune", source, "--data", text, "--out", out, *arguments)
    assert (status, printed) == (1, "")
    assert_short(err, "holds files", "--out")
    assert before == {file: file.read_bytes() for file in (out / "model").iterdir()}


def interrupt(*_, **__):
    raise KeyboardInterrupt


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["eqx_moe.train.fit", "eqx_moe.checkpoint.replacing.Replacing.write"])
def test_ctrl_c_leaves_nothing(run, folder, tmp_path, text, monkeypatch, where):
    monkeypatch.setattr("eqx_moe.train.fit", lambda model, *_, **__: (model, [{"cross_entropy": 1.0}]))
    monkeypatch.setattr(where, interrupt)
    status, _, err = run("finetune", folder, "--data", text, "--out", tmp_path / "out", "--steps", 1)
    assert (status, err) == (130, "\neqx-moe: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(run, folder, tmp_path, text, monkeypatch):
    monkeypatch.setattr("eqx_moe.train.fit", lambda model, *_, **__: (model, [{"cross_entropy": 1.0}]))
    monkeypatch.setattr("eqx_moe.checkpoint.replacing.Replacing.write", disk_full)
    status, _, err = run("finetune", folder, "--data", text, "--out", tmp_path / "out", "--steps", 1)
    assert (status, err) == (1, "eqx-moe: No space left on device\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--data", "{tmp}/absent.txt"], ("DATA-FILE", "absent.txt", "No such file")),
        (["--data", "{tmp}/bad.jsonl"], ("DATA-JSON", "bad.jsonl:1:2")),
        (["--data", "{tmp}/short.txt"], ("DATA-EMPTY", "two tokens")),
        (["--seq", "62"], ("61, the model's positions",)),
        (["--out", "{tmp}/text.txt"], ("text.txt", "a folder")),
        (["--out", "{tmp}/text.txt/deeper"], ("text.txt", "a folder")),
    ],
)
def test_finetune_refuses(run, folder, tmp_path, text, change, says):
    (tmp_path / "bad.jsonl").write_text("{text}\n")
    (tmp_path / "short.txt").write_text("a")
    source = folder
    if "short" in change[1]:
        # Where no id ends documents, a document of one token has nothing to predict.
        source = tiny.write(tmp_path / "endless", dataclasses.replace(tiny.CONFIG, eos_token_id=None))
    there = sorted(tmp_path.iterdir())
    arguments = {"--data": text, "--out": tmp_path / "out", "--steps": 1, change[0]: change[1].format(tmp=tmp_path)}
    status, out, err = run("finetune", source, *[part for pair in arguments.items() for part in pair])
    assert (status, out) == (1, "")
    assert_short(err, *says)
    assert sorted(tmp_path.iterdir()) == there
