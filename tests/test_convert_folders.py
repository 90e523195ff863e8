"""`convert.names`, `from_hf` and `to_hf`: the right bytes, bounded memory, and errors that a shell can use."""

import json
import pathlib
import subprocess
import sys

import converting
import numpy as np
import pytest
import safetensors.numpy
import test_convert_quantised as quantised

from convert import folders, from_hf, from_mistral, names, to_hf, to_mistral, verify
from eqx_moe.checkpoint.shards import open_weights
from eqx_moe.errors import EqxMoeError

SINGLE = "model.safetensors"
PROGRAMS = {"names": names, "from_hf": from_hf, "to_hf": to_hf, "from_mistral": from_mistral}
PROGRAMS |= {"to_mistral": to_mistral, "verify": verify}


def run(program, *arguments) -> None:
    assert program.main([str(argument) for argument in arguments]) == 0


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


@pytest.mark.parametrize("config", [converting.CONFIG, converting.DENSE], ids=["experts", "dense"])
def test_there_and_back(tmp_path, config):
    first, packed, last = (tmp_path / name for name in ("first", "packed", "last"))
    leaves = converting.write(first, config, "bfloat16", max_shard_size="9KB", tokenizer=True)
    run(from_hf, first, packed, "--verify")
    run(to_hf, packed, last, "--max-shard-size", "9KB", "--verify")
    found, again = tensors(packed), tensors(last)
    before = tensors(first)
    assert before.keys() == again.keys()
    assert all(before[name].tobytes() == again[name].tobytes() for name in before)
    assert len(list(last.glob("*.safetensors"))) > 1 and len(list(packed.glob("*.safetensors"))) == 1
    if config is converting.CONFIG:
        gate, up = (leaves[f"layers.1.moe.experts.{part}"] for part in ("gate", "up"))
        joined = np.concatenate([gate, up], axis=1)
        assert found["model.layers.1.mlp.experts.gate_up_proj"].tobytes() == joined.tobytes()
        assert not any("block_sparse_moe" in name for name in found)
    for folder in (packed, last):
        for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (first / name).read_bytes()
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_casting(tmp_path):
    leaves = converting.write(tmp_path / "a")
    run(from_hf, tmp_path / "a", tmp_path / "b", "--dtype", "bfloat16", "--verify")
    found = tensors(tmp_path / "b")["model.layers.0.mlp.experts.down_proj"]
    assert found.tobytes() == leaves["layers.0.moe.experts.down"].astype(converting.DTYPES["bfloat16"]).tobytes()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_fp8_is_decoded(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    converting.write(source)
    _, plain = quantised.quantise(source)
    run(to_hf, source, target, "--verify")
    found = tensors(target)
    assert found.keys() == plain.keys()
    assert all(found[name].tobytes() == plain[name].tobytes() for name in plain)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


def test_verifying_sees_a_flipped_bit(tmp_path):
    converting.write(tmp_path / "a")
    run(from_hf, tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / SINGLE
    with open_weights(tmp_path / "b") as stored:
        place = stored["model.layers.1.mlp.experts.down_proj"].entry.stop - 1
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with (
        folders.open_folder(tmp_path / "a") as source,
        folders.open_folder(tmp_path / "b") as result,
        pytest.raises(EqxMoeError, match=r"layers\.1\.moe\.experts\.down\[4\]"),
    ):
        folders.compare(source, result)


def test_names(tmp_path, capsys):
    converting.write(tmp_path / "a", layout="packed")
    run(names, tmp_path / "a")
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: [cell.strip() for cell in cells[1:] if cell] for cells in lines}
    both = "layers.1.moe.experts.gate + layers.1.moe.experts.up"
    assert rows[both] == ["model.layers.1.mlp.experts.gate_up_proj", "5 x 34 x 12", "F32"]
    assert rows["norm.weight"] == ["model.norm.weight", "12", "F32"]

    converting.write(tmp_path / "b")
    quantised.quantise(tmp_path / "b")
    run(names, tmp_path / "b")
    out = capsys.readouterr().out
    assert "layers.0.moe.experts.gate[3]    model.layers.0.block_sparse_moe.experts.3.w1.weight" in out
    assert "F8_E4M3" in out and "scales, decoded on read" in out


_PEAK = """
import resource, sys
from convert import from_hf, to_hf
first, packed, last = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert from_hf.main([first, packed, "--max-shard-size", "20MB"]) == 0
assert to_hf.main([packed, last]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss has other units")
def test_memory_is_that_of_one_stack(tmp_path, root):
    import dataclasses

    config = dataclasses.replace(
        converting.CONFIG, hidden_size=128, intermediate_size=512, num_local_experts=8, num_hidden_layers=40
    )
    converting.write(tmp_path / "a", config, "bfloat16")
    size = (tmp_path / "a" / SINGLE).stat().st_size
    stack = 8 * 2 * 512 * 128 * 2
    command = [sys.executable, "-c", _PEAK, *(tmp_path / name for name in "abc")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1]) * 1024
    # The stack and the two that it is put together from; the rest is what programs take.
    assert size > 100e6 and grown < 6 * stack + 16e6, (size, stack, grown)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_examples(program, capsys):
    assert PROGRAMS[program].main(["--help"]) == 0
    out = capsys.readouterr().out
    assert f"examples:\n  python -m convert.{program} " in out


def test_exit_status_and_short_errors(tmp_path, capsys, monkeypatch):
    def failed(program, *arguments):
        status = program.main([str(argument) for argument in arguments])
        return status, capsys.readouterr().err

    assert failed(from_hf, tmp_path)[0] == 2
    assert failed(from_hf, tmp_path, tmp_path / "x", "--max-shard-size", "5 bananas")[0] == 2
    status, text = failed(from_hf, tmp_path / "none", tmp_path / "x")
    assert status == 1 and "[CFG-FOLDER]" in text and "Traceback" not in text

    converting.write(tmp_path / "a")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    status, text = failed(to_hf, tmp_path / "a", tmp_path / "taken")
    assert status == 1 and "empty or not there yet" in text
    assert [entry.name for entry in (tmp_path / "taken").iterdir()] == ["notes.txt"]

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "save_leaves", full_disk)
    status, text = failed(to_hf, tmp_path / "a", tmp_path / "new" / "deep")
    assert status == 1 and "No space left on device" in text and len(text) < 200
    assert not (tmp_path / "new").exists()


def test_code_does_not_go_along(tmp_path, capsys):
    converting.write(tmp_path / "a")
    (tmp_path / "a" / "modeling.py").write_text("print('no')")
    (tmp_path / "a" / "LICENSE").write_text("free")
    run(from_hf, tmp_path / "a", tmp_path / "b")
    assert "left out: 'modeling.py'" in capsys.readouterr().out
    assert (tmp_path / "b" / "LICENSE").exists() and not (tmp_path / "b" / "modeling.py").exists()
