"""from_pretrained and save_pretrained over every family: what goes out comes back, bit for bit."""

import dataclasses
import json
import logging
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from cases import CASES, MIXTRAL

import eqx_moe
from eqx_moe.checkpoint import leaf_paths
from eqx_moe.models import family_of, skeleton

PLAIN = MIXTRAL[0]


def numbered(config, dtype="float32"):
    """A model of different numbers all over: any exchange of tensors or of their parts would show."""
    counter = iter(range(10**6))

    def fill(leaf):
        values = np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape) % 1021
        return jnp.asarray(values + 2048 * next(counter), dtype)

    return jax.tree.map(fill, skeleton(config))


def same(a, b) -> bool:
    a, b = leaf_paths(a), leaf_paths(b)
    return list(a) == list(b) and all(
        a[path].dtype == b[path].dtype and np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes() for path in a
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loading_what_was_saved_gives_the_same_model(tmp_path, case):
    for layout, size in (("original", "5GB"), ("packed", 9_000), ("original", 3_000)):
        folder = tmp_path / f"{layout}-{size}"
        model = numbered(case.parsed)
        eqx_moe.save_pretrained(model, folder, layout=layout, max_shard_size=size)
        loaded = eqx_moe.from_pretrained(folder, dtype="auto")
        assert same(loaded, model)
        assert dataclasses.replace(loaded.config, dtype=None, extra=()) == dataclasses.replace(
            model.config, head_dim=loaded.config.head_dim, dtype=None, extra=()
        )
        assert loaded.generation_config == model.generation_config
        # And once more: nothing drifts.
        eqx_moe.save_pretrained(loaded, tmp_path / "again", layout=layout, max_shard_size=size)
        for file in folder.iterdir():
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(tmp_path, dtype, caplog):
    model = numbered(PLAIN.parsed, dtype)
    eqx_moe.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert same(eqx_moe.from_pretrained(tmp_path, dtype="auto"), model)
    for given in ("float32", jnp.float32, np.dtype("float32")):
        assert same(eqx_moe.from_pretrained(tmp_path, dtype=given), jax.tree.map(lambda x: x.astype("float32"), model))
    with caplog.at_level(logging.INFO, "eqx_moe"):
        default = eqx_moe.from_pretrained(tmp_path)
    assert default.embed.weight.dtype == (jnp.float32 if jax.default_backend() == "cpu" else dtype)
    if jax.default_backend() == "cpu":
        assert "30 times slower" in caplog.text


def test_a_wider_dtype_than_was_loaded_is_said_once(tmp_path):
    model = numbered(PLAIN.parsed, "bfloat16")
    eqx_moe.save_pretrained(model, tmp_path / "half")
    wide = eqx_moe.from_pretrained(tmp_path / "half", dtype="float32")
    with pytest.warns(UserWarning, match='Saving in float32.*dtype="bfloat16"') as caught:
        eqx_moe.save_pretrained(wide, tmp_path / "wide")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eqx_moe.save_pretrained(wide, tmp_path / "half-again", dtype="bfloat16")
        eqx_moe.save_pretrained(wide, tmp_path / "wide-said", dtype=jnp.float32)
    assert same(eqx_moe.from_pretrained(tmp_path / "half-again", dtype="auto"), model)


def test_saving_over_the_folder_that_was_loaded(tmp_path):
    model = numbered(PLAIN.parsed)
    eqx_moe.save_pretrained(model, tmp_path, max_shard_size=5_000)
    loaded = eqx_moe.from_pretrained(tmp_path)
    eqx_moe.save_pretrained(loaded, tmp_path, layout="packed")
    assert same(loaded, model) and same(eqx_moe.from_pretrained(tmp_path), model)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "eqx_moe.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_generation_config_and_unknown_keys_come_back(tmp_path):
    eqx_moe.save_pretrained(numbered(PLAIN.parsed), tmp_path)
    generation = {"eos_token_id": [2, 5], "bos_token_id": 1, "temperature": 0.7, "top_p": 0.9, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"a_new_key": {"x": [1, 0.0]}}))
    with pytest.warns(UserWarning, match="a_new_key"):
        loaded = eqx_moe.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == (2, 5)
    eqx_moe.save_pretrained(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == generation
    assert json.loads((tmp_path / "again" / "config.json").read_text())["a_new_key"] == {"x": [1, 0.0]}


def test_the_tokenizer_goes_with_the_model(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    eqx_moe.save_pretrained(numbered(PLAIN.parsed), tmp_path, tokenizer)
    assert eqx_moe.load_tokenizer(tmp_path).to_str() == tokenizer.to_str()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<s>" and config["eos_token"] == "</s>"
    assert config["model_max_length"] == PLAIN.config["max_position_embeddings"]
    # Saving without one leaves it alone.
    eqx_moe.save_pretrained(numbered(PLAIN.parsed), tmp_path)
    assert eqx_moe.load_tokenizer(tmp_path).token_to_id("</s>") == 2


def test_wrong_arguments(tmp_path):
    model = numbered(PLAIN.parsed)
    with pytest.raises(ValueError, match=r"`layout` must be one of \['original', 'packed'\]; got 'flat'"):
        eqx_moe.save_pretrained(model, tmp_path / "a", layout="flat")
    with pytest.raises(ValueError, match="`dtype` must be one of .*bfloat16.*; got 'int8'"):
        eqx_moe.save_pretrained(model, tmp_path / "a", dtype="int8")
    with pytest.raises(ValueError, match="max_shard_size"):
        eqx_moe.save_pretrained(model, tmp_path / "a", max_shard_size="big")
    assert not (tmp_path / "a").exists()
    eqx_moe.save_pretrained(model, tmp_path / "b")
    for dtype in ("int8", "float64", "fp8", ""):
        with pytest.raises(ValueError, match="`dtype` must be one of"):
            eqx_moe.from_pretrained(tmp_path / "b", dtype=dtype)


def test_a_changed_model_needs_its_own_config(tmp_path):
    model = numbered(PLAIN.parsed)
    fewer = eqx.tree_at(lambda m: m.layers[1].moe.experts.up, model, replace_fn=lambda up: up[:-1])
    with pytest.raises(ValueError, match="layers.1.moe.experts.up"):
        eqx_moe.save_pretrained(fewer, tmp_path / "a")
    shallow = eqx.tree_at(lambda m: m.layers, model, model.layers[:1])
    with pytest.raises(ValueError, match="layers.1"):
        eqx_moe.save_pretrained(shallow, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_skeleton_takes_no_memory():
    config = dataclasses.replace(PLAIN.parsed, hidden_size=2**20, intermediate_size=2**20, vocab_size=2**30)
    shapes = leaf_paths(skeleton(config))
    assert sum(leaf.size for leaf in shapes.values()) > 2**50
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_name_tables_fit_their_models(case):
    from eqx_moe.checkpoint import plan

    config = case.parsed
    for names in family_of(config).names(config).values():
        plan(names, leaf_paths(skeleton(config)))


def test_saving_keeps_what_else_the_tokenizer_config_says(tmp_path):
    """Above all a chat template: the folder may be the one that the model was loaded from."""
    model = eqx_moe.init(PLAIN.parsed, key=jax.random.key(0))
    vocab = {f"w{i}": i for i in range(53)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    said = {"chat_template": "{{ messages }}", "tokenizer_class": "LlamaTokenizerFast", "eos_token": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    eqx_moe.save_pretrained(model, tmp_path, tokenizer=tokenizer)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found["chat_template"] == said["chat_template"] and found["tokenizer_class"] == said["tokenizer_class"]
    assert (found["bos_token"], found["eos_token"]) == ("w1", "w2")
