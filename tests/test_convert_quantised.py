"""Quantised containers: the decoders against loops over single values, and reading a model that has them."""

import json

import converting
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import eqx_moe
from eqx_moe.checkpoint import leaf_paths
from eqx_moe.checkpoint.quantised import decode_fp8, decode_mxfp4, decoded
from eqx_moe.checkpoint.shards import open_weights
from eqx_moe.errors import CheckpointError

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SINGLE = "model.safetensors"


def fp8_by_loops(weight, scales):
    result = np.empty(weight.shape, BF16)
    for index in np.ndindex(weight.shape):
        *batch, row, column = index
        result[index] = BF16(np.float32(weight[index]) * np.float32(scales[(*batch, row // 128, column // 128)]))
    return result


def mxfp4_by_loops(blocks, scales):
    def value(code):
        """E2M1 as the format defines it: sign, two bits of exponent with bias 1, one bit of mantissa."""
        sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
        return sign * (mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2))

    result = np.empty((*scales.shape, 32), np.float64)
    for index in np.ndindex(blocks.shape):
        byte, scale = int(blocks[index]), 2.0 ** (int(scales[index[:-1]]) - 127)
        result[(*index[:-1], 2 * index[-1])] = value(byte & 15) * scale
        result[(*index[:-1], 2 * index[-1] + 1)] = value(byte >> 4) * scale
    return result.reshape(*scales.shape[:-1], -1).astype(BF16)


def random_fp8(rng, *shape):
    blocks = (*shape[:-2], *(-(-size // 128) for size in shape[-2:]))
    return rng.normal(size=shape).astype(FP8), (rng.normal(size=blocks) ** 2).astype(np.float32)


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


def write(path, tensors):
    """A safetensors file, FP8 too, which the reference's NumPy writer cannot be trusted with in all its versions."""
    names = {np.dtype(FP8): "F8_E4M3", np.dtype(BF16): "BF16", np.dtype(np.float32): "F32"}
    header, start = {}, 0
    for name, tensor in tensors.items():
        offsets = [start, start + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t.tobytes() for t in tensors.values()))


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """FP8 matrices in a file: a name -> its values, decoded all at once."""
    folder, rng = tmp_path_factory.mktemp("fp8"), np.random.default_rng(2)
    tensors, expected = {}, {}
    for name, shape in {"edges": (300, 131), "stack": (3, 130, 17), "row": (1, 400)}.items():
        tensors[name], tensors[f"{name}_scale_inv"] = random_fp8(rng, *shape)
        expected[name] = decode_fp8(tensors[name], tensors[f"{name}_scale_inv"])
    write(folder / SINGLE, tensors)
    return folder, expected


@given(st.data())
def test_any_piece_of_an_fp8_tensor_can_be_read(matrices, data):
    folder, expected = matrices
    with open_weights(folder) as stored:
        tensors = decoded(stored)
        assert tensors.keys() == expected.keys()
        name = data.draw(st.sampled_from(sorted(expected)))
        values = expected[name].reshape(-1)
        first = data.draw(st.integers(0, values.size))
        last = data.draw(st.integers(first, values.size))
        target = np.full(last - first, 99, BF16)
        tensors[name].read_into(tensors[name].entry.start + 2 * first, target)
        assert target.tobytes() == values[first:last].tobytes()


def quantise(folder):
    """Makes a float32 checkpoint an FP8 one, as DeepSeek's are: matrices of the blocks, not embedding, head, router."""
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    rng = np.random.default_rng(3)
    result, plain = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "proj" in name or "experts" in name:
            result[name], result[f"{name}_scale_inv"] = random_fp8(rng, *tensor.shape)
            plain[name] = decode_fp8(result[name], result[f"{name}_scale_inv"])
        else:
            result[name] = plain[name] = tensor.astype(BF16)
    write(folder / SINGLE, result)
    config = json.loads((folder / "config.json").read_text())
    container = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": container}))
    return result, plain


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


@pytest.mark.parametrize(
    "container", [{"quant_method": "mxfp4"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}, 3]
)
def test_other_containers_are_refused(tmp_path, container):
    folder = tmp_path
    converting.write(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": container}))
    with pytest.raises(CheckpointError) as caught:
        eqx_moe.load_config(folder)
    assert caught.value.code == "CFG-VALUE" and caught.value.item == "quantization_config"
