"""Stacked layers: the same model in another form."""

import dataclasses
import re
import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import tiny
from test_family_configs import PUBLISHED
from weights import draw

import eqx_moe
from eqx_moe import train
from eqx_moe.checkpoint import leaf_paths
from eqx_moe.models import count_parameters, parse_config, skeleton
from eqx_moe.nn.stack import Stack, _pattern
from eqx_moe.train import loop

DEEP = dataclasses.replace(tiny.CONFIG, num_hidden_layers=2, router_jitter_noise=0.2)
# Windows differ by layer: runs of two, one and two equal layers.
RUNS = eqx_moe.Qwen2Config(
    vocab_size=53, hidden_size=12, intermediate_size=17, num_hidden_layers=5, num_attention_heads=3,
    num_key_value_heads=1, use_sliding_window=True, sliding_window=4,
    layer_types=("sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"),
)  # fmt: skip
# As gpt-oss, every second layer has a window: one pattern of two, and a layer that is left over.
TURNS = dataclasses.replace(RUNS, layer_types=("sliding_attention", "full_attention") * 2 + ("sliding_attention",))
# Dense and sparse layers in turn.
MIXED = eqx_moe.Qwen3MoeConfig(
    vocab_size=53, hidden_size=12, intermediate_size=17, num_hidden_layers=4, num_attention_heads=3,
    num_key_value_heads=1, head_dim=4, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=7,
    decoder_sparse_step=2,
)  # fmt: skip


def batch(model, seed: int = 0) -> train.Batch:
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 11)), jnp.int32)
    return train.Batch(tokens=tokens, segment_ids=jnp.ones_like(tokens).at[0, :3].set(0), labels=tokens)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == other.dtype and mine.sharding == other.sharding
        np.testing.assert_array_equal(mine, other)


def assert_close(ours, theirs):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(mine - other).max() <= 1e-5 * max(1.0, np.abs(other).max())


@pytest.mark.parametrize(
    "config, counts",
    [(DEEP, [2]), (RUNS, [2, 1, 2]), (TURNS, [4, 1]), (MIXED, [4])],
    ids=["one run", "runs", "turns", "dense and sparse"],
)
def test_stacking_and_back_is_the_same_model(config, counts):
    model = tiny.model(config)
    stacked = eqx_moe.stack(model)
    assert [layer.count if isinstance(layer, Stack) else 1 for layer in stacked.layers] == counts
    assert stacked.depth == model.depth == config.num_hidden_layers
    assert_same(eqx_moe.unstack(stacked), model)
    assert eqx_moe.unstack(model) is model
    assert_same(eqx_moe.stack(stacked), stacked)


@pytest.mark.parametrize(
    ("kinds", "taken"),
    [
        ("a", (1, 1)), ("ab", (1, 1)), ("aa", (1, 2)), ("abab", (2, 2)), ("ababa", (2, 2)), ("aaab", (1, 3)),
        ("abbb", (1, 1)), ("aabaab", (1, 2)), ("abcabcab", (3, 2)), ("abaabaaba", (3, 3)), ("aabbaabb", (1, 2)),
    ],
)  # fmt: skip
def test_the_pattern_is_the_one_with_most_repeats_and_the_shortest_of_these(kinds, taken):
    """How many layers it has and how often they come, from the first one on."""
    assert _pattern(list(kinds)) == taken


def test_layers_that_differ_in_dtype_are_not_stacked():
    """As a checkpoint is loaded with `dtype="auto"`: each keeps its own."""
    model = tiny.model(dataclasses.replace(tiny.DENSE, num_hidden_layers=4))
    model = eqx.tree_at(lambda m: m.layers[3].mlp.up.weight, model, replace_fn=lambda leaf: leaf.astype(jnp.bfloat16))
    stacked = eqx_moe.stack(model)
    assert [layer.count if isinstance(layer, Stack) else 1 for layer in stacked.layers] == [3, 1]
    assert_same(eqx_moe.unstack(stacked), model)


def test_routers_answer_in_the_order_of_the_layers():
    """Two stacks, the second of a pattern of two: each layer's logits, drawn with its own key, are at its place."""
    from cases import GPT_OSS

    sliding, full, *_ = (
        dataclasses.replace(layer, moe=dataclasses.replace(layer.moe, jitter=0.2))
        for layer in draw(GPT_OSS[0].parsed).layers
    )
    model = draw(GPT_OSS[0].parsed)
    scale = iter(range(1, 7))
    layers = tuple(
        eqx.tree_at(lambda b: b.moe.router.weight, layer, layer.moe.router.weight * next(scale))
        for layer in (sliding, sliding, full, sliding, full, sliding)
    )
    model = dataclasses.replace(model, layers=layers)
    stacked = eqx_moe.stack(model)
    assert [(len(layer.blocks), layer.repeats) for layer in stacked.layers] == [(1, 2), (2, 2)]
    forward = eqx.filter_jit(lambda model: model.forward(jnp.asarray([[3, 1, 4, 1, 5, 9, 2]]), key=jax.random.key(7)))
    found, expected = forward(stacked), forward(model)
    assert_close(found.hidden, expected.hidden)
    assert len(found.router.logits) == 6
    assert_close(found.router, expected.router)


