"""Routers, and what is measured of them and trained with: by hand, and against transformers where it is installed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_moe.execution import Grouped
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.moe import LayerRouting, MoE, RouterStats
from eqx_moe.nn.router import SigmoidTopKRouter, SoftmaxTopKRouter, updated_selection_bias
from eqx_moe.nn.router_losses import load_balancing_loss, router_z_loss, switch_load_balancing_loss

SIGMOID = dict(std=0.5, dtype="float32", key=jax.random.key(2))


def test_router_is_the_papers():
    """The softmax over the k largest logits, which equals renormalised probabilities; ties go to the lower expert."""
    router = SoftmaxTopKRouter(3, 4, 2, std=0.0, dtype="bfloat16", key=jax.random.key(0))
    logits = jnp.asarray([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    routing = router.route(logits)
    assert routing.experts.tolist() == [[1, 2], [0, 1]] and routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(routing.weights, 0.5)
    assert router.logits(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k={k} and experts=4"):
            SoftmaxTopKRouter(3, 4, k, std=1.0, dtype="float32", key=jax.random.key(0))


def test_load_balancing_loss_by_hand():
    """Uniform routing gives k; two layers are pooled before the product; masked tokens count nowhere."""
    uniform = jnp.log(jnp.asarray([[0.4, 0.35, 0.15, 0.1], [0.1, 0.15, 0.35, 0.4]]))
    np.testing.assert_allclose(load_balancing_loss((uniform,), 2), 2.0, rtol=1e-6)
    skewed = jnp.log(jnp.asarray([[0.7, 0.1, 0.1, 0.1]] * 2))
    # f = (1, 1, 0, 0) and (1/2, 1/2, 1/2, 1/2) pooled; P = mean of (.7, .1, .1, .1) and (1/4, 1/4, 1/4, 1/4).
    f, p = np.asarray([0.75, 0.75, 0.25, 0.25]), np.asarray([0.475, 0.175, 0.175, 0.175])
    np.testing.assert_allclose(load_balancing_loss((skewed, uniform), 2), 4 * (f * p).sum(), rtol=1e-6)
    masked = load_balancing_loss((uniform,), 2, jnp.asarray([True, False]))
    np.testing.assert_allclose(masked, 4 * (0.4 + 0.35), rtol=1e-6)
    assert load_balancing_loss((uniform,), 2, jnp.zeros(2, bool)) == 0


def test_router_stats_by_hand():
    """Three tokens count, the fourth is padding."""
    probabilities = jnp.asarray([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [1.0, 0, 0, 0]])
    routing = LayerRouting(
        logits=jnp.log(jnp.maximum(probabilities, 1e-9)),
        choices=jnp.asarray([[0, 1], [0, 1], [0, 2], [3, 2]]),
        weights=jnp.full((4, 2), 0.5),
        drops=jnp.zeros((), jnp.int32),
    )
    stats = RouterStats(routing, jnp.asarray([True, True, True, False]))
    assert stats.tokens_per_expert.tolist() == [3, 2, 1, 0]
    skewed = -(0.7 * np.log(0.7) + 0.3 * np.log(0.1))
    np.testing.assert_allclose(stats.entropy, (2 * skewed + np.log(4)) / 3, rtol=1e-5)
    np.testing.assert_allclose(stats.max_violation, 3 / (6 / 4) - 1, rtol=1e-6)
    nobody = RouterStats(routing, jnp.zeros(4, bool))
    assert (nobody.tokens_per_expert.sum(), nobody.entropy, nobody.max_violation) == (0, 0, 0)


def test_load_balancing_loss_is_float32_under_x64():
    with jax.enable_x64(True):
        logits = jnp.zeros((3, 4), jnp.float32)
        assert load_balancing_loss((logits,), 2).dtype == jnp.float32
        assert load_balancing_loss((logits,), 2, jnp.ones(3, bool)).dtype == jnp.float32


def test_sigmoid_router_by_hand():
    """The bias decides who is chosen; the weights are the scores without it, divided by their sum, times the scale."""
    scores = np.asarray([[0.9, 0.8, 0.3, 0.5], [0.5, 0.5, 0.5, 0.5]], np.float32)
    logits = jnp.log(scores / (1 - scores))
    router = SigmoidTopKRouter(3, 4, 2, normalise=True, scale=2.5, **SIGMOID)
    routing = router.route(logits)
    assert routing.experts.tolist() == [[0, 1], [0, 1]] and routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(routing.weights, [[2.5 * 9 / 17, 2.5 * 8 / 17], [1.25, 1.25]], rtol=1e-5)

    biased = eqx.tree_at(lambda r: r.selection_bias, router, jnp.asarray([-0.5, 0.0, 0.3, 0.0]))
    routing = biased.route(logits)
    assert routing.experts.tolist() == [[1, 2], [2, 1]]
    np.testing.assert_allclose(routing.weights, [[2.5 * 8 / 11, 2.5 * 3 / 11], [1.25, 1.25]], rtol=1e-5)

    plain = SigmoidTopKRouter(3, 4, 2, normalise=False, scale=1.0, **SIGMOID).route(logits)
    np.testing.assert_allclose(plain.weights, [[0.9, 0.8], [0.5, 0.5]], rtol=1e-5)
    nothing = router.route(jnp.full((1, 4), -200.0))
    assert np.isfinite(nothing.weights).all()
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k={k} and experts=4"):
            SigmoidTopKRouter(3, 4, k, normalise=True, scale=1.0, **SIGMOID)


GROUPED = [(12, 4, 2, 3), (12, 2, 1, 5), (16, 4, 3, 6), (14, 7, 7, 4), (10, 5, 1, 2)]


def grouped_by_loops(scores, bias, groups, kept, k):
    """The k best experts, by score plus bias, of the groups whose two best have the largest sums; lower wins a tie."""
    choice, size = scores + bias, len(scores) // groups
    sums = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-sums[g], g))[:kept]
    eligible = [e for e in range(len(scores)) if e // size in best]
    return sorted(eligible, key=lambda e: (-choice[e], e))[:k]


@pytest.mark.parametrize("experts, groups, kept, k", GROUPED)
def test_groups_of_experts_are_those_of_loops(experts, groups, kept, k):
    random = np.random.default_rng(experts)
    options = dict(groups=groups, kept_groups=kept, normalise=False, scale=2.5)
    router = SigmoidTopKRouter(5, experts, k, **options, **SIGMOID)

    @jax.jit
    @jax.vmap
    def route(logits, bias):
        return eqx.tree_at(lambda r: r.selection_bias, router, bias).route(logits)

    # Scores that are all one half and biases in eighths: many ties. Negative ones change nothing of all this.
    logits = random.normal(size=(60, experts)) * (np.arange(60) < 40)[:, None]
    bias = random.integers(-8, 4, (60, experts)) / 8
    routing = route(jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32))
    for row in range(60):
        scores = 1 / (1 + np.exp(-logits[row]))
        expected = grouped_by_loops(scores, bias[row], groups, kept, k)
        assert routing.experts[row].tolist() == expected
        np.testing.assert_allclose(routing.weights[row], 2.5 * scores[expected], rtol=1e-5)


def test_groups_that_do_not_fit_are_refused():
    options = dict(normalise=True, scale=1.0, **SIGMOID)
    for k, groups, kept, message in [
        (2, 5, 1, "groups=5 and experts=12"),
        (2, 3, 4, "kept_groups=4 and groups=3"),
        (2, 12, 3, "experts=12 in groups=12"),
        (7, 4, 2, "k=7 and kept_groups=2 groups of 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            SigmoidTopKRouter(3, 12, k, groups=groups, kept_groups=kept, **options)


def test_softmax_router_with_a_bias_and_without_normalising():
    router = SoftmaxTopKRouter(2, 3, 2, normalise=False, bias=True, std=0.0, dtype="bfloat16", key=jax.random.key(0))
    assert router.bias.tolist() == [0, 0, 0]
    router = eqx.tree_at(lambda r: r.bias, router, jnp.log(jnp.asarray([0.5, 2.0, 1.5])).astype(jnp.bfloat16))
    logits = router.logits(jnp.ones((1, 2), jnp.bfloat16))
    routing = router.route(logits)
    assert logits.dtype == jnp.float32 and routing.experts.tolist() == [[1, 2]]
    np.testing.assert_allclose(routing.weights, [[0.5, 0.375]], rtol=5e-3)


def test_the_selection_bias_has_no_gradient_and_the_weights_have():
    router = SigmoidTopKRouter(7, 5, 2, normalise=True, scale=1.5, **SIGMOID)
    x = jax.random.normal(jax.random.key(1), (13, 7))
    gradient = jax.grad(lambda r: jnp.sum(r.route(r.logits(x)).weights[:, 0] ** 2))(router)
    assert jnp.all(gradient.selection_bias == 0) and jnp.all(jnp.abs(gradient.weight) > 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_routers_compute_in_float32(dtype):
    """Logits are float32 sums over the rounded inputs, not rounded again; softmax, sigmoid and weights follow."""
    x = jax.random.normal(jax.random.key(1), (11, 64), dtype)
    softmax = SoftmaxTopKRouter(64, 5, 2, std=0.5, dtype=dtype, key=jax.random.key(2))
    sigmoid = SigmoidTopKRouter(64, 5, 2, normalise=True, scale=1.0, std=0.5, dtype=dtype, key=jax.random.key(2))
    exact = np.asarray(x, np.float64) @ np.asarray(softmax.weight, np.float64).T
    for router in (softmax, sigmoid):
        logits = router.logits(x)
        assert logits.dtype == jnp.float32 and router.route(logits).weights.dtype == jnp.float32
        np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


def test_updates_of_the_bias_balance_a_skewed_router():
    """Logits that favour a few experts for all tokens: the load evens out, with the same weights."""
    router = SigmoidTopKRouter(7, 8, 2, normalise=True, scale=1.0, **SIGMOID)
    logits = jax.random.normal(jax.random.key(3), (4096, 8)) + jnp.linspace(-1.5, 1.5, 8)
    mask = jnp.ones(4096, bool)

    def stats(router):
        routing = router.route(logits)
        return RouterStats(LayerRouting(logits, routing.experts, routing.weights, jnp.zeros((), jnp.int32)), mask)

    @jax.jit
    def step(router):
        bias = updated_selection_bias(router.selection_bias, stats(router).tokens_per_expert, 0.002)
        return eqx.tree_at(lambda r: r.selection_bias, router, bias)

    before = stats(router).max_violation
    for _ in range(300):
        router = step(router)
    assert before > 1 and stats(router).max_violation < 0.05


def test_an_update_of_the_bias_by_hand():
    load = jnp.asarray([9, 1, 4, 2])  # The mean is 4: one above, two below, one there.
    np.testing.assert_allclose(updated_selection_bias(jnp.asarray([0.5, 0, 0, 0]), load, 0.1), [0.4, 0.1, 0, 0.1])


def test_switch_loss_by_hand():
    """One value per layer; uniform routing gives 1 whatever k; the choices are the router's, not the largest logits."""
    uniform = jnp.log(jnp.asarray([[0.4, 0.35, 0.15, 0.1], [0.1, 0.15, 0.35, 0.4]]))
    skewed = jnp.log(jnp.asarray([[0.7, 0.1, 0.1, 0.1]] * 2))
    even, same = jnp.asarray([[0, 1], [3, 2]]), jnp.asarray([[0, 1], [0, 1]])
    losses = switch_load_balancing_loss((uniform, skewed, skewed), (even, same, even))
    np.testing.assert_allclose(losses, [1, 4 * (0.5 * 0.7 + 0.5 * 0.1), 1], rtol=1e-6)
    # k = 1, the paper's: f = (1, 0, 0, 0) and P = (.7, .1, .1, .1).
    np.testing.assert_allclose(switch_load_balancing_loss((skewed,), (same[:, :1],)), [2.8], rtol=1e-6)
    masked = switch_load_balancing_loss((uniform,), (even,), jnp.asarray([True, False]))
    np.testing.assert_allclose(masked, [4 * (0.5 * 0.4 + 0.5 * 0.35)], rtol=1e-6)
    assert switch_load_balancing_loss((uniform,), (even,), jnp.zeros(2, bool)).tolist() == [0]


