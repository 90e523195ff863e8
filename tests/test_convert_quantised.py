"""Quantised containers: the decoders against loops over single values, and reading a model that has them."""

import dataclasses
import json

import converting
import jax
import numpy as np
import pytest
import quantised
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from quantised import AHEAD, BF16, FP8, SINGLE, mxfp4_by_loops, quantise, random_fp8, write

import eqx_moe
from eqx_moe.checkpoint import leaf_paths, open_weights, read_array, shards
from eqx_moe.checkpoint.quantised import decode_fp8, decode_mxfp4, decoded
from eqx_moe.errors import CheckpointError
from eqx_moe.nn.router import updated_selection_bias


def fp8_by_loops(weight, scales):
    result = np.empty(weight.shape, BF16)
    for index in np.ndindex(weight.shape):
        *batch, row, column = index
        result[index] = BF16(np.float32(weight[index]) * np.float32(scales[(*batch, row // 128, column // 128)]))
    return result


@pytest.mark.parametrize("shape", [(128, 256), (131, 129), (3, 5, 7), (2, 1, 257), (576, 3)], ids=str)
def test_fp8(shape):
    weight, scales = random_fp8(np.random.default_rng(1), *shape)
    np.testing.assert_array_equal(decode_fp8(weight, scales), fp8_by_loops(weight, scales))


@given(st.integers(0, 2**32), st.integers(0, 254))
def test_mxfp4(seed, scale):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (2, 3, 5, 16), np.uint8)
    scales = rng.integers(0, 255, (2, 3, 5), np.uint8)
    scales[0, 0, 0] = scale
    with np.errstate(over="ignore"):
        expected = mxfp4_by_loops(blocks, scales)
    found = decode_mxfp4(blocks, scales)
    assert found.dtype == BF16 and found.shape == (2, 3, 160)
    assert found.tobytes() == expected.tobytes()  # the sign of zero, too


def test_mxfp4_scale_255_is_nan():
    values = decode_mxfp4(np.zeros((1, 2, 16), np.uint8), np.array([[255, 0]], np.uint8))
    assert np.isnan(values[0, :32]).all() and not values[0, 32:].any()


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """Quantised matrices in a file: a name -> its values, decoded all at once."""
    folder, rng = tmp_path_factory.mktemp("quantised"), np.random.default_rng(2)
    tensors, expected = {}, {}
    for name, shape in {"edges": (300, 131), "stack": (3, 130, 17), "row": (1, 400)}.items():
        tensors[name], tensors[f"{name}_scale_inv"] = random_fp8(rng, *shape)
        expected[name] = decode_fp8(tensors[name], tensors[f"{name}_scale_inv"])
    for name, shape in {"mx": (5, 7, 2), "mx_stack": (3, 131, 1), "mx_deep": (2, 3, 5, 3)}.items():
        blocks, scales = rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(100, 150, shape, np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[f"{name}_blocks"] = decode_mxfp4(blocks, scales)
    write(folder / SINGLE, tensors)
    return folder, expected


@given(st.data())
def test_any_box_of_a_quantised_tensor_can_be_read(matrices, data):
    folder, expected = matrices
    with open_weights(folder) as stored:
        tensors = decoded(stored)
        assert tensors.keys() == expected.keys()
        name = data.draw(st.sampled_from(sorted(expected)))
        values = expected[name]
        assert tensors[name].entry.shape == values.shape and tensors[name].entry.dtype == "BF16"
        ends = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in values.shape]
        target = np.full([stop - start for start, stop in ends], 99, BF16)
        tensors[name].read(tuple(range(*each) for each in ends), target)
        assert target.tobytes() == values[tuple(slice(*each) for each in ends)].tobytes()


def test_a_model_in_fp8_loads_decoded_and_is_saved_so(tmp_path):
    folder, again = tmp_path / "a", tmp_path / "b"
    converting.write(folder)
    _, plain = quantise(folder)
    model = eqx_moe.from_pretrained(folder, dtype="auto")
    eqx_moe.save_pretrained(model, again)
    assert "quantization_config" not in json.loads((again / "config.json").read_text())
    saved = safetensors.numpy.load_file(again / SINGLE)
    assert saved.keys() == plain.keys()
    for name, expected in plain.items():
        assert saved[name].dtype == BF16 and saved[name].tobytes() == expected.tobytes(), name
    for one, two in zip(
        jax.tree.leaves(model), jax.tree.leaves(eqx_moe.from_pretrained(again, dtype="auto")), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    assert all(leaf.dtype == BF16 for leaf in leaf_paths(model).values())


def test_headers_are_read_once_when_the_config_names_no_dtype(tmp_path, monkeypatch):
    """As gpt-oss's releases."""
    quantised.write_gpt_oss(tmp_path)
    read, original = [], shards.read_header
    monkeypatch.setattr(shards, "read_header", lambda file, name: read.append(name) or original(file, name))
    assert eqx_moe.from_pretrained(tmp_path, dtype="float32").config.dtype == "bfloat16"
    assert len(read) == 1


def test_what_is_quantised_can_be_had_as_it_is(tmp_path):
    """`open_weights` gives what is stored, `decoded` is a step of its own: codes and scales for who runs on them."""
    tensors, plain = quantised.write_deepseek(tmp_path)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    with open_weights(tmp_path) as stored:
        assert stored.keys() == tensors.keys()
        codes, scales = (read_array(stored[each], each) for each in (name, f"{name}_scale_inv"))
        assert decoded(stored).keys() == plain.keys()
    assert codes.dtype == FP8 and codes.tobytes() == tensors[name].tobytes()
    assert decode_fp8(codes, scales).tobytes() == plain[name].tobytes()


def test_a_selection_bias_stored_in_less(tmp_path):
    """As it is stored, if nothing else is asked for; else, and once it is updated, in float32."""
    tensors, _ = quantised.write_deepseek(tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = tensors[name].astype(BF16)
    write(tmp_path / SINGLE, tensors | {name: stored})
    for dtype, expected in (("auto", BF16), ("bfloat16", np.float32), ("float32", np.float32)):
        router = eqx_moe.from_pretrained(tmp_path, dtype=dtype).layers[1].moe.router
        assert router.selection_bias.dtype == expected and np.array_equal(router.selection_bias, stored)
        updated = updated_selection_bias(router.selection_bias, jax.numpy.arange(8), 1e-3)
        assert updated.dtype == np.float32
        np.testing.assert_allclose(np.abs(updated - stored.astype(np.float32)), 1e-3, atol=1e-6)


def test_scales_that_do_not_belong_are_refused(tmp_path):
    folder = tmp_path
    converting.write(folder)
    tensors, _ = quantise(folder)
    name = next(name for name in tensors if name.endswith("_scale_inv"))

    def refused(code, changed):
        write(folder / SINGLE, changed)
        with pytest.raises(CheckpointError) as caught:
            eqx_moe.from_pretrained(folder)
        assert caught.value.code == code and caught.value.item in (name, name.removesuffix("_scale_inv"))

    refused("ST-SHAPE", {**tensors, name: np.ones((2, 1), np.float32)})
    refused("ST-DTYPE", {**tensors, name: np.ones((1, 1), FP8)})
    refused("ST-DTYPE", {key: value for key, value in tensors.items() if key != name})


@pytest.fixture
def tied(tmp_path):
    """A model whose embedding is in FP8, what loads it with a second copy as its head, and the embedding's values."""
    converting.write(tmp_path, dataclasses.replace(converting.DENSE, vocab_size=131, tie_word_embeddings=True))
    tensors = {name: tensor.astype(BF16) for name, tensor in safetensors.numpy.load_file(tmp_path / SINGLE).items()}
    name = "model.embed_tokens.weight"
    codes, scales = random_fp8(np.random.default_rng(9), *tensors[name].shape)
    assert scales.shape == (2, 1)

    def load(head, its_scales=None):
        copies = {name: codes, f"{name}_scale_inv": scales, "lm_head.weight": head}
        if its_scales is not None:
            copies["lm_head.weight_scale_inv"] = its_scales
        write(tmp_path / SINGLE, tensors | copies)
        return eqx_moe.from_pretrained(tmp_path, dtype="auto")

    return load, codes, scales, decode_fp8(codes, scales)


def test_a_tied_head_in_fp8_has_the_values_of_the_embedding(tied):
    """Whatever codes and scales say them."""
    load, codes, scales, values = tied
    doubled = (codes.astype(np.float32) * 2).astype(FP8)
    assert np.array_equal(doubled.astype(np.float32), codes.astype(np.float32) * 2)
    for head in ((codes, scales), (doubled, scales / 2), (values,)):
        model = load(*head)
        assert model.head is None and np.asarray(model.embed.weight).tobytes() == values.tobytes()


def test_a_tied_head_in_fp8_that_differs_is_refused(tied):
    load, codes, scales, values = tied
    other, last = codes.copy(), scales.copy()
    other[-1, -1], last[-1] = -other[-1, -1], last[-1] * 2
    refused = [((other, scales), f"at byte {values.nbytes - 1}"), ((codes, last), ""), ((values[::-1].copy(),), "")]
    for head, found in refused:
        with pytest.raises(CheckpointError) as caught:
            load(*head)
        assert (caught.value.code, caught.value.item) == ("ST-TIED", "lm_head.weight")
        assert caught.value.found.endswith(found)


def test_a_tied_head_in_a_dtype_that_no_weight_has_is_refused_for_that(tied):
    load, codes, _, _ = tied
    for head in (codes, codes.view(np.uint8)):
        with pytest.raises(CheckpointError) as caught:
            load(head)
        assert (caught.value.code, caught.value.item) == ("ST-DTYPE", "lm_head.weight")
        assert "BF16" in caught.value.expected


def test_a_deepseek_in_fp8_with_edges_and_a_module_that_predicts_ahead(tmp_path):
    """What it holds is decoded to the edges; what lies behind the last layer is left out, with its scales."""
    folder, again = tmp_path / "a", tmp_path / "b"
    tensors, plain = quantised.write_deepseek(folder)
    edge = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[edge].shape == (144, 136) and tensors[f"{edge}_scale_inv"].shape == (2, 2)
    assert f"{AHEAD}mlp.experts.7.down_proj.weight_scale_inv" in tensors
    model = eqx_moe.from_pretrained(folder, dtype="auto")
    eqx_moe.save_pretrained(model, again)
    config = json.loads((again / "config.json").read_text())
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 0
    saved = safetensors.numpy.load_file(again / SINGLE)
    assert saved.keys() == {name for name in plain if not name.startswith(AHEAD)}
    for name, values in saved.items():
        assert values.dtype == plain[name].dtype and values.tobytes() == plain[name].tobytes(), name
    # In one dtype the bias stays as wide as it was.
    half = eqx_moe.from_pretrained(folder, dtype="bfloat16")
    assert [path for path, leaf in leaf_paths(half).items() if leaf.dtype != BF16] == [
        "layers.1.moe.router.selection_bias"
    ]


def test_what_is_not_known_behind_the_last_layer_is_refused(tmp_path):
    tensors, _ = quantised.write_deepseek(tmp_path)

    def refused():
        with pytest.raises(CheckpointError) as caught:
            eqx_moe.from_pretrained(tmp_path)
        assert caught.value.code == "ST-EXTRA"
        return caught.value

    # Without the matrix that joins it to the model it is a layer like others, one more than config.json says.
    layer = {name: tensor for name, tensor in tensors.items() if name != f"{AHEAD}eh_proj.weight"}
    write(tmp_path / SINGLE, layer)
    assert f"{AHEAD}input_layernorm.weight" in {problem.split("'")[1] for problem in refused().problems}
    for name in (f"{AHEAD}mlp.mystery.weight", "model.layers.3.enorm.weight"):
        write(tmp_path / SINGLE, {**tensors, name: np.ones(3, BF16)})
        assert refused().item == name
    write(tmp_path / SINGLE, tensors)
    quantised.change_config(tmp_path, num_nextn_predict_layers=0)
    assert all(AHEAD in problem for problem in refused().problems)


def test_a_gpt_oss_in_mxfp4_is_what_it_holds(tmp_path):
    """Interleaved on disk, and transposed against what is exported in bfloat16; saved again it is that."""
    folder, again = tmp_path / "a", tmp_path / "b"
    plain = quantised.write_gpt_oss(folder)
    model = eqx_moe.from_pretrained(folder, dtype="auto")
    gate_up = plain["model.layers.1.mlp.experts.gate_up_proj"]
    for part, values in (("gate", gate_up[:, :, 0::2]), ("up", gate_up[:, :, 1::2])):
        leaf = np.asarray(getattr(model.layers[1].moe.experts, part))
        assert leaf.tobytes() == values.swapaxes(1, 2).tobytes()
    eqx_moe.save_pretrained(model, again)
    assert "quantization_config" not in json.loads((again / "config.json").read_text())
    saved = safetensors.numpy.load_file(again / SINGLE)
    assert saved.keys() == plain.keys()
    assert all(values.tobytes() == plain[name].tobytes() for name, values in saved.items())
    with pytest.raises(ValueError, match=r"'original', 'packed'\]; got 'mxfp4'"):
        eqx_moe.save_pretrained(model, again, layout="mxfp4")
    # Its config names no dtype: that is taken from the files, and said if twice as much would be written.
    assert model.config.dtype == "bfloat16"
    with pytest.warns(UserWarning, match='dtype="bfloat16" for files of half the size'):
        eqx_moe.save_pretrained(eqx_moe.from_pretrained(folder, dtype="float32"), tmp_path / "c")


MX_WRONG = {
    "scales too few": (lambda b, s: (b, s[:-1]), "ST-SHAPE"),
    "scales of another rank": (lambda b, s: (b, s[..., None]), "ST-SHAPE"),
    "blocks of 32 bytes": (lambda b, s: (np.concatenate([b, b], axis=-1), s), "ST-SHAPE"),
    "a vector": (lambda b, s: (b[0, 0, 0], s[0, 0, 0, None]), "ST-SHAPE"),
    "scales in float32": (lambda b, s: (b, s.astype(np.float32)), "ST-DTYPE"),
}


@pytest.mark.parametrize("name", MX_WRONG)
def test_mxfp4_scales_that_do_not_belong_are_refused(tmp_path, name):
    change, code = MX_WRONG[name]
    blocks, scales = change(np.zeros((3, 4, 2, 16), np.uint8), np.full((3, 4, 2), 127, np.uint8))
    write(tmp_path / SINGLE, {"e.w_blocks": np.ascontiguousarray(blocks), "e.w_scales": np.ascontiguousarray(scales)})
    with open_weights(tmp_path) as stored, pytest.raises(CheckpointError) as caught:
        decoded(stored)
    assert (caught.value.code, caught.value.item) == (code, "e.w_scales")
    assert "MXFP4" in caught.value.doing


def test_blocks_without_scales_and_scales_without_blocks_are_tensors_like_others(tmp_path):
    """Then it is the name table that does not know them, or their dtype that no weight has."""
    plain = {"a_blocks": np.zeros((2, 2, 16), np.uint8), "b_scales": np.zeros((2, 2), np.uint8)}
    write(tmp_path / SINGLE, plain)
    with open_weights(tmp_path) as stored:
        assert {name: tensor.decode for name, tensor in decoded(stored).items()} == dict.fromkeys(plain)


@pytest.mark.parametrize(
    "container", [{"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}, 3]
)
def test_other_containers_are_refused(tmp_path, container):
    folder = tmp_path
    converting.write(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": container}))
    with pytest.raises(CheckpointError) as caught:
        eqx_moe.load_config(folder)
    assert caught.value.code == "CFG-VALUE" and caught.value.item == "quantization_config"
