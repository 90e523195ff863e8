"""Checkpoints that must be refused: one good one, and a table of what may befall it.

Every refusal has its code, names the file and the item, says what was expected and what was found, and what to do.
"""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator

import equinox as eqx
import ml_dtypes  # noqa: F401  # lets safetensors read bfloat16
import numpy as np
import pytest
import refusing
import safetensors.numpy
import tokenizers
from weights import draw

import eqx_moe
from eqx_moe.checkpoint import leaf_paths
from eqx_moe.errors import CODES, CheckpointError

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHARD1, SHARD2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, HEAD, EMBED = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"

MODEL = eqx_moe.MixtralConfig(
    vocab_size=29,
    hidden_size=12,
    intermediate_size=17,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    num_local_experts=5,
    max_position_embeddings=64,
)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> pathlib.Path:
    """A folder `single` and a folder `sharded` of one tiny model, each with a tokenizer."""
    root = tmp_path_factory.mktemp("good")
    model = draw(MODEL)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    eqx_moe.save_pretrained(model, root / "single", tokenizer)
    eqx_moe.save_pretrained(model, root / "sharded", tokenizer, max_shard_size=20_000)
    assert (root / "sharded" / SHARD2).exists()
    return root


@pytest.fixture
def single(made, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(made / "single", tmp_path / "model"))


@pytest.fixture
def sharded(made, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(made / "sharded", tmp_path / "model"))


def check(error: CheckpointError, code: str, file: str, item: str = "") -> None:
    text = str(error)
    assert error.code == code, text
    assert code in CODES
    assert pathlib.Path(error.file).name == file and file in text
    assert error.item == item or not item, text
    assert repr(error.item) in text or not error.item or len(error.item) > 150
    for part in ("expected", "found", "fix"):
        assert getattr(error, part) and f"{part}:" in text, (part, text)
    assert text.isprintable() or all(line.isprintable() for line in text.split("\n")), repr(text)
    assert len(text) < 5000


