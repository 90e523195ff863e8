"""The contract: what holds for every family of the registry, and for every decoder.

Rows do not touch each other, caches change nothing, strategies and devices agree, every weight learns. A new family
runs all of it with its cases (`cases.py`, one of them in `FEW`) and its config for a mesh (`meshes.py`). Two parts of
the contract stand elsewhere: what is saved is loaded again bit for bit, in every layout (`test_checkpoint_hub.py`), and
parity with transformers both ways (`test_parity_*.py`, `test_fixtures.py`).
"""

import collections
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from cases import CASES, FEW, LLAMA, MIXTRAL
from weights import draw

import eqx_moe
from eqx_moe.checkpoint import leaf_paths, replace_leaves
from eqx_moe.checkpoint.dtypes import target_dtype, weight_dtype
from eqx_moe.execution import Capacity
from eqx_moe.models import family_of

PLAIN = LLAMA[0]
CLOSE = dict(rtol=2e-5, atol=2e-5)
#: Ends of the paths of weights that have no gradient: the bias decides who is chosen, and nothing else.
WITHOUT_GRADIENT = ("moe.router.selection_bias",)


def test_every_family_is_here():
    cases = collections.Counter(case.model_type for case in CASES)
    assert cases.keys() == eqx_moe.families().keys() and min(cases.values()) >= 8
    assert {case.model_type for case in FEW} == eqx_moe.families().keys()
    assert meshes.FAMILIES.keys() == eqx_moe.families().keys()
    assert {name: type(config) for name, config in meshes.FAMILIES.items()} == eqx_moe.families()


@pytest.fixture(params=FEW, ids=str, scope="module")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return draw(case.parsed)


@pytest.fixture(scope="module")
def tokens(case):
    return jnp.asarray(np.random.default_rng(5).integers(0, case.config["vocab_size"], (3, 23)), jnp.int32)


@eqx.filter_jit
def logits(model, tokens, positions=None, segment_ids=None):
    return model(tokens, positions, segment_ids)


@eqx.filter_jit
def step(model, tokens, cache, segment_ids=None):
    out = model.forward(tokens, segment_ids=segment_ids, cache=cache)
    return model.unembed(out.hidden), out.cache


@pytest.fixture(scope="module")
def full(model, tokens):
    return logits(model, tokens)


def test_shapes(case, model, tokens, full):
    assert full.shape == (3, 23, case.config["vocab_size"]) and full.dtype == jnp.float32
    out = jax.eval_shape(lambda m, t: m.forward(t), model, tokens)
    assert out.hidden.shape == (3, 23, case.config["hidden_size"])
    sparse = [layer.moe for layer in model.layers if layer.moe is not None]
    for field in ("logits", "choices", "weights", "drops", "stats"):
        assert len(getattr(out.router, field)) == len(sparse)
    for i, moe in enumerate(sparse):
        experts, k = moe.experts.num_experts, moe.router.k
        assert out.router.stats[i].tokens_per_expert.shape == (experts,)
        assert out.router.logits[i].shape == (3, 23, experts)
        assert out.router.choices[i].shape == out.router.weights[i].shape == (3, 23, k)


def test_a_batch_equals_its_rows(model, tokens, full):
    np.testing.assert_allclose(eqx.filter_jit(eqx.filter_vmap(model))(tokens), full, **CLOSE)


def decode(model, tokens, segments, sizes):
    """All logits of rows that hold 23 tokens, through a cache of 27 places, so many places at a time: 13 or one."""
    cache, parts, start = model.init_cache(3, 27), [], 0
    cache = eqx.tree_at(lambda c: c.lengths, cache, jnp.full(3, 23))
    for size in sizes:
        part, cache = step(model, tokens[:, start : start + size], cache, segments[:, start : start + size])
        parts.append(part)
        start += size
    assert int(cache.filled) == start == tokens.shape[1]
    return np.concatenate(parts, axis=1)


def test_cached_decode_equals_the_full_forward(model, tokens, full):
    found = decode(model, tokens, jnp.ones_like(tokens), [1] * 5 + [13] + [1] * 5)
    np.testing.assert_allclose(found, full, **CLOSE)


def test_left_padded_rows_equal_the_rows_alone(model, tokens, full):
    padded = jnp.pad(tokens, ((0, 0), (4, 0)), constant_values=7)
    segments = jnp.pad(jnp.ones_like(tokens), ((0, 0), (4, 0)))
    found = decode(model, padded, segments, [13, 1, 13])
    np.testing.assert_allclose(found[:, 4:], full, **CLOSE)
    # And without a cache, in rows as long as the packed ones below.
    padded, segments = (jnp.pad(each, ((0, 0), (0, 47))) for each in (padded, segments))
    found = logits(model, padded, segment_ids=segments)
    np.testing.assert_allclose(found[:, 4:27], full, **CLOSE)
    assert np.isfinite(found).all()


def test_packed_rows_equal_the_rows_alone(model, tokens, full):
    """Two that touch, five places of padding, and a third."""
    orders, places = [(0, 1, 2), (2, 0, 1), (1, 2, 0)], (0, 23, 51)
    packed, segments = np.zeros((2, 3, 74), np.int32)
    for row, order in enumerate(orders):
        for place, which in zip(places, order, strict=True):
            packed[row, place : place + 23], segments[row, place : place + 23] = tokens[which], which + 1
    found = logits(model, jnp.asarray(packed), segment_ids=jnp.asarray(segments))
    for row, order in enumerate(orders):
        for place, which in zip(places, order, strict=True):
            np.testing.assert_allclose(found[row, place : place + 23], full[which], **CLOSE)
    assert np.isfinite(found).all()


