"""Checkpoints in quantised containers, made here with NumPy, and the values that they hold."""

import dataclasses
import json
import pathlib

import converting
import ml_dtypes
import numpy as np
import safetensors.numpy

import eqx_moe
from eqx_moe.checkpoint.quantised import decode_fp8

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SINGLE = "model.safetensors"

#: Blocks of 128 x 128 fit in none of its matrices: `kv_a_proj_with_mqa` has 144 rows of 136.
DEEPSEEK = eqx_moe.DeepseekV3Config(
    vocab_size=53,
    hidden_size=136,
    intermediate_size=152,
    moe_intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=128,
    qk_rope_head_dim=16,
    qk_nope_head_dim=28,
    v_head_dim=20,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
    initializer_range=0.2,
)
#: What stands behind the last layer and predicts further ahead.
AHEAD = "model.layers.2."
#: Widths are multiples of a block of MXFP4, 32 values.
GPT_OSS = eqx_moe.GptOssConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=7,
    max_position_embeddings=96,
    initializer_range=0.2,
)


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


def write(path, tensors):
    """A safetensors file, FP8 too, which the reference's NumPy writer cannot be trusted with in all its versions."""
    names = {np.dtype(FP8): "F8_E4M3", np.dtype(BF16): "BF16", np.dtype(np.float32): "F32"}
    names[np.dtype(np.uint8)] = "U8"
    header, start = {}, 0
    for name, tensor in tensors.items():
        offsets = [start, start + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t.tobytes() for t in tensors.values()))


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
            dtype = np.float32 if name.endswith("e_score_correction_bias") else BF16
            result[name] = plain[name] = tensor.astype(dtype)
    write(folder / SINGLE, result)
    container = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    change_config(folder, quantization_config=container)
    return result, plain


def write_deepseek(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A DeepSeek-V3 as it was released: in FP8, and with a module that predicts a token further ahead."""
    converting.write(folder, dataclasses.replace(DEEPSEEK, num_hidden_layers=3))
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    rng, hidden, vocab = np.random.default_rng(7), DEEPSEEK.hidden_size, DEEPSEEK.vocab_size
    ends = {"embed_tokens": (vocab, hidden), "eh_proj": (hidden, 2 * hidden), "shared_head.head": (vocab, hidden)}
    ends |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
    tensors |= {f"{AHEAD}{name}.weight": rng.normal(size=shape).astype("f4") for name, shape in ends.items()}
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    change_config(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    return quantise(folder)


def write_gpt_oss(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """A gpt-oss as it was released, its experts in MXFP4; returns the values of all tensors as it is exported."""
    converting.write(folder, GPT_OSS)
    plain = {name: tensor.astype(BF16) for name, tensor in safetensors.numpy.load_file(folder / SINGLE).items()}
    tensors, rng = dict(plain), np.random.default_rng(8)
    for name in plain:
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensors.pop(name).shape
            blocks = rng.integers(0, 256, (experts, outer, inner // 32, 16), np.uint8)
            scales = rng.integers(121, 126, blocks.shape[:-1], np.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = np.ascontiguousarray(mxfp4_by_loops(blocks, scales).swapaxes(1, 2))
    write(folder / SINGLE, tensors)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]  # as in the releases
    config["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=kept)
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def change_config(folder: pathlib.Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
