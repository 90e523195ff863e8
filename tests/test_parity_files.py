"""Files exchanged with transformers: every tensor bit for bit, both ways, in both layouts, whole and in shards."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from cases import FEW, MIXTRAL  # noqa: E402

import eqx_moe  # noqa: E402
from eqx_moe.checkpoint import leaf_paths, plan  # noqa: E402
from eqx_moe.models import family_of  # noqa: E402

FEW = [MIXTRAL[0], *FEW]
SIZES = [7_000, "5GB"]


def assert_same_bits(theirs, ours):
    """Their weights, packed as transformers holds them, are our leaves joined by the packed name table."""
    leaves = leaf_paths(ours)
    held = dict(theirs.named_parameters())
    held |= {name: buffer for name, buffer in theirs.named_buffers() if name.endswith("e_score_correction_bias")}
    tensors = plan(family_of(ours.config).names(ours.config)["packed"], leaves)
    assert set(tensors) == set(held)
    for name, tensor in tensors.items():
        joined = tensor.joined([np.asarray(leaves[part.leaf]) for part in tensor.parts])  # no stacks when packed
        weight = held[name].detach()
        if name.endswith("norm.weight") and (joined.dtype, weight.dtype) == (np.float16, torch.float32):
            joined = joined.astype(np.float32)  # gpt-oss: there norms stay float32 in a model of float16
        assert str(weight.dtype) == f"torch.{joined.dtype}", name
        assert weight.contiguous().view(torch.uint8).numpy().tobytes() == joined.tobytes(), name


def random_model(case, dtype):
    config = transformers.AutoConfig.for_model(case.model_type, **case.config)
    torch.manual_seed(11)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("original", [True, False], ids=["original", "packed"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_we_load_what_transformers_writes(tmp_path, case, original, dtype):
    theirs = random_model(case, dtype)
    for size in SIZES:
        theirs.save_pretrained(tmp_path / str(size), save_original_format=original, max_shard_size=size)
        assert_same_bits(theirs, eqx_moe.from_pretrained(tmp_path / str(size), dtype="auto"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", ["original", "packed"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_transformers_loads_what_we_write(tmp_path, case, layout, dtype):
    ours = eqx_moe.init(case.parsed, key=jax.random.key(1), dtype=dtype)
    for size in SIZES:
        folder = tmp_path / str(size)
        eqx_moe.save_pretrained(ours, folder, layout=layout, max_shard_size=size)
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert_same_bits(theirs, ours)


def test_a_router_wider_than_the_rest_loads_there(tmp_path):
    """Two dtypes in one file: every tensor must start at a whole element, or torch cannot view it."""
    case = MIXTRAL[0]
    ours = eqx_moe.init(case.parsed, key=jax.random.key(1), dtype="bfloat16")
    ours = jax.tree.map_with_path(
        lambda path, leaf: leaf.astype("float32") if "router" in jax.tree_util.keystr(path) else leaf, ours
    )
    eqx_moe.save_pretrained(ours, tmp_path)
    loaded = leaf_paths(eqx_moe.from_pretrained(tmp_path, dtype="auto"))
    assert loaded["layers.0.moe.router.weight"].dtype == "float32"
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    gate = theirs.get_parameter("model.layers.1.mlp.gate.weight").detach().numpy()
    np.testing.assert_array_equal(gate, loaded["layers.1.moe.router.weight"])


def test_the_tokenizer_and_the_generation_config_load_there(tmp_path):
    import tiny

    tokenizer = tiny.tokenizer()
    eqx_moe.save_pretrained(eqx_moe.init(tiny.CONFIG, key=jax.random.key(0)), tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == tiny.END and theirs.model_max_length == tiny.CONFIG.max_position_embeddings
    assert theirs(tiny.TEXT)["input_ids"] == tokenizer.encode(tiny.TEXT).ids
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == tiny.CONFIG.eos_token_id