@pytest.mark.parametrize(
    "name, shape",
    [("gpt-oss-120b", [(2, 18)]), ("DeepSeek-V3", [(1, 3), (1, 58)]), ("Qwen3-30B-A3B", [(1, 48)])],
)
def test_released_models_become_one_stack_or_two(name, shape):
    """Each (layers of its pattern, repeats): so many layers a program has, and compiles."""
    model = skeleton(parse_config(PUBLISHED[name][0], "config.json"))
    stacked = eqx.filter_eval_shape(eqx_moe.stack, model)
    assert [(len(layer.blocks), layer.repeats) for layer in stacked.layers] == shape
    assert count_parameters(stacked) == count_parameters(model) and stacked.depth == model.depth


@pytest.mark.full
def test_a_pattern_compiles_in_a_time_that_depth_hardly_changes():
    """A step of gpt-oss, of 8 and of 32 layers with and without a window in turn; medians."""
    config, given = meshes.FAMILIES["gpt_oss"], meshes.batch(rows=8)
    optimizer = train.adamw(1e-4, 10)

    def seconds(depth: int) -> float:
        deep = dataclasses.replace(config, num_hidden_layers=depth, layer_types=None)
        model = eqx.filter_eval_shape(eqx_moe.stack, skeleton(deep))
        state = jax.eval_shape(optimizer.init, model)
        began = time.perf_counter()
        jax.jit(lambda *step: loop.update(optimizer, *step)).lower(model, state, given).compile()
        return time.perf_counter() - began

    few, many = (statistics.median(each) for each in zip(*[(seconds(8), seconds(32)) for _ in range(3)], strict=True))
    print(f"8 layers {few:.1f} s, 32 layers {many:.1f} s")
    assert many < 1.5 * few


@pytest.mark.parametrize(
    "config, rematerialise",
    [(DEEP, True), (RUNS, False), (TURNS, True), (MIXED, True)],
    ids=["one run", "runs", "turns", "dense and sparse"],
)
def test_a_stacked_model_computes_the_same(config, rematerialise):
    """Loss, metrics, router's outputs and every gradient, with a key for the jitter."""
    model = tiny.model(config)
    # In this family no config has jitter, with which each layer draws from its own key.
    noisy = tuple(
        layer if layer.moe is None else dataclasses.replace(layer, moe=dataclasses.replace(layer.moe, jitter=0.2))
        for layer in model.layers
    )
    model = dataclasses.replace(model, layers=noisy)
    stacked = eqx_moe.stack(model, rematerialise=rematerialise)
    given, key = batch(model), jax.random.key(7)
    step = eqx.filter_jit(eqx.filter_value_and_grad(train.loss, has_aux=True))
    (loss, metrics), grads = step(stacked, given, key)
    (expected, expected_metrics), expected_grads = step(model, given, key)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_close(metrics, expected_metrics)
    assert_close(eqx_moe.unstack(grads), expected_grads)


def test_a_stacked_model_saves_and_generates_and_takes_options(tmp_path):
    model = tiny.model(dataclasses.replace(DEEP, router_jitter_noise=0.0))
    stacked = eqx_moe.stack(model)
    eqx_moe.save_pretrained(stacked, tmp_path / "stacked")
    assert_same(eqx_moe.from_pretrained(tmp_path / "stacked", dtype="float32").layers, model.layers)
    prompts = [[5, 6, 7]]
    assert eqx_moe.generate(stacked, prompts, 6) == eqx_moe.generate(model, prompts, 6)
    assert list(eqx_moe.stream(stacked, prompts[0], 3)) == list(eqx_moe.stream(model, prompts[0], 3))
    dense = eqx_moe.with_options(stacked, execution="dense")
    assert dense.layers[0].blocks[0].moe.execution == eqx_moe.execution.Dense()
    with pytest.raises(ValueError, match="got 1 stacks for 2 layers.*unstack"):
        stacked.init_cache(1, 5)
    with pytest.raises(ValueError, match="got 1 stacks for 2 layers.*unstack"):
        stacked.forward(jnp.ones((1, 2), int), cache=model.init_cache(1, 5))


def test_weight_decay_is_for_matrices():
    """Of gpt-oss: its experts have biases, which are stacks of vectors."""
    from cases import GPT_OSS

    model = draw(GPT_OSS[0].parsed)
    decays = leaf_paths(jax.tree.map(jnp.asarray, train.are_matrices(model)))
    expected = {path: path.endswith(("weight", "gate", "up", "down")) and "norm" not in path for path in decays}
    assert {path: bool(each) for path, each in decays.items()} == expected and 0 < sum(expected.values())


