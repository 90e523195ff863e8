"""`convert.verify` against the real transformers, and what it says when weights are wrong."""

import json

import converting
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert import from_hf, from_mistral, to_mistral, verify  # noqa: E402
from eqx_moe.checkpoint.quantised import decode_fp8, decode_mxfp4  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    """No bars of transformers' own on stderr."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def test_a_model_agrees(tmp_path, capsys):
    converting.write(tmp_path / "a", tokenizer=True)
    assert verify.main([str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    page = (tmp_path / "out" / "verify.md").read_text()
    assert "All agrees." in page and "differs" not in page
    assert page.count("| agrees |") == 6
    assert "| greedy text | " in page and "| 1 | " in page
    assert (tmp_path / "out" / "verify.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["verify.md", "verify.png"]


def test_a_model_that_computes_otherwise_does_not(tmp_path, capsys, monkeypatch):
    converting.write(tmp_path / "a", converting.DENSE)
    load = verify.from_pretrained

    def altered(folder, **options):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
        return load(folder, **options)

    monkeypatch.setattr(verify, "from_pretrained", altered)
    assert verify.main([str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "DIFFERS  hidden states of every layer" in captured.out and "DIFFERS  logits" in captured.out
    assert "agrees   tensors, bit for bit" in captured.out
    assert "does not agree with transformers" in captured.err


def test_transformers_loads_what_the_programs_write(tmp_path):
    converting.write(tmp_path / "a", dtype="bfloat16")
    folders = [tmp_path / name for name in "abcd"]
    programs = [from_hf, to_mistral, from_mistral]
    for program, source, target in zip(programs, (folders[0], folders[0], folders[2]), folders[1:], strict=True):
        assert program.main([str(source), str(target)]) == 0
    models = []
    for folder in (folders[0], folders[1], folders[3]):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        models.append(dict(model.named_parameters()))
    assert models[0].keys() == models[1].keys() == models[2].keys()
    for name, parameter in models[0].items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, models[1][name]) and torch.equal(parameter, models[2][name]), name
    assert safetensors.numpy.load_file(folders[2] / "consolidated.safetensors")


def test_mxfp4_decodes_to_the_same_bits():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(9)
    blocks = rng.integers(0, 256, (3, 5, 2, 16), np.uint8)
    scales = rng.integers(0, 250, (3, 5, 2), np.uint8)
    theirs = convert_moe_packed_tensors(torch.as_tensor(blocks), torch.as_tensor(scales)).contiguous()
    ours = decode_mxfp4(blocks, scales).swapaxes(-1, -2)
    assert theirs.shape == ours.shape
    assert theirs.view(torch.uint8).numpy().tobytes() == ours.tobytes()


def test_fp8_decodes_to_the_same_bits():
    """Where their decoder can: it finds the size of blocks by a division, which edge blocks do not leave whole."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(9)
    weight = rng.normal(size=(256, 384)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(1e-3, 2, (2, 3)).astype(np.float32)
    fp8 = torch.as_tensor(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    theirs = Fp8Dequantize(None)._dequantize_one(fp8, torch.as_tensor(scales), torch.bfloat16)
    assert theirs.contiguous().view(torch.uint8).numpy().tobytes() == decode_fp8(weight, scales).tobytes()