def test_positions_feed_the_rotary_embedding_only(model, tokens, full):
    """Rotary embeddings are relative: moving all positions changes nothing; and the window goes by places."""
    moved = jnp.broadcast_to(jnp.arange(23) + 11, tokens.shape)
    np.testing.assert_allclose(logits(model, tokens, moved), full, rtol=1e-3, atol=1e-4)
    spread = jnp.broadcast_to(jnp.arange(23) * 2, tokens.shape)
    assert np.abs(logits(model, tokens, spread) - full).max() > 1e-2


def test_execution_strategies_agree_and_every_leaf_has_a_gradient(model, tokens, full):
    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def value(model, tokens):
        return jnp.mean(jax.nn.logsumexp(model(tokens), axis=-1) ** 2)

    loss, gradient = value(eqx_moe.with_options(model, execution="grouped"), tokens)
    expected_loss, expected = value(eqx_moe.with_options(model, execution="dense"), tokens)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    expected = leaf_paths(expected)
    for path, ours in leaf_paths(gradient).items():
        np.testing.assert_allclose(ours, expected[path], rtol=1e-4, atol=1e-5)
        assert np.isfinite(ours).all() and (np.abs(ours).max() > 0) != path.endswith(WITHOUT_GRADIENT), path
    # Room for every token with every expert.
    roomy = eqx_moe.with_options(model, execution=Capacity(99.0))
    np.testing.assert_allclose(logits(roomy, tokens), full, **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.full)])
def test_half_precision_stays_near_float32(model, tokens, full, dtype):
    kept = family_of(model.config).keep_fp32
    half = replace_leaves(
        model,
        {
            path: leaf.astype(target_dtype(path, leaf.dtype, weight_dtype(dtype), kept))
            for path, leaf in leaf_paths(model).items()
        },
    )
    out = logits(half, tokens)
    assert out.dtype == jnp.float32
    # The median, for a router may rightly turn to another expert where two were nearly equal.
    assert np.median(np.abs(out - full)) < 0.01 * np.abs(full).max()
    assert {leaf.dtype for leaf in jax.tree.leaves(half.init_cache(1, 8).layers)} == {jnp.dtype(dtype)}


@pytest.fixture(scope="module", params=meshes.FAMILIES)
def on_one(request):
    """A model on one device, with its loss and its gradients."""
    model = draw(meshes.FAMILIES[request.param], seed=3)
    return model, *meshes.value_and_grad(model, meshes.batch())


def test_eight_devices_compute_what_one_does(on_one):
    """Loss, metrics and all gradients; `test_sharding.py` has the other meshes."""
    meshes.check_loss_and_gradients(on_one, meshes.mesh((2, 2, 2)))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_eight_devices_generate_what_one_does(family):
    """Sinks, windows and biases; and a cache of latents, which has no heads to split."""
    one = draw(meshes.FAMILIES[family], seed=3)
    prompts = [[3, 1, 4, 1], [5, 9], [2, 6, 5], [35, 8, 9, 7, 9]]
    expected = eqx_moe.generate(one, prompts, 9, eos_ids=[])
    spread = eqx_moe.with_options(one, mesh=meshes.mesh((2, 2, 2)))
    assert eqx_moe.generate(spread, prompts, 9, eos_ids=[]) == expected


def test_bad_ids():
    model = draw(PLAIN.parsed)
    vocab = model.config.vocab_size
    for bad in (vocab, -1):
        with pytest.raises(ValueError, match=rf"\[0, {vocab}\).*got {bad}"):
            model(jnp.asarray([1, bad, 2]))
        assert jnp.isnan(logits(model, jnp.asarray([1, bad, 2]))[1]).all()
    assert jnp.isfinite(logits(model, jnp.asarray([1, 0, vocab - 1]))).all()


def test_a_full_cache_is_an_error_and_under_jit_nan():
    model = draw(PLAIN.parsed)
    cache = model.init_cache(2, 5)
    tokens = jnp.ones((2, 3), int)
    np.testing.assert_array_equal(step(model, tokens, cache, jnp.ones_like(tokens))[0], step(model, tokens, cache)[0])
    out, cache = step(model, tokens, cache)
    assert jnp.isfinite(out).all()
    with pytest.raises(ValueError, match="holds 5 places, 3 of them filled; got 3 more"):
        model.forward(tokens, cache=cache)
    assert jnp.isnan(step(model, tokens, cache)[0]).all()


def test_no_tokens_and_a_cache_of_other_rows_are_errors():
    model = draw(PLAIN.parsed)
    for shape in ((0,), (2, 0), (0, 5)):
        with pytest.raises(ValueError, match=r"at least one token; got an array of shape \("):
            model(jnp.zeros(shape, int))
    with pytest.raises(ValueError, match="`cache` is for 3 rows; got 2 rows"):
        model.forward(jnp.ones((2, 4), int), cache=model.init_cache(3, 9))


def test_jitter_needs_a_key_and_changes_routing_inputs():
    model = draw(dataclasses.replace(MIXTRAL[0].parsed, num_hidden_layers=1, router_jitter_noise=0.3))
    tokens = jnp.arange(12).reshape(2, 6)
    run = eqx.filter_jit(lambda key: model.forward(tokens, key=key).hidden)
    still, one, other = run(None), run(jax.random.key(1)), run(jax.random.key(2))
    assert np.abs(still - one).max() > 1e-3 and np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(one, run(jax.random.key(1)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configs_survive_their_json(case):
    from eqx_moe.models import config_to_json, parse_config

    config = case.parsed
    again = parse_config(config_to_json(config, "float32"), "config.json")
    assert again == dataclasses.replace(config, dtype="float32", head_dim=again.head_dim)
    assert hash(again) == hash(parse_config(config_to_json(again, "float32"), "config.json"))