@pytest.fixture(scope="session")
def apart(root) -> Iterator[subprocess.Popen]:
    """A process that says what a refusal costs where nothing else does (`tests/refusing.py`)."""
    environment = {name: value for name, value in os.environ.items() if name != "EQX_MOE_TYPECHECK"}
    paths = [str(root), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with subprocess.Popen(
        [sys.executable, refusing.__file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()


@pytest.fixture(params=["here", pytest.param("apart", marks=pytest.mark.full)])
def refused(request) -> Callable[..., CheckpointError]:
    """A function that loads from a folder, checks the error and returns it: in this process, or in one apart as well,
    where it takes less than 2 s and 100 MB."""
    process = request.getfixturevalue("apart") if request.param == "apart" else None

    def refused(
        folder: pathlib.Path, code: str, file: str, item: str = "", load=eqx_moe.from_pretrained, **options
    ) -> CheckpointError:
        if process is not None:
            print(json.dumps([load.__name__, str(folder), options]), file=process.stdin, flush=True)
            found, seconds, memory = json.loads(process.stdout.readline())
            print(f"{found}: {seconds:.3f} s, {memory / 1e6:.1f} MB")
            assert found == code and seconds < 2 and memory < 100_000_000
        started, before = time.process_time(), refusing.peak_memory(reset=True)
        with pytest.raises(CheckpointError) as caught:
            load(folder, **options)
        # Two seconds; but here every function checks the types that it is given, and other tests run beside.
        assert time.process_time() - started < 4
        assert refusing.peak_memory() - before < 100_000_000
        check(caught.value, code, file, item)
        return caught.value

    return refused


# --- The container --------------------------------------------------------------------------------------------------


def entry(dtype="F32", shape=(3,), offsets=(0, 12), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def container(header, data: bytes = bytes(12)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def duplicate(first, second) -> bytes:
    return container(b'{"x":%s,"x":%s}' % (json.dumps(first).encode(), json.dumps(second).encode()))


FOREIGN = {
    "empty": b"",
    "seven-bytes": bytes(7),
    "zeros": bytes(4096),
    "pickle": b"\x80\x02}q\x00." + bytes(100),
    "zip": b"PK\x03\x04" + bytes(100),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(100),
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(100),
    "json": b'{"a": 1, "b": [2, 3]}',
    "header-empty": struct.pack("<Q", 0) + bytes(100),
    "header-length-max": struct.pack("<Q", 2**64 - 1) + bytes(100),
    "header-past-end": struct.pack("<Q", 1000) + b"{}" + bytes(100),
    "header-over-limit": struct.pack("<Q", 100_000_001) + b"{}",
    "header-big-endian": struct.pack(">Q", 2) + b"{}",
}
HEADERS = {
    "not-json": (b"{x}", ""),
    "not-utf8": (b'{"\xff": 1}', ""),
    "list": ([], ""),
    "cut-short": (b'{"x": {"dtype"', ""),
    "nested": (b'{"x":' + b"[" * 100_000, ""),
    "nested-metadata": (b'{"__metadata__":' + b'{"a":' * 5000 + b"1" + b"}" * 5001, ""),
    "long-integer": (b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 12]}}', ""),
    "nan": (b'{"x": NaN}', ""),
    "twice-identical": (duplicate(entry(), entry())[8:-12], ""),
    "twice-reinterpreted": (duplicate(entry(), entry("I32"))[8:-12], ""),
    "metadata-number": ({"__metadata__": {"format": 1}, "x": entry()}, "__metadata__"),
    "metadata-list": ({"__metadata__": ["pt"], "x": entry()}, "__metadata__"),
    "entry-list": ({"x": [1, 2]}, "x"),
    "entry-without-offsets": ({"x": {"dtype": "F32", "shape": [3]}}, "x"),
    "entry-unknown-field": ({"x": entry(url="http://example.org")}, "x"),
    "byte-order-mark": (b"\xef\xbb\xbf" + json.dumps({"x": entry()}).encode(), ""),
    "utf16": (json.dumps({"x": entry()}).encode("utf-16"), ""),
    "half-a-surrogate-pair": (b'{"\xed\xa0\x80": 1}', ""),
    "two-objects": (b"{}{}", ""),
    "comma-after-the-last": (b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},}', ""),
    "comment": (b'{} // "x"', ""),
    "infinity": (b'{"x": -Infinity}', ""),
    "zeros-after": (b"{}" + bytes(6), ""),
    "number": (b"17", ""),
    "string": (b'"x"', ""),
    "null": (b"null", ""),
    "entry-null": ({"x": None}, "x"),
    "entry-string": ({"x": "F32"}, "x"),
    "entry-key-twice": (b'{"x":{"dtype":"F32","dtype":"I32","shape":[3],"data_offsets":[0,12]}}', ""),
    "metadata-twice": (b'{"__metadata__":{},"__metadata__":{}}', ""),
    "metadata-null-value": ({"__metadata__": {"format": None}, "x": entry()}, "__metadata__"),
    "a-million-numbers": (b'{"x":[' + b"1," * 1_000_001 + b"1]}", ""),
    "half-a-million-keys": (b"{" + b",".join(b'"%d":1' % i for i in range(500_000)) + b"}", ""),
    "a-long-name": (b'{"' + b"x" * 20_000_000 + b'":1}', ""),
    "a-wide-name": (('{"' + "x" * 15_000_000 + "\U0001f600" + '":1}').encode(), ""),
    "a-name-widened-by-an-escape": (b'{"' + b"x" * 15_000_000 + b'\\ud83d\\ude00":1}', ""),
}
SHAPES = {
    "negative": [-3],
    "float": [3.0],
    "string": ["3"],
    "boolean": [True, 3],
    "null": None,
    "null-inside": [None],
    "wider-than-64-bits": [2**64],
    "number": 3,
    "object": {},
    "too-many": [1] * 100,
    "overflow": [2**40, 2**40],
    "overflow-beside-zero": [0, 2**62],
    "wraps-to-the-right-size": [2**62 + 3],
    "nested": [[3]],
}
OFFSETS = {
    "string": ({"x": entry(offsets=("0", "12"))}, "x"),
    "booleans": ({"x": entry("U8", (1,), (False, True))}, "x"),
    "past-64-bits": ({"x": entry(offsets=(0, 2**64 - 1))}, "x"),
    "wraps-around": ({"x": entry(offsets=(2**64 - 12, 2**64))}, "x"),
    "scalar-of-no-bytes": ({"x": entry(shape=(), offsets=(0, 0))}, "x"),
    "empty-with-bytes": ({"x": entry(shape=(0, 3))}, "x"),
    "swapped": ({"x": entry(shape=(1,), offsets=(0, 8)), "y": entry(shape=(2,), offsets=(8, 12))}, "x"),
    "size": ({"x": entry(shape=(4,))}, "x"),
    "dtype-size": ({"x": entry("F16")}, "x"),
    "reversed": ({"x": entry(offsets=(12, 0))}, "x"),
    "negative": ({"x": entry(offsets=(-12, 0))}, "x"),
    "three": ({"x": entry(offsets=(0, 12, 12))}, "x"),
    "floats": ({"x": entry(offsets=(0.0, 12.0))}, "x"),
    "huge": ({"x": entry(shape=(2**50,), offsets=(0, 2**52))}, "x"),
    "overlap": ({"x": entry(shape=(2,), offsets=(0, 8)), "y": entry(shape=(2,), offsets=(4, 12))}, "y"),
    "same-span": ({f"x{i}": entry() for i in range(20_000)}, "x1"),
    "hole": ({"x": entry(shape=(1,), offsets=(0, 4)), "y": entry(shape=(1,), offsets=(8, 12))}, "y"),
    "hole-at-start": ({"x": entry(shape=(2,), offsets=(4, 12))}, "x"),
    "bytes-left-over": ({"x": entry(shape=(2,), offsets=(0, 8))}, "x"),
    "no-tensor-for-the-data": ({}, ""),
    "cut-off": ({"x": entry(shape=(4,), offsets=(0, 16))}, "x"),
    "empty-inside-another": ({"x": entry(), "y": entry(shape=(0,), offsets=(4, 4))}, ""),
    "forty-thousand-on-one-span": ({f"x{i}": entry() for i in range(40_000)}, "x1"),
    "half-a-byte": ({"x": entry("F4", (3,), (0, 1)), "y": entry("U8", (11,), (1, 12))}, "x"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_no_safetensors(single, refused, name):
    (single / SINGLE).write_bytes(FOREIGN[name])
    refused(single, "ST-FORMAT", SINGLE)


@pytest.mark.parametrize("name", HEADERS)
def test_a_malformed_header(single, refused, name):
    header, item = HEADERS[name]
    (single / SINGLE).write_bytes(container(header))
    refused(single, "ST-HEADER", SINGLE, item)


@pytest.mark.parametrize("name", SHAPES)
def test_an_impossible_shape(single, refused, name):
    (single / SINGLE).write_bytes(container({"x": entry() | {"shape": SHAPES[name]}}))
    refused(single, "ST-SHAPE", SINGLE, "x")


@pytest.mark.parametrize("dtype", ["f32", "F128", "", "<f4", 3, None, ["F32"]])
def test_an_unknown_dtype(single, refused, dtype):
    (single / SINGLE).write_bytes(container({"x": entry() | {"dtype": dtype}}))
    refused(single, "ST-DTYPE", SINGLE, "x")


@pytest.mark.parametrize("name", OFFSETS)
def test_tensors_that_do_not_tile_the_data(single, refused, name):
    header, item = OFFSETS[name]
    (single / SINGLE).write_bytes(container(header))
    refused(single, "ST-OFFSETS", SINGLE, item)


@pytest.mark.parametrize("by", [-1, 1, -4096, 22])
def test_a_file_cut_off_or_continued(single, refused, by):
    os.truncate(single / SINGLE, (single / SINGLE).stat().st_size + by)
    refused(single, "ST-OFFSETS", SINGLE)


# --- Tensors --------------------------------------------------------------------------------------------------------


def rename(old, new):
    return lambda tensors: tensors | {new: tensors.pop(old)}


def change(name, function):
    return lambda tensors: tensors | {name: function(tensors[name])}


def drop(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def rename_all(function):
    return lambda tensors: {function(name): value for name, value in tensors.items()}


def packed(tensors):
    """The same experts in the other layout, whose names are fewer."""
    theirs = {name: x for name, x in tensors.items() if ".experts." not in name and ".gate." not in name}
    for layer in range(MODEL.num_hidden_layers):
        moe, to = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        w1, w2, w3 = (
            np.stack([tensors[f"{moe}experts.{e}.{w}.weight"] for e in range(MODEL.num_local_experts)])
            for w in ("w1", "w2", "w3")
        )
        theirs |= {to + "gate.weight": tensors[moe + "gate.weight"], to + "experts.down_proj": w2}
        theirs[to + "experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
    return theirs


TENSORS = {
    "missing-norm": (drop(NORM), "ST-MISSING", NORM),
    "missing-head": (drop(HEAD), "ST-MISSING", HEAD),
    "missing-expert-matrix": (drop(EXPERT), "ST-MISSING", EXPERT),
    "missing-router": (drop(ROUTER), "ST-MISSING", ROUTER),
    "missing-expert": (
        drop(*[f"model.layers.0.block_sparse_moe.experts.4.w{i}.weight" for i in (1, 2, 3)]),
        "ST-MISSING",
        "model.layers.0.block_sparse_moe.experts.4.w1.weight",
    ),
    "missing-last-layer": (
        lambda tensors: {name: value for name, value in tensors.items() if ".layers.1." not in name},
        "ST-MISSING",
        "",
    ),
    "missing-everything": (lambda tensors: {}, "ST-MISSING", ""),
    "misspelled": (rename(NORM, "model.nrom.weight"), "ST-MISSING", NORM),
    "prefixed": (rename_all("module.{}".format), "ST-MISSING", ""),
    "prefix-lost": (rename_all(lambda name: name.removeprefix("model.")), "ST-MISSING", ""),
    "expert-numbered-01": (rename(EXPERT, EXPERT.replace(".2.", ".02.")), "ST-MISSING", EXPERT),
    "extra": (lambda tensors: tensors | {"model.extra.weight": np.zeros(3, "f4")}, "ST-EXTRA", "model.extra.weight"),
    "extra-without-a-name": (lambda tensors: tensors | {"": np.zeros(3, "f4")}, "ST-EXTRA", ""),
    "extra-layer": (
        lambda tensors: tensors | {"model.layers.2.input_layernorm.weight": tensors[NORM]},
        "ST-EXTRA",
        "model.layers.2.input_layernorm.weight",
    ),
    "extra-odd-name": (
        lambda tensors: tensors | {"../../\x1b[31m\n": np.zeros(3, "f4")},
        "ST-EXTRA",
        "../../\x1b[31m\n",
    ),
    "extra-long-name": (lambda tensors: tensors | {"x" * 10_000: np.zeros(3, "f4")}, "ST-EXTRA", "x" * 10_000),
    "a-hundred-thousand-extra": (
        lambda tensors: tensors | {f"x.{i}.{'q' * (i % 40)}": np.zeros(0, "f4") for i in range(40_000)},
        "ST-EXTRA",
        "x.0.",
    ),
    "both-layouts": (
        lambda tensors: tensors | {"model.layers.0.mlp.experts.down_proj": np.zeros((5, 12, 17), "f4")},
        "ST-EXTRA",
        "model.layers.0.mlp.experts.down_proj",
    ),
    "packed-and-a-layer-as-released": (
        lambda tensors: packed(tensors) | {name: x for name, x in tensors.items() if ".layers.0." in name},
        "ST-EXTRA",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ),
    "transposed": (change(HEAD, lambda x: x.T.copy()), "ST-SHAPE", HEAD),
    "expert-transposed": (change(EXPERT, lambda x: x.T.copy()), "ST-SHAPE", EXPERT),
    "too-long": (change(NORM, lambda x: np.append(x, x)), "ST-SHAPE", NORM),
    "another-axis": (change(NORM, lambda x: x[None]), "ST-SHAPE", NORM),
    "scalar": (change(NORM, lambda x: np.array(x[0])), "ST-SHAPE", NORM),
    "empty": (change(NORM, lambda x: x[:0]), "ST-SHAPE", NORM),
    **{
        f"dtype-{dtype}": (change(NORM, lambda x, dtype=dtype: x.astype(dtype)), "ST-DTYPE", NORM)
        for dtype in ("i4", "i8", "u1", "f8", "?", "u2")
    },
}


def put(place, value):
    def act(tensor):
        tensor = tensor.copy()
        tensor[place] = value
        return tensor

    return act


VALUES = {
    "nan-in-norm": (NORM, put(3, np.nan), "nan at (3,)"),
    "infinity-in-norm": ("model.layers.1.input_layernorm.weight", put(11, np.inf), "inf at (11,)"),
    "infinity-in-router": (ROUTER, put((4, 2), -np.inf), "-inf at (4, 2)"),
    "nan-in-router": (ROUTER, put((0, 0), np.nan), "nan at (0, 0)"),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_values_that_no_training_leaves(single, refused, name, dtype):
    item, alter, found = VALUES[name]
    tensors = safetensors.numpy.load_file(single / SINGLE)
    safetensors.numpy.save_file(tensors | {item: alter(tensors[item])}, single / SINGLE)
    error = refused(single, "ST-VALUE", SINGLE, item, dtype=dtype)
    assert error.found == found


# --- Checksums ------------------------------------------------------------------------------------------------------


def flip(name, place):
    def act(folder):
        with open(folder / name, "r+b") as file:
            file.seek(place, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    return act


def set_sum(name, value):
    def act(folder):
        sums = json.loads((folder / SUMS).read_text())["sha256"]
        edit(folder / SUMS, sha256=sums | {name: value})

    return act


SUMS = "eqx_moe.json"
DAMAGE = {
    "bit-in-a-weight": (flip(SHARD2, -9), "SUM-DIFFERS", SHARD2, ""),
    "zeroed-weights": (lambda folder: (folder / SHARD1).write_bytes(blank(folder / SHARD1)), "SUM-DIFFERS", SHARD1, ""),
    "index": (lambda folder: edit(folder / INDEX, metadata={}), "SUM-DIFFERS", INDEX, ""),
    "not-listed": (lambda folder: edit(folder / SUMS, sha256={}), "SUM-DIFFERS", INDEX, ""),
    "other-sum": (set_sum(SHARD1, "0" * 64), "SUM-DIFFERS", SHARD1, ""),
    "sum-too-short": (set_sum(SHARD1, "0" * 63), "SUM-LIST", SUMS, SHARD1),
    "sum-number": (set_sum(SHARD1, 7), "SUM-LIST", SUMS, SHARD1),
    "no-list": (lambda folder: (folder / SUMS).write_text("{}"), "SUM-LIST", SUMS, "sha256"),
    "no-json": (lambda folder: (folder / SUMS).write_text("{"), "SUM-JSON", SUMS, ""),
    "no-file": (lambda folder: (folder / SUMS).unlink(), "SUM-MISSING", SUMS, ""),
    "pipe": (lambda folder: replace_by(SUMS, os.mkfifo)(folder), "SUM-FILE", SUMS, ""),
}


def blank(path: pathlib.Path) -> bytes:
    raw = path.read_bytes()
    return raw[:-1000] + bytes(1000)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_that_no_header_shows(sharded, refused, name):
    eqx_moe.from_pretrained(sharded, verify=True)
    act, code, file, item = DAMAGE[name]
    act(sharded)
    refused(sharded, code, file, item, verify=True)
    eqx_moe.from_pretrained(sharded)  # who does not ask does not wait


def test_verifying_wants_every_value_finite(single, refused):
    model = eqx_moe.from_pretrained(single)
    tensor = model.layers[1].moe.experts.gate.at[2, 3, 4].set(np.nan)
    model = eqx.tree_at(lambda m: m.layers[1].moe.experts.gate, model, tensor)
    eqx_moe.save_pretrained(model, single)
    eqx_moe.from_pretrained(single)
    assert refused(single, "ST-VALUE", SINGLE, EXPERT, verify=True).found == "nan at (3, 4)"


# --- A save that was killed -----------------------------------------------------------------------------------------

JOURNAL = ".eqx_moe.journal"
JOURNALS = {
    "no-json": b"rm -rf /",
    "list": b"[]",
    "empty": b"{}",
    "token": b'{"token": "../../../../x", "files": [], "stale": []}',
    "path": b'{"token": "0123456789abcdef", "files": ["../config.json"], "stale": []}',
    "removes-a-config": b'{"token": "0123456789abcdef", "files": [], "stale": ["config.json"]}',
    "removes-outside": b'{"token": "0123456789abcdef", "files": [], "stale": ["../model.safetensors"]}',
    "number": b'{"token": "0123456789abcdef", "files": [1], "stale": []}',
    "half-a-surrogate-pair": b'{"token": "0123456789abcdef", "files": ["\\ud800"], "stale": []}',
}


@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_that_is_none_of_ours(single, refused, name):
    (single / JOURNAL).write_bytes(JOURNALS[name])
    before = {path: path.read_bytes() for path in single.iterdir()}
    refused(single, "ST-SAVE", "model", JOURNAL)
    assert before == {path: path.read_bytes() for path in single.iterdir()}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_the_models(single, refused, name):
    alter, code, item = TENSORS[name]
    safetensors.numpy.save_file(alter(safetensors.numpy.load_file(single / SINGLE)), single / SINGLE)
    error = refused(single, code, SINGLE, item)
    if name == "transposed":
        assert "transpose would fit" in error.found
    if name == "misspelled":
        assert "'model.nrom.weight'" in error.fix
        assert len(error.problems) == 2
    if name == "extra-without-a-name":
        assert "name is empty" in error.found
    if name == "prefixed":
        assert "'module.'" in error.fix
    if name == "prefix-lost":
        assert "'model.'" in error.fix
    if name == "missing-last-layer":
        assert len(error.problems) == 22
        assert "5 x 'model.layers.1.block_sparse_moe.experts.*.w1.weight'" in str(error)


def test_eight_bit_floats_are_said_to_be_quantised(single, refused):
    tensors = safetensors.numpy.load_file(single / SINGLE)
    tensors[EXPERT] = tensors[EXPERT].astype("u1")
    safetensors.numpy.save_file(tensors, single / SINGLE)
    rewrite_header(single / SINGLE, lambda text: text.replace(b'"U8"', b'"F8_E4M3"'))
    assert "quantised" in refused(single, "ST-DTYPE", SINGLE, EXPERT).found


def test_a_stack_of_two_dtypes(single, refused):
    tensors = safetensors.numpy.load_file(single / SINGLE)
    tensors[EXPERT] = tensors[EXPERT].astype("f2")
    safetensors.numpy.save_file(tensors, single / SINGLE)
    error = refused(single, "ST-DTYPE", SINGLE, EXPERT, dtype="auto")
    assert "experts.0.w1" in error.expected and "dtype=" in error.fix
    assert leaf_paths(eqx_moe.from_pretrained(single, dtype="float32"))["layers.1.moe.experts.gate"].dtype == np.float32


def test_a_value_out_of_range(single, refused):
    tensors = safetensors.numpy.load_file(single / SINGLE)
    tensors[EXPERT][3, 4] = -1e6
    safetensors.numpy.save_file(tensors, single / SINGLE)
    error = refused(single, "ST-RANGE", SINGLE, EXPERT, dtype="float16")
    assert "1e+06" in error.found


def test_a_tied_head_that_differs(single, refused):
    edit(single / CONFIG, tie_word_embeddings=True)
    refused(single, "ST-TIED", SINGLE, HEAD)
    tensors = safetensors.numpy.load_file(single / SINGLE)
    for head, code in ((tensors[EMBED].astype("f2"), "ST-DTYPE"), (tensors[EMBED][1:], "ST-SHAPE")):
        safetensors.numpy.save_file(tensors | {HEAD: head}, single / SINGLE)
        refused(single, code, SINGLE, HEAD)


# --- Files and the index --------------------------------------------------------------------------------------------


def edit(path: pathlib.Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def remap(tensor, shard):
    return lambda folder: edit(
        folder / INDEX, weight_map=json.loads((folder / INDEX).read_text())["weight_map"] | {tensor: shard}
    )


def unlist(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={name: shard for name, shard in weight_map.items() if name != NORM})


def store_twice(folder):
    second = safetensors.numpy.load_file(folder / SHARD2)
    second[EMBED] = safetensors.numpy.load_file(folder / SHARD1)[EMBED]
    safetensors.numpy.save_file(second, folder / SHARD2)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def set_index(**keys):
    return lambda folder: edit(folder / INDEX, **keys)


def replace_by(name, make):
    def act(folder):
        (folder / name).unlink()
        make(folder / name)

    return act


def outside(path: pathlib.Path):
    target = path.parent.parent / "elsewhere.safetensors"
    target.write_bytes(b"secret")
    path.symlink_to(target)


def pickles_only(folder):
    for path in folder.glob("model*"):
        path.unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'touch canary'\ntR.")


def no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()


FILES = {
    "index-empty": (write(INDEX, b""), "IDX-JSON", INDEX, ""),
    "index-not-json": (write(INDEX, b"weights: all"), "IDX-JSON", INDEX, ""),
    "index-cut-short": (write(INDEX, b'{"weight_map": {"a": '), "IDX-JSON", INDEX, ""),
    "index-list": (write(INDEX, b"[]"), "IDX-JSON", INDEX, ""),
    "index-utf16": (write(INDEX, '{"weight_map": {}}'.encode("utf-16")), "IDX-JSON", INDEX, ""),
    "index-nested": (write(INDEX, b'{"a":' * 100_000), "IDX-JSON", INDEX, ""),
    "index-key-twice": (write(INDEX, b'{"weight_map": {}, "weight_map": {}}'), "IDX-JSON", INDEX, ""),
    "index-no-weight-map": (write(INDEX, b'{"metadata": {}}'), "IDX-MAP", INDEX, "weight_map"),
    "weight-map-empty": (set_index(weight_map={}), "IDX-MAP", INDEX, "weight_map"),
    "weight-map-list": (set_index(weight_map=[NORM]), "IDX-MAP", INDEX, "weight_map"),
    "weight-map-number": (remap(NORM, 1), "IDX-MAP", INDEX, NORM),
    "weight-map-null": (remap(NORM, None), "IDX-MAP", INDEX, NORM),
    **{
        f"path-{i}": (remap(NORM, shard), "IDX-PATH", INDEX, NORM)
        for i, shard in enumerate(
            ("", "/etc/passwd", "/etc/x.safetensors", "../x.safetensors", "..\\x.safetensors", "a/../../x.safetensors")
            + ("C:\\x.safetensors", "C:x.safetensors", "\\\\host\\x.safetensors", "~/x.safetensors", "~x.safetensors")
            + ("https://example.org/x.safetensors", "sub/x.safetensors", "x\0.safetensors", "pytorch_model.bin", "..")
        )
    },
    "shard-missing": (lambda folder: (folder / SHARD2).unlink(), "IDX-SHARD", INDEX, SHARD2),
    "shards-missing": (lambda folder: [p.unlink() for p in folder.glob("*.safetensors")], "IDX-SHARD", INDEX, SHARD1),
    "index-missing": (lambda folder: (folder / INDEX).unlink(), "IDX-SHARD", "model", SHARD1),
    "wrong-shard": (remap(NORM, SHARD1), "IDX-MISMATCH", INDEX, NORM),
    "absent-tensor": (remap("model.ghost.weight", SHARD1), "IDX-MISMATCH", INDEX, "model.ghost.weight"),
    "a-hundred-thousand-absent-tensors": (
        lambda folder: edit(folder / INDEX, weight_map={f"x.{i}.{'z' * (i % 50)}": SHARD1 for i in range(150_000)}),
        "IDX-MISMATCH",
        INDEX,
        "x.0.",
    ),
    "unlisted-tensor": (unlist, "IDX-MISMATCH", INDEX, NORM),
    "stored-twice": (store_twice, "IDX-MISMATCH", INDEX, EMBED),
    "two-models": (lambda folder: shutil.copy(folder / SHARD1, folder / SINGLE), "IDX-AMBIGUOUS", INDEX, SINGLE),
    "shard-cut-off": (lambda folder: os.truncate(folder / SHARD2, 3000), "ST-OFFSETS", SHARD2, ""),
    "shard-pickle": (write(SHARD1, b"\x80\x02cos\nsystem\n"), "ST-FORMAT", SHARD1, ""),
    "shard-folder": (replace_by(SHARD1, os.mkdir), "ST-FILE", SHARD1, ""),
    "shard-pipe": (replace_by(SHARD1, os.mkfifo), "ST-FILE", SHARD1, ""),
    "shard-dangling": (replace_by(SHARD1, lambda path: path.symlink_to("nothing")), "ST-FILE", SHARD1, ""),
    "shard-loop": (replace_by(SHARD1, lambda path: path.symlink_to(path.name)), "ST-FILE", SHARD1, ""),
    "shard-outside": (replace_by(SHARD1, outside), "ST-FILE", SHARD1, ""),
    "shard-device": (replace_by(SHARD1, lambda path: path.symlink_to("/dev/zero")), "ST-FILE", SHARD1, ""),
    "index-pipe": (replace_by(INDEX, os.mkfifo), "IDX-FILE", INDEX, ""),
    "index-outside": (replace_by(INDEX, outside), "IDX-FILE", INDEX, ""),
    "config-pipe": (replace_by(CONFIG, os.mkfifo), "CFG-FILE", CONFIG, ""),
    "config-outside": (replace_by(CONFIG, outside), "CFG-FILE", CONFIG, ""),
    "pickles-only": (pickles_only, "ST-PICKLE", "model", "pytorch_model.bin"),
    "no-weights": (no_weights, "ST-WEIGHTS", "model", SINGLE),
}


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_does_not_hold_together(sharded, refused, name):
    act, code, file, item = FILES[name]
    act(sharded)
    before = sorted(sharded.parent.iterdir())
    error = refused(sharded, code, file, item)
    assert sorted(sharded.parent.iterdir()) == before
    if name in ("shard-missing", "index-missing"):
        assert SHARD1 in error.found  # what is there


def test_a_shard_without_permission(sharded, refused):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (sharded / SHARD1).chmod(0)
    refused(sharded, "ST-FILE", SHARD1)


@pytest.mark.parametrize("load", [eqx_moe.from_pretrained, eqx_moe.load_config, eqx_moe.load_tokenizer])
def test_no_folder(tmp_path, refused, load):
    error = refused(str(tmp_path / "nothing"), "CFG-FOLDER", "nothing", load=load)
    assert "repo on the Hub" in error.expected
    # A path is never the name of a repo.
    assert "repo" not in refused(tmp_path / "nothing", "CFG-FOLDER", "nothing", load=load).expected
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "CFG-FOLDER", "file", load=load)
    refused(pathlib.Path("mistralai/Mixtral-8x7B-v0.1"), "CFG-FOLDER", "Mixtral-8x7B-v0.1", load=load)


def test_a_folder_in_mistrals_own_layout(tmp_path, refused):
    (tmp_path / "params.json").write_text("{}")
    assert "convert.from_mistral" in refused(tmp_path, "CFG-MISSING", CONFIG).fix


def test_a_folder_where_a_file_is_to_go(single, refused):
    """Found before anything is changed: what was there loads as before."""
    model = eqx_moe.from_pretrained(single)
    (single / "eqx_moe.json").unlink()
    (single / "eqx_moe.json").mkdir()
    with pytest.raises(CheckpointError) as caught:
        eqx_moe.save_pretrained(model, single)
    check(caught.value, "ST-SAVE", "model", "eqx_moe.json")
    assert not list(single.glob(".*"))
    eqx_moe.from_pretrained(single)


def test_an_empty_folder(tmp_path, refused):
    refused(tmp_path, "CFG-MISSING", CONFIG)
    refused(tmp_path, "TOK-MISSING", "tokenizer.json", load=eqx_moe.load_tokenizer)


def test_nothing_outside_is_opened(sharded, refused):
    opened: list[str] | None = []
    # A hook cannot be taken away again; this one goes deaf.
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if event == "open" and opened is not None else None
    )
    for shard in ("/etc/passwd", "/etc/x.safetensors", "../../../etc/passwd", "../x.safetensors"):
        remap(NORM, shard)(sharded)
        refused(sharded, "IDX-PATH", INDEX)
    seen, opened = opened, None
    # A number is a file that is open already; in /proc this file measures.
    assert seen and {pathlib.Path(name).parent for name in seen if not name.isdigit()} == {
        sharded,
        pathlib.Path("/proc/self"),
    }


# --- config.json and generation_config.json -------------------------------------------------------------------------

JSON = {
    "empty": b"",
    "not-json": b"model_type: mixtral",
    "cut-short": b'{"model_type": "mix',
    "list": b'["mixtral"]',
    "utf16": '{"model_type": "mixtral"}'.encode("utf-16"),
    "nested": b'{"a":' * 100_000,
    "nested-a-little": b'{"a":' * 65 + b"1" + b"}" * 65,
    "long-integer": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "long-float": b'{"vocab_size": 1e999}',
    "nan": b'{"vocab_size": NaN}',
    "infinity": b'{"vocab_size": -Infinity}',
    "key-twice": b'{"model_type": "mixtral", "model_type": "llama"}',
    "zero-bytes": bytes(100),
    "too-large": b'{"a": "' + b"x" * 8_000_000 + b'"}',
}
CONFIGS = {
    **{
        f"model-type-{i}": ("model_type", v, "CFG-MODEL-TYPE")
        for i, v in enumerate((None, 3, "gpt2", "../mixtral", []))
    },
    **{f"vocab-{i}": ("vocab_size", v, "CFG-VALUE") for i, v in enumerate((0, -1, "29", 29.0, True, None, [], 10**12))},
    "layers-billion": ("num_hidden_layers", 10**9, "CFG-VALUE"),
    "layers-thousand": ("num_hidden_layers", 1000, "CFG-VALUE"),
    "experts-billion": ("num_local_experts", 10**9, "CFG-VALUE"),
    "layers-zero": ("num_hidden_layers", 0, "CFG-VALUE"),
    "heads-not-dividing": ("num_key_value_heads", 4, "CFG-VALUE"),
    "top-k-too-many": ("num_experts_per_tok", 6, "CFG-VALUE"),
    "activation": ("hidden_act", "__import__('os')", "CFG-VALUE"),
    "tie-string": ("tie_word_embeddings", "false", "CFG-VALUE"),
    "eps-negative": ("rms_norm_eps", -1e-5, "CFG-VALUE"),
    "head-dim-odd": ("head_dim", 3, "CFG-VALUE"),
    "eos-outside": ("eos_token_id", 29, "CFG-VALUE"),
    "quantised": ("quantization_config", {"quant_method": "fp8"}, "CFG-VALUE"),
    "dtype": ("dtype", "int3", "CFG-VALUE"),
}
MISFITS = {
    "one-layer-more": ({"num_hidden_layers": 3}, "ST-MISSING", ""),
    "one-layer-less": ({"num_hidden_layers": 1}, "ST-EXTRA", ""),
    "one-expert-more": ({"num_local_experts": 6}, "ST-MISSING", ""),
    "one-expert-less": ({"num_local_experts": 4}, "ST-EXTRA", ""),
    "many-layers-more": ({"num_hidden_layers": 200}, "ST-MISSING", "model.layers.2.input_layernorm.weight"),
    "many-experts-more": (
        {"num_local_experts": 8000},
        "ST-MISSING",
        "model.layers.0.block_sparse_moe.experts.5.w1.weight",
    ),
    "most-layers": ({"num_hidden_layers": 512}, "ST-MISSING", "model.layers.2.input_layernorm.weight"),
    "most-experts": ({"num_hidden_layers": 8, "num_local_experts": 8192}, "ST-MISSING", ""),
    "hidden-one-more": ({"hidden_size": 13}, "ST-SHAPE", ""),
    "hidden-huge": ({"hidden_size": 2**31 - 1}, "ST-SHAPE", ""),
    "vocab-one-more": ({"vocab_size": 30}, "ST-SHAPE", ""),
    "heads-doubled": ({"num_attention_heads": 12}, "ST-SHAPE", ""),
    "another-family": ({"model_type": "llama"}, "ST-MISSING", ""),
}


@pytest.mark.parametrize("file", [CONFIG, "generation_config.json"])
@pytest.mark.parametrize("name", JSON)
def test_json_that_is_none(single, refused, name, file):
    (single / file).write_bytes(JSON[name])
    refused(single, "CFG-JSON", file)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be(single, refused, name):
    key, value, code = CONFIGS[name]
    edit(single / CONFIG, **{key: value})
    error = refused(single, code, CONFIG, key)
    if code == "CFG-MODEL-TYPE":
        assert all(known in error.expected for known in eqx_moe.families())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if "most-" in name else []) for name in MISFITS]
)
@pytest.mark.filterwarnings("ignore:config.json has keys")
def test_a_config_that_does_not_fit_the_weights(single, refused, name):
    changes, code, item = MISFITS[name]
    edit(single / CONFIG, **changes)
    refused(single, code, SINGLE, item)


@pytest.mark.parametrize(
    "key, value",
    [
        ("eos_token_id", 29),
        ("eos_token_id", "2"),
        ("temperature", -1.0),
        ("top_p", 2.0),
        ("top_k", -1),
        ("bos_token_id", True),
    ],
)
def test_a_generation_config_that_cannot_be(single, refused, key, value):
    edit(single / "generation_config.json", **{key: value})
    refused(single, "CFG-VALUE", "generation_config.json", key)


# --- The tokenizer --------------------------------------------------------------------------------------------------


def renumber(token, number):
    def act(data):
        for added in data["added_tokens"]:
            if added["content"] == token:
                added["id"] = number

    return act


TOKENIZERS = {
    "no-model": (lambda data: data.pop("model"), "TOK-LOAD"),
    "model-unknown": (lambda data: data["model"].update(type="Magic"), "TOK-LOAD"),
    "no-vocab": (lambda data: data["model"].pop("vocab"), "TOK-LOAD"),
    "id-string": (lambda data: data["model"]["vocab"].update(a="0"), "TOK-LOAD"),
    "id-negative": (lambda data: data["model"]["vocab"].update(a=-1), "TOK-LOAD"),
    "id-over-32-bits": (lambda data: data["model"]["vocab"].update(a=2**33), "TOK-LOAD"),
    "version": (lambda data: data.update(version="9.0"), "TOK-LOAD"),
    "added-gap": (renumber("</s>", 300), "TOK-ADDED"),
    "added-clash": (renumber("</s>", 0), "TOK-ADDED"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_cannot_be(single, refused, name):
    act, code = TOKENIZERS[name]
    data = json.loads((single / "tokenizer.json").read_text())
    act(data)
    (single / "tokenizer.json").write_text(json.dumps(data))
    refused(single, code, "tokenizer.json", "</s>" if code == "TOK-ADDED" else "", eqx_moe.load_tokenizer)


@pytest.mark.parametrize("name", [name for name in JSON if name != "too-large"])
def test_tokenizer_json_that_is_none(single, refused, name):
    (single / "tokenizer.json").write_bytes(JSON[name])
    refused(single, "TOK-JSON", "tokenizer.json", load=eqx_moe.load_tokenizer)


# --- Odd, but right: these must load --------------------------------------------------------------------------------


def rewrite_header(path: pathlib.Path, change) -> None:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    path.write_bytes(container(change(raw[8 : 8 + length]), raw[8 + length :]))


def reorder(text: bytes) -> bytes:
    header = json.loads(text)
    return json.dumps(dict(reversed(header.items()))).encode()


def without_metadata(text: bytes) -> bytes:
    header = json.loads(text)
    del header["__metadata__"]
    return json.dumps(header).encode()


def hub_cache(folder: pathlib.Path) -> pathlib.Path:
    """The same files as the Hugging Face cache holds them: links into ../../blobs."""
    snapshot, blobs = folder.parent / "snapshots" / "abc", folder.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(pathlib.Path("..", "..", "blobs", str(i)))
    return snapshot


def rename_shards(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for shard in (SHARD1, SHARD2):
        (folder / shard).rename(folder / f"part {shard}")
    edit(folder / INDEX, weight_map={name: f"part {shard}" for name, shard in weight_map.items()})


def canary(folder):
    (folder / "training_args.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'touch canary'\ntR.")
    (folder / "README.md").write_text("---\nlicense: !!python/object/apply:os.system ['touch canary']\n---\n")
    (folder / "modeling_mixtral.py").write_text("import pathlib; pathlib.Path('canary').touch()")
    edit(folder / CONFIG, auto_map={"AutoModelForCausalLM": "modeling_mixtral.Model"}, trust_remote_code=True)


LOOKALIKES = {
    "header-padded-much": lambda folder: rewrite_header(folder / SHARD1, lambda text: text + b" " * 40_000_000),
    "remnants-of-a-killed-save": lambda folder: (folder / f".{SHARD1}.0123456789abcdef.tmp").write_bytes(b"half"),
    "checksums-of-another-model": lambda folder: edit(folder / "eqx_moe.json", sha256={SHARD1: "0" * 64}),
    "header-padded": lambda folder: rewrite_header(folder / SHARD1, lambda text: text + b" " * 1000),
    "header-after-spaces": lambda folder: rewrite_header(folder / SHARD1, lambda text: b"   " + text),
    "header-in-other-order": lambda folder: rewrite_header(folder / SHARD1, reorder),
    "no-metadata": lambda folder: rewrite_header(folder / SHARD1, without_metadata),
    "total-size-wrong": set_index(metadata={"total_size": 1}),
    "index-without-metadata": lambda folder: edit(folder / INDEX, metadata=None),
    "shards-renamed": rename_shards,
    "hub-cache": hub_cache,
    "no-generation-config": lambda folder: (folder / "generation_config.json").unlink(),
    "byte-order-mark": lambda folder: (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes()),
    "code-and-pickles-beside": canary,
    "unknown-key": lambda folder: edit(folder / CONFIG, a_new_key={"x": [1]}),
    "no-limit-as-transformers-writes-it": lambda folder: edit(
        folder / "tokenizer_config.json", model_max_length=int(1e30)
    ),
}


@pytest.mark.parametrize("name", LOOKALIKES)
@pytest.mark.filterwarnings("ignore:config.json has keys")
def test_an_odd_folder_loads(made, sharded, name, monkeypatch):
    monkeypatch.chdir(sharded.parent)
    folder = LOOKALIKES[name](sharded)
    loaded = eqx_moe.from_pretrained(folder if isinstance(folder, pathlib.Path) else sharded, dtype="auto")
    right = safetensors.numpy.load_file(made / "single" / SINGLE)
    leaves = leaf_paths(loaded)
    np.testing.assert_array_equal(leaves["layers.1.moe.experts.gate"][2], right[EXPERT])
    np.testing.assert_array_equal(leaves["head.weight"], right[HEAD])
    assert loaded.generation_config.eos_token_id == (2,)
    assert not (sharded.parent / "canary").exists() and not (sharded / "canary").exists()
    # And is saved into, with what its small files say.
    folder = folder if isinstance(folder, pathlib.Path) else sharded
    eqx_moe.save_pretrained(loaded, folder, eqx_moe.load_tokenizer(folder))
    assert json.loads((folder / CONFIG).read_text()).get("auto_map") is None


def test_a_tied_head_stored_equal(single):
    tensors = safetensors.numpy.load_file(single / SINGLE)
    safetensors.numpy.save_file(tensors | {HEAD: tensors[EMBED]}, single / SINGLE)
    edit(single / CONFIG, tie_word_embeddings=True)
    assert eqx_moe.from_pretrained(single).head is None


def test_known_buffers_are_left_out(single):
    tensors = safetensors.numpy.load_file(single / SINGLE)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.arange(2, dtype="i8")
    safetensors.numpy.save_file(tensors, single / SINGLE)
    eqx_moe.from_pretrained(single)


def test_every_code_is_documented(root):
    import re

    used = set()
    for path in (root / "eqx_moe").rglob("*.py"):
        if path.name != "errors.py":
            used |= set(re.findall(r'"((?:CFG|ST|IDX|SUM|TOK|HUB|DATA|COUNTS)-[A-Z0-9-]+)"', path.read_text()))
    composed = {f"{kind}-{part}" for kind in ("CFG", "IDX", "SUM", "TOK") for part in ("FILE", "JSON")}
    assert used | composed == set(CODES)
