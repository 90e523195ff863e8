"""The numbers of transformers 5.23, without torch: tests/make_fixtures.py says what was computed and how."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import eqx_moe
from eqx_moe.nn.router_losses import load_balancing_loss

FOLDER = pathlib.Path(__file__).parent / "fixtures"
NAMES = sorted(file.stem for file in FOLDER.glob("*.npz"))

each_fixture = pytest.mark.parametrize("name", NAMES)
# One of each family, with a window where it has one; the live parity tests generate with many more.
GREEDY = ["mixtral-window-sharded", "llama-dynamic-sharded", "mistral-window", "qwen2-window-tied"]
GREEDY += ["qwen3-window-llama3-biases", "qwen3-moe-dense-layer-sharded", "olmoe-clipped", "gpt-oss-windows-yarn"]
GREEDY += ["deepseek-v3-groups-sharded"]


def load(name: str):
    return eqx_moe.from_pretrained(FOLDER / name, dtype="float32"), np.load(FOLDER / f"{name}.npz")


def test_every_family_has_fixtures():
    covered = {type(eqx_moe.load_config(FOLDER / name)) for name in NAMES}
    assert covered == set(eqx_moe.families().values()) and set(GREEDY) <= set(NAMES)


@each_fixture
def test_logits(name):
    model, expected = load(name)
    logits = np.asarray(model(jnp.asarray(expected["tokens"])))
    assert logits.dtype == np.float32
    largest = np.abs(expected["logits"]).max()
    assert np.abs(logits - expected["logits"]).max() <= 5e-5 * largest


@pytest.mark.parametrize(
    "name", [name if name in GREEDY else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_greedy_continuations(name):
    model, expected = load(name)
    prompts = [expected["prompt0"].tolist(), expected["prompt1"].tolist()]
    rows = eqx_moe.generate(model, prompts, max_new_tokens=32)
    assert rows == [expected["greedy0"].tolist(), expected["greedy1"].tolist()]


@pytest.mark.parametrize("name", [name for name in NAMES if "aux_loss" in np.load(FOLDER / f"{name}.npz")])
def test_load_balancing_loss(name):
    model, expected = load(name)
    router = model.forward(jnp.asarray(expected["tokens"])).router
    loss = load_balancing_loss(router.logits, model.config.num_experts_per_tok, None)
    np.testing.assert_allclose(loss, expected["aux_loss"], rtol=1e-5)
