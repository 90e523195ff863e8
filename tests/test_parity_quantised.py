"""Quantised releases: what transformers decodes bit for bit, or from values that were decoded by hand."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import quantised  # noqa: E402
from test_parity_files import assert_same_bits  # noqa: E402
from test_parity_logits import assert_close, load_reference, reference_logits  # noqa: E402

import eqx_moe  # noqa: E402

TOKENS = np.random.default_rng(4).integers(0, 53, (2, 37))


def test_gpt_oss_in_mxfp4(tmp_path):
    quantised.write_gpt_oss(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    ours = eqx_moe.from_pretrained(tmp_path, dtype="auto")
    assert_same_bits(theirs, ours)
    # In float32 from a copy: a model that was quantised refuses to be cast.
    eqx_moe.save_pretrained(ours, tmp_path / "copy")
    expected = reference_logits(load_reference(tmp_path / "copy"), TOKENS)
    ours = eqx_moe.from_pretrained(tmp_path, dtype="float32")
    assert_close(jax.jit(lambda t: ours(t))(TOKENS), expected)


def test_deepseek_v3_in_fp8_with_edge_blocks(tmp_path):
    """transformers 5.23 refuses blocks at the edges: it gets the values decoded by hand."""
    _, plain = quantised.write_deepseek(tmp_path)
    ours = eqx_moe.from_pretrained(tmp_path, dtype="float32")
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    quantised.write(by_hand / quantised.SINGLE, {k: v for k, v in plain.items() if not k.startswith(quantised.AHEAD)})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (by_hand / "config.json").write_text(json.dumps(config))
    theirs = load_reference(by_hand)
    assert_close(jax.jit(lambda t: ours(t))(TOKENS), reference_logits(theirs, TOKENS))
