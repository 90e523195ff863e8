"""Mistral's own layout: both ways, and what its rotary embedding makes of the order of rows."""

import dataclasses
import json

import converting
import numpy as np
import pytest
import safetensors.numpy

from convert import from_mistral, mistral, to_mistral
from eqx_moe.errors import CheckpointError
from eqx_moe.hub import load_config

SINGLE = "model.safetensors"
PARAMS = {
    "dim": 12,
    "n_layers": 2,
    "head_dim": 4,
    "hidden_dim": 17,
    "n_heads": 3,
    "n_kv_heads": 1,
    "norm_eps": 1e-05,
    "vocab_size": 283,
    "moe": {"num_experts": 5, "num_experts_per_tok": 2},
}


def run(program, *arguments) -> None:
    assert program.main([str(argument) for argument in arguments]) == 0


def own_layout(rng) -> dict[str, np.ndarray]:
    """The tensors that `PARAMS` describes, as mistral-inference names and shapes them."""
    shapes = {"tok_embeddings.weight": (283, 12), "norm.weight": (12,), "output.weight": (283, 12)}
    for layer in ("layers.0.", "layers.1."):
        shapes |= {f"{layer}attention_norm.weight": (12,), f"{layer}ffn_norm.weight": (12,)}
        shapes |= {f"{layer}attention.wq.weight": (12, 12), f"{layer}attention.wo.weight": (12, 12)}
        shapes |= {f"{layer}attention.wk.weight": (4, 12), f"{layer}attention.wv.weight": (4, 12)}
        shapes[f"{layer}feed_forward.gate.weight"] = (5, 12)
        for expert in range(5):
            place = f"{layer}feed_forward.experts.{expert}."
            shapes |= {f"{place}w1.weight": (17, 12), f"{place}w2.weight": (12, 17), f"{place}w3.weight": (17, 12)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("files", [1, 3])
def test_from_their_names_to_hugging_faces(tmp_path, files):
    theirs = own_layout(np.random.default_rng(7))
    source, target, again = (tmp_path / name for name in ("source", "target", "again"))
    source.mkdir()
    for i in range(files):
        some = dict(list(theirs.items())[i::files])
        name = "consolidated.safetensors" if files == 1 else f"consolidated-{i}-of-{files}.safetensors"
        safetensors.numpy.save_file(some, source / name)
    (source / "params.json").write_text(json.dumps(PARAMS))
    (source / "tekken.json").write_text("{}")
    run(from_mistral, source, target, "--verify")

    found = safetensors.numpy.load_file(target / SINGLE)
    expert = "model.layers.1.block_sparse_moe.experts.3."
    for ours, name in (("w1", "w1"), ("w2", "w2"), ("w3", "w3")):
        expected = theirs[f"layers.1.feed_forward.experts.3.{name}.weight"]
        np.testing.assert_array_equal(found[f"{expert}{ours}.weight"], expected)
    np.testing.assert_array_equal(
        found["model.layers.1.block_sparse_moe.gate.weight"], theirs["layers.1.feed_forward.gate.weight"]
    )
    # Row 2 of a head of four is the second of the first pair there, the first of the second half here.
    q = theirs["layers.0.attention.wq.weight"]
    np.testing.assert_array_equal(
        found["model.layers.0.self_attn.q_proj.weight"], q[[0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]]
    )
    k = theirs["layers.0.attention.wk.weight"]
    np.testing.assert_array_equal(found["model.layers.0.self_attn.k_proj.weight"], k[[0, 2, 1, 3]])
    config = load_config(target)
    assert type(config).__name__ == "MixtralConfig"
    assert (config.num_local_experts, config.sliding_window, config.rope_parameters.rope_theta) == (5, None, 1e6)
    assert (target / "tekken.json").exists()

    run(to_mistral, target, again, "--verify")
    back = safetensors.numpy.load_file(again / "consolidated.safetensors")
    assert back.keys() == theirs.keys()
    assert all(back[name].tobytes() == theirs[name].tobytes() for name in theirs)
    params = json.loads((again / "params.json").read_text())
    assert {key: params[key] for key in PARAMS} == PARAMS
    assert not (again / "config.json").exists() and not (again / SINGLE).exists()


FIRST = "layers.0.block_sparse_moe"
FIRST_PARAMS = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "intermediate_size": 17,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-05,
    "vocab_size": 283,
    "num_local_experts": 5,
    "sliding_window": "4096",
    "rope_theta": 1e6,
}