def test_weight_decay_leaves_stacked_norms_alone():
    model = tiny.model(dataclasses.replace(RUNS, layer_types=("full_attention",) * 5))
    plain, stacked = train.are_matrices(model), train.are_matrices(eqx_moe.stack(model))
    assert jax.tree.leaves(stacked.layers) == jax.tree.leaves(plain.layers[0])
    assert not stacked.layers[0].blocks[0].ffn_norm.weight and not stacked.layers[0].blocks[0].attention.q.bias
    assert stacked.layers[0].blocks[0].attention.q.weight and stacked.embed.weight


def test_fit_trains_deep_models_stacked_and_gives_them_back_apart(monkeypatch):
    model = tiny.model(dataclasses.replace(tiny.DENSE, num_hidden_layers=2))
    forms = []

    def fit(deep):
        monkeypatch.setattr(loop, "_DEEP", deep)
        given = iter([batch(model, seed) for seed in range(3)])
        optimizer = optax.sgd(0.1, momentum=0.9)

        def watch(step, model, metrics):
            forms.append(len(model.layers))

        return train.fit(model, given, steps=3, optimizer=optimizer, on_step=watch, progress=False)

    tuned, history = fit(1)
    expected, expected_history = fit(2)
    assert forms == [1, 1, 1, 2, 2, 2]
    assert jax.tree.structure(tuned) == jax.tree.structure(model)
    assert_close(tuned, expected)
    np.testing.assert_allclose(history[-1]["loss"], expected_history[-1]["loss"], rtol=1e-5)


def test_rematerialisation_computes_again_and_sends_nothing_again():
    """Of what a gradient runs, written down: the layer's norms twice, its collectives once."""
    model, given = eqx_moe.with_options(draw(meshes.MIXTRAL), mesh=meshes.mesh((2, 2, 1))), meshes.batch(rows=8)
    layers = (*model.layers, *model.layers)
    # What is said about placement within a layer is said within a scan over two.
    said = [
        str(eqx.filter_make_jaxpr(train.loss)(form, given)[0]).count("sharding_constraint[")
        for form in (model, eqx_moe.stack(dataclasses.replace(model, layers=layers)))
    ]
    assert said[0] == said[1] > 0
    gradient = eqx.filter_make_jaxpr(eqx.filter_grad(train.loss, has_aux=True))
    counts = []
    for rematerialise in (False, True):
        deep = eqx_moe.stack(dataclasses.replace(model, layers=layers), rematerialise=rematerialise)
        jaxpr = str(gradient(deep, given)[0])
        counts.append([len(re.findall(rf"\b{name}\b", jaxpr)) for name in ("rsqrt", "all_gather|reduce_scatter")])
    (norms, sent), (norms_again, sent_again) = counts
    assert norms_again > norms and 0 < sent_again <= sent


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; on a CPU, JAX_NUM_CPU_DEVICES=8")
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(meshes.MIXTRAL, num_hidden_layers=2),
        pytest.param(
            dataclasses.replace(meshes.FAMILIES["gpt_oss"], num_hidden_layers=4, layer_types=None),
            marks=pytest.mark.full,
        ),
    ],
    ids=["mixtral", "gpt_oss"],
)
def test_stacked_on_a_mesh(config):
    """Placed as its layers were, and the same step as on one device."""
    alone = draw(config)
    model = eqx_moe.with_options(alone, mesh=meshes.mesh((2, 2, 2)))
    stacked = eqx_moe.stack(model, rematerialise=True)
    gate = stacked.layers[0].blocks[0].moe.experts.gate
    assert tuple(gate.sharding.spec) == (None, *model.layers[0].moe.experts.gate.sharding.spec)
    assert len(stacked.layers) == 1
    assert_same(eqx_moe.unstack(stacked), model)
    given = meshes.batch(rows=8)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(model):
        return train.make_step(optimizer)(model, train.init_optimizer(optimizer, model), given, None)[::2]

    (ours, metrics), (theirs, expected) = step(stacked), step(eqx_moe.stack(draw(config)))
    # Steps donate what goes in: what no form had to change is gone from all that share it, and nothing else.
    gone = {path for path, leaf in leaf_paths(model).items() if leaf.is_deleted()}
    assert gone == {"embed.weight", "norm.weight", "head.weight"}
    assert {path for path, leaf in leaf_paths(alone).items() if leaf.is_deleted()} == {"norm.weight"}
    assert ours.layers[0].blocks[0].moe.experts.gate.sharding == gate.sharding
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert_close(jax.device_get(ours), jax.device_get(theirs))