def test_z_loss_by_hand():
    first = jnp.log(jnp.asarray([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]))
    second = jnp.asarray([[0.0, -jnp.inf, -jnp.inf], [100.0, 0.0, 0.0]])
    np.testing.assert_allclose(router_z_loss((first, second)), [(np.log(8) ** 2 + np.log(3) ** 2) / 2, 5000], rtol=1e-6)
    mask = jnp.asarray([True, False])
    np.testing.assert_allclose(router_z_loss((first, second), mask), [np.log(8) ** 2, 0], rtol=1e-6, atol=1e-6)
    assert router_z_loss((first,), jnp.zeros(2, bool)).tolist() == [0]
    assert jnp.all(jax.grad(lambda x: router_z_loss((x,), mask)[0])(first)[1] == 0)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_is_that_of_transformers(masked):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    random = np.random.default_rng(5)
    logits = [random.normal(size=(3 * 17, 7)).astype(np.float32) for _ in range(4)]
    mask = random.random((3, 17)) < 0.6 if masked else None

    tensors = tuple(torch.tensor(layer, requires_grad=True) for layer in logits)
    theirs = modeling.load_balancing_loss_func(tensors, 7, 3, torch.tensor(mask.astype(np.int64)) if masked else None)
    theirs.backward()

    def ours(layers):
        return load_balancing_loss(
            tuple(layer.reshape(3, 17, 7) for layer in layers), 3, jnp.asarray(mask) if masked else None
        )

    value, gradient = jax.jit(jax.value_and_grad(ours))(tuple(jnp.asarray(layer) for layer in logits))
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
    for mine, tensor in zip(gradient, tensors, strict=True):
        np.testing.assert_allclose(mine, tensor.grad.numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("normalise, groups, kept", [(False, 1, 1), (True, 1, 1), (True, 4, 2)])
def test_sigmoid_router_is_that_of_transformers(normalise, groups, kept):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=12, num_experts_per_tok=3, n_group=groups, topk_group=kept,
        norm_topk_prob=normalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = modeling.DeepseekV3TopkRouter(config)
    random = np.random.default_rng(3)
    weight, bias = random.normal(size=(12, 16)).astype(np.float32), random.normal(size=12).astype(np.float32)
    theirs.weight.data = torch.tensor(weight)
    theirs.e_score_correction_bias.data = torch.tensor(bias)
    x = random.normal(size=(29, 16)).astype(np.float32)
    with torch.no_grad():
        logits, weights, experts = (each.numpy() for each in theirs(torch.tensor(x)))

    options = dict(groups=groups, kept_groups=kept, normalise=normalise, scale=2.5)
    ours = SigmoidTopKRouter(16, 12, 3, **options, **SIGMOID)
    ours = eqx.tree_at(lambda r: (r.weight, r.selection_bias), ours, (jnp.asarray(weight), jnp.asarray(bias)))
    np.testing.assert_allclose(ours.logits(jnp.asarray(x)), logits, rtol=1e-5, atol=1e-5)
    routing = ours.route(jnp.asarray(logits))
    # The reference does not sort its choices.
    order = np.argsort(experts, axis=-1)
    mine = np.argsort(routing.experts, axis=-1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(routing.experts), mine, -1), np.take_along_axis(experts, order, -1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(routing.weights), mine, -1), np.take_along_axis(weights, order, -1), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_jitter_has_mean_one_and_needs_a_key(dtype):
    """What the router sees is the input times the noise: a router with the identity for weights shows it."""
    size = 16
    router = SoftmaxTopKRouter(size, size, 1, std=0.0, dtype=dtype, key=jax.random.key(0))
    router = eqx.tree_at(lambda r: r.weight, router, jnp.eye(size, dtype=dtype))
    experts = Experts(size, size, 3, std=0.0, dtype=dtype, key=jax.random.key(0))
    moe = MoE(router, experts, execution=Grouped(), jitter=0.02)
    x, mask = jnp.ones((4, 512, size), dtype), jnp.ones((4, 512), bool)
    see = eqx.filter_jit(lambda moe, key: moe(x, mask, key)[1].logits)
    seen = see(moe, jax.random.key(4))
    assert seen.min() >= 0.98 - 0.004 and seen.max() <= 1.02 + 0.004 and seen.max() - seen.min() > 0.03
    np.testing.assert_allclose(
        seen.mean(), 1, atol=4 * 0.02 / np.sqrt(3 * seen.size) + (1e-3 if dtype != "float32" else 0)
    )
    assert jnp.all(see(moe, None) == 1)
    assert jnp.all(see(MoE(router, experts, execution=Grouped()), jax.random.key(4)) == 1)