def first_layout(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors as the first files had them, an expert's rows behind another's."""
    result = {name: values for name, values in theirs.items() if "feed_forward" not in name}
    for layer in range(2):
        ours, old = f"layers.{layer}.feed_forward.", f"layers.{layer}.block_sparse_moe."
        result[f"{old}gate.weight"] = theirs[f"{ours}gate.weight"]
        for name in ("w1", "w2", "w3"):
            stack = np.empty((5 * 17, 12), np.float32)
            for expert, row, column in np.ndindex(5, 17, 12):
                at = (column, row) if name == "w2" else (row, column)
                stack[17 * expert + row, column] = theirs[f"{ours}experts.{expert}.{name}.weight"][at]
            result[old + name] = stack
    return result


@pytest.mark.parametrize("params", [FIRST_PARAMS, PARAMS | {"sliding_window": 4096, "rope_theta": 1e6}])
def test_the_first_files_of_mixtral(tmp_path, params):
    theirs = own_layout(np.random.default_rng(7))
    folders = {name: tmp_path / name for name in ("first", "later", "first-hf", "later-hf")}
    for name in ("first", "later"):
        folders[name].mkdir()
    tensors = list(first_layout(theirs).items())
    for i in range(2):  # the tensors of the eight files differ, none is cut
        safetensors.numpy.save_file(dict(tensors[i::2]), folders["first"] / f"consolidated.0{i}.safetensors")
    safetensors.numpy.save_file(theirs, folders["later"] / "consolidated.safetensors")
    (folders["first"] / "params.json").write_text(json.dumps(params))
    later = PARAMS | {"sliding_window": 4096, "rope_theta": 1e6}
    (folders["later"] / "params.json").write_text(json.dumps(later))
    for name in ("first", "later"):
        run(from_mistral, folders[name], folders[f"{name}-hf"], "--verify")
    found, expected = (folders[f"{name}-hf"] for name in ("first", "later"))
    assert (found / SINGLE).read_bytes() == (expected / SINGLE).read_bytes()
    first, later = (json.loads((folder / "config.json").read_text()) for folder in (found, expected))
    assert first | {"head_dim": 4} == later  # the first params.json does not say it


@pytest.mark.parametrize(
    "change, code, item",
    [
        (lambda old: old.pop(f"{FIRST}.w3"), "ST-MISSING", f"{FIRST}.w3"),
        (lambda old: old.update({f"{FIRST}.w2": np.ones((12, 85), "f4")}), "ST-SHAPE", f"{FIRST}.w2"),
    ],
)
def test_first_files_that_are_not_whole(tmp_path, change, code, item):
    old = first_layout(own_layout(np.random.default_rng(7)))
    change(old)
    safetensors.numpy.save_file(old, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(FIRST_PARAMS))
    with pytest.raises(CheckpointError) as caught, mistral.open_mistral(tmp_path):
        pass
    assert (caught.value.code, caught.value.item) == (code, item)


def test_what_the_first_params_do_not_say():
    """A theta that is not there is 1e4, with a window and without, as in transformers' converter."""
    params = {key: value for key, value in FIRST_PARAMS.items() if key != "rope_theta"}
    for changed in ({}, {"sliding_window": None}):
        config = mistral.config_of(params | changed, "params.json")
        assert (config.rope_parameters.rope_theta, config.num_experts_per_tok) == (1e4, 2)
    del params["rms_norm_eps"]
    with pytest.raises(CheckpointError) as caught:
        mistral.config_of(params, "params.json")
    assert (caught.value.code, caught.value.item) == ("CFG-MISSING", "rms_norm_eps")


def test_scores_of_attention_are_theirs():
    """q . k after rotation, in pairs as complex numbers (theirs) and in halves (ours): the same."""
    rng, heads, size, hidden = np.random.default_rng(8), 3, 8, 5
    q, k = rng.normal(size=(2, heads * size, hidden))
    x, y = rng.normal(size=(2, hidden))
    angles = 7 * 1e4 ** (-np.arange(0, size, 2) / size), 3 * 1e4 ** (-np.arange(0, size, 2) / size)

    def theirs(rows, value, angle):
        head = (rows @ value).reshape(heads, size // 2, 2)
        return (head[..., 0] + 1j * head[..., 1]) * np.exp(1j * angle)

    def ours(rows, value, angle):
        first, second = np.split((mistral.to_halves(rows, heads) @ value).reshape(heads, size), 2, axis=-1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    expected = np.sum(theirs(q, x, angles[0]) * theirs(k, y, angles[1]).conj(), axis=-1).real
    np.testing.assert_allclose(np.sum(ours(q, x, angles[0]) * ours(k, y, angles[1]), axis=-1), expected, rtol=1e-9)
    np.testing.assert_array_equal(mistral.to_pairs(mistral.to_halves(q, heads), heads), q)


@pytest.mark.parametrize("config", [converting.CONFIG, converting.DENSE], ids=["experts", "dense"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_there_and_back(tmp_path, config, tied):
    config = dataclasses.replace(config, tie_word_embeddings=tied, sliding_window=9)
    first, middle, last = (tmp_path / name for name in ("first", "middle", "last"))
    converting.write(first, config, "bfloat16")
    run(to_mistral, first, middle, "--verify")
    run(from_mistral, middle, last, "--verify")
    assert (first / SINGLE).read_bytes() == (last / SINGLE).read_bytes()
    again = load_config(last)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "router_aux_loss_coef": 0.02, "initializer_range": 0.2}
    ids = {key: value for key, value in ids.items() if hasattr(config, key)}
    before = load_config(first)
    assert dataclasses.replace(again, **ids, extra=()) == dataclasses.replace(before, extra=())


@pytest.mark.parametrize(
    "changed, code, item",
    [
        ({"dim": None}, "CFG-MISSING", "dim"),
        ({"yarn": {"factor": 4}}, "CFG-VALUE", "yarn"),
        ({"moe": {"num_experts": 5}}, "CFG-VALUE", "moe"),
        ({"model_type": "mamba"}, "CFG-VALUE", "model_type"),
        ({"n_heads": "3"}, "CFG-VALUE", "num_attention_heads"),
        ({"n_layers": 3}, "ST-MISSING", "layers.2.attention_norm.weight"),
        ({"hidden_dim": 18}, "ST-SHAPE", "layers.0.feed_forward.experts.0.w1.weight"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, changed, code, item):
    safetensors.numpy.save_file(own_layout(np.random.default_rng(7)), tmp_path / "consolidated.safetensors")
    params = {key: value for key, value in {**PARAMS, **changed}.items() if value is not None}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError) as caught, mistral.open_mistral(tmp_path):
        pass
    assert (caught.value.code, caught.value.item) == (code, item)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    (tmp_path / "consolidated.00.pth").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError) as caught, mistral.open_mistral(tmp_path):
        pass
    assert caught.value.code == "ST-PICKLE"


def test_what_the_layout_cannot_say_is_refused():
    rope = dataclasses.replace(converting.CONFIG.rope_parameters, rope_type="linear", factor=2.0)
    with pytest.raises(ValueError, match="rotary"):
        mistral.params_of(dataclasses.replace(converting.CONFIG, rope_parameters=rope))


def test_what_params_json_has_no_place_for_is_said(tmp_path, capsys):
    config = dataclasses.replace(converting.CONFIG, bos_token_id=7, eos_token_id=9, router_aux_loss_coef=0.5)
    converting.write(tmp_path / "a", config, "bfloat16")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 9}')
    run(to_mistral, tmp_path / "a", tmp_path / "b")
    said = capsys.readouterr().out
    assert "bos_token_id 7 (will be read as 1)" in said and "eos_token_id 9 (will be read as 2)" in said
    assert "head_dim" not in said and "left out: 'generation_config.json'" in said
