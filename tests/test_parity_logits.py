"""The same numbers as transformers, both ways, for every config in `cases.py`."""

import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from cases import CASES  # noqa: E402

import eqx_moe  # noqa: E402
from eqx_moe.train import Batch  # noqa: E402

TOLERANCE = 5e-5  # of the largest logit


def reference(case):
    """A transformers model of the case, with noise on every parameter, and on the routers' selection biases, which are
    buffers there: nothing is compared at its initial value."""
    config = transformers.AutoConfig.for_model(case.model_type, **case.config)
    torch.manual_seed(17)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    use_eager_experts(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def use_eager_experts(model):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def load_reference(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    use_eager_experts(model)
    assert not any(info.values()), info
    return model.eval()


def text(case, rows=2):
    return np.random.default_rng(case.length).integers(3, case.config["vocab_size"], (rows, case.length))


def reference_logits(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.float().numpy()


def assert_close(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.fixture(params=CASES, ids=str, scope="module")
def written(request, tmp_path_factory):
    """A case's reference model, saved by transformers, and its logits."""
    case, folder = request.param, tmp_path_factory.mktemp("theirs")
    model = reference(case)
    model.save_pretrained(folder, save_original_format=not case.packed, max_shard_size="8KB" if case.shards else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == case.shards
    return case, folder, model


def test_logits_and_greedy_text(written, tmp_path):
    case, folder, theirs = written
    tokens = text(case)
    expected = reference_logits(theirs, tokens)

    ours = eqx_moe.from_pretrained(folder, dtype="float32")
    logits = jax.jit(lambda t: ours(t))(tokens)
    assert logits.dtype == np.float32
    assert_close(logits, expected)

    # Back: what we write loads there without a complaint and gives the very same logits.
    layout = "packed" if case.shards else "original"
    eqx_moe.save_pretrained(ours, tmp_path, layout=layout, max_shard_size=9000 if case.packed else "5GB")
    np.testing.assert_array_equal(reference_logits(load_reference(tmp_path), tokens), expected)

    length, new = case.generation
    prompt = torch.as_tensor(tokens[:1, :length])
    # transformers 5.23 keeps the last W - 1 keys of a window W, by a slice that for W = 1 keeps them all.
    cached = case.config.get("sliding_window") != 1
    with torch.no_grad():
        answer = theirs.generate(
            prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=cached
        )
    assert eqx_moe.generate(ours, prompt.tolist(), max_new_tokens=new, eos_ids=[]) == [answer[0, length:].tolist()]


#: The configs that are compared in bfloat16.
NARROW = ["mixtral-many-experts", "llama-biases", "mistral-window", "qwen2-plain", "qwen3-plain", "qwen3_moe-plain"]
NARROW += ["olmoe-clipped", "gpt_oss-plain", "gpt_oss-no-biases", "deepseek_v3-plain", "deepseek_v3-not-normalised"]


def bfloat16_errors(case, folder):
    """The error of every token's logits in bfloat16 (root of the mean square), ours and theirs, against float32.

    Of the same weights, that bfloat16 holds, so that what is computed alone differs.
    """
    reference(case).to(torch.bfloat16).save_pretrained(folder)
    tokens = text(case, rows=16)
    exact = reference_logits(load_reference(folder), tokens)
    ours = eqx_moe.from_pretrained(folder, dtype="bfloat16")
    found = jax.jit(lambda t: ours(t))(tokens), reference_logits(load_reference(folder).to(torch.bfloat16), tokens)
    return tuple(np.sqrt(np.mean((np.asarray(each) - exact) ** 2, axis=-1)).ravel() for each in found)


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_is_as_near_to_float32_as_theirs(name, tmp_path):
    """Near scores change places when they are rounded; a token that visits other experts is far off in either library.

    So medians are compared, and over the tokens that are off by less than ten medians in both the mean square.
    """
    ours, theirs = bfloat16_errors(next(case for case in CASES if str(case) == name), tmp_path)
    assert 0 < np.median(ours) <= 1.5 * np.median(theirs)
    near = np.maximum(ours, theirs) < 10 * np.median(theirs)
    assert near.mean() > 0.9
    assert np.mean(ours[near] ** 2) <= 1.5**2 * np.mean(theirs[near] ** 2)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("plain", "window")], ids=str)
def test_random_weights_of_ours_load_there(case, tmp_path):
    model = eqx_moe.init(case.parsed, key=jax.random.key(3))
    eqx_moe.save_pretrained(model, tmp_path)
    tokens = text(case)
    assert_close(jax.jit(lambda t: model(t))(tokens), reference_logits(load_reference(tmp_path), tokens))


def test_both_dialects_of_the_rope_keys(written, tmp_path):
    """The v4 form of config.json (rope_theta and rope_scaling at the top) means the same."""
    case, folder, _ = written
    config = json.loads((folder / "config.json").read_text())
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    old, new = eqx_moe.load_config(tmp_path), eqx_moe.load_config(folder)
    if str(case) == "gpt_oss-default-rope":
        # The older form has no way to say so: without rope_scaling a gpt-oss has the family's YaRN, there as here.
        theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
        given = {key: value for key, value in dataclasses.asdict(old.rope_parameters).items() if value is not None}
        assert given == theirs and given["rope_type"] == "yarn" and given["rope_theta"] == 1e4
        return
    assert old.rope_parameters == new.rope_parameters
    assert old == new


def test_loss_with_router_losses(tmp_path):
    """`train.loss` is transformers': cross-entropy plus the load-balancing loss, padding counted nowhere."""
    case = next(case for case in CASES if str(case) == "mixtral-plain")
    theirs = reference(case)
    theirs.config.output_router_logits = True
    theirs.config.router_aux_loss_coef = theirs.router_aux_loss_coef = 0.7
    theirs.save_pretrained(tmp_path)
    ours = eqx_moe.from_pretrained(tmp_path)
    tokens = text(case)
    mask = np.ones_like(tokens)
    mask[1, 29:] = 0
    labels = np.where(mask == 1, tokens, -100)
    with torch.no_grad():
        out = theirs(torch.as_tensor(tokens), attention_mask=torch.as_tensor(mask), labels=torch.as_tensor(labels))
    batch = Batch(*(jax.numpy.asarray(each, jax.numpy.int32) for each in (tokens, mask, labels)))
    loss, metrics = jax.jit(lambda b: eqx_moe.train.loss(ours, b))(batch)
    np.testing.assert_allclose(loss, out.loss.item(), rtol=2e-5)
    np.testing.assert_allclose(metrics["aux_loss"], out.aux_loss.item(), rtol=2e-5)
