"""Execution strategies against the dense oracle, and the grouped matrix product against its own."""

import contextlib
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from weights import draw_experts

import eqx_moe
from eqx_moe.execution import Dense, Grouped, Routing, resolve
from eqx_moe.kernels.grouped_matmul import _ragged_dot, _slots, grouped_matmul, grouped_matmul_oracle
from eqx_moe.nn.gating import SWIGLU, ClampedSwiGLU
from eqx_moe.nn.router import SoftmaxTopKRouter

# (rows, groups, in, out): few rows (one at a time), one group, more groups than rows, sizes that divide nothing.
SHAPES = [(1, 7, 5, 11), (2, 3, 13, 7), (37, 5, 11, 6), (90, 1, 7, 9), (301, 4, 6, 5), (64, 64, 3, 10)]


def assert_close(ours, theirs):
    """Within 1e-5 of the largest entry: sums of terms that cancel have no digits of their own. Also refuses NaN."""
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max())


@st.composite
def groupings(draw):
    """A shape and the sizes of its groups: at random, all in one group, or rows left over at the end."""
    rows, groups, inner, outer = draw(st.sampled_from(SHAPES))
    kind = draw(st.sampled_from(["random", "one", "rest"]))
    if kind == "one":
        sizes = [0] * groups
        sizes[draw(st.integers(0, groups - 1))] = rows
    else:
        cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups)))
        if kind == "random":
            cuts[-1] = rows
        sizes = np.diff([0, *cuts]).tolist()
    return (rows, groups, inner, outer), np.asarray(sizes, np.int32), draw(st.integers(0, 2**31 - 1))


# On CPU float32 has kernels; all else goes the portable way, as does float32 elsewhere.
both_ways = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "portable"])


@contextlib.contextmanager
def using(kernels: bool):
    """What is traced in here has the CPU's kernels, or has them not."""
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(eqx_moe.kernels.grouped_matmul, "_has_kernel", lambda x, weight: False)
        yield


@functools.partial(jax.jit, static_argnames="kernels")
def _both(x, weight, sizes, dy, *, kernels: bool):
    with using(kernels):
        return _ours_and_theirs(x, weight, sizes, dy)


def _ours_and_theirs(x, weight, sizes, dy):
    # With an odd number of rows less of them are expected than there may be.
    expected = len(x) // 3 + 1 if len(x) % 2 else None
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, expected), x, weight)
    expected, pull_expected = jax.vjp(lambda x, w: grouped_matmul_oracle(x, w, sizes), x, weight)
    return (out, *pull(dy)), (expected, *pull_expected(dy))


@both_ways
@given(case=groupings())
@settings(max_examples=60, deadline=None)
def test_grouped_matmul_equals_its_oracle_in_value_and_gradients(kernels, case):
    (rows, groups, inner, outer), sizes, seed = case
    random = np.random.default_rng(seed)
    x, weight, dy = (
        random.normal(size=shape).astype(np.float32) for shape in ((rows, inner), (groups, outer, inner), (rows, outer))
    )
    found, expected = _both(x, weight, sizes, dy, kernels=kernels)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("left", [1, 15, 16, 17, 127, 128, 129, 145])
def test_groups_that_just_fit_a_window_and_just_do_not(left):
    """So many rows of a group have no slot. A window takes 128 of them, or where fewer are left 16."""
    rows, groups, inner, outer = SHAPES[4]
    slots = _slots(rows, groups, rows // 3 + 1)
    random = np.random.default_rng(left)
    x, weight, dy = (
        random.normal(size=shape).astype(np.float32) for shape in ((rows, inner), (groups, outer, inner), (rows, outer))
    )
    # Slots are used where most rows have one: there, and in the first of these alone.
    for sizes in ([slots + left, 20, slots, 5], [left, 3, left, 1], [rows - 25 - left, 20, 5, left]):
        found, expected = _both(x, weight, np.asarray(sizes, np.int32), dy, kernels=False)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs)


@both_ways
def test_rows_past_the_groups_may_hold_anything(kernels):
    """Also infinities: they reach neither the result nor a gradient."""
    sizes = jnp.asarray([2, 0, 3])
    x = jnp.ones((8, 5)).at[5:].set(jnp.inf)
    weight = jnp.ones((3, 4, 5))
    with using(kernels):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, weight)
        dx, dweight = pull(jnp.ones_like(out))
    assert jnp.all(out[:5] == 5) and jnp.all(out[5:] == 0)
    assert jnp.all(dx[5:] == 0) and jnp.all(jnp.isfinite(dweight))
    assert jnp.all(dweight == jnp.asarray([2.0, 0.0, 3.0])[:, None, None])


@both_ways
@pytest.mark.parametrize("sizes", [[2, 3, 4], [3, 60, 37]], ids=["few rows", "many"])
def test_gradients_that_are_not_finite_stay_in_their_group(sizes, kernels):
    """Of the first group, and of rows past the groups: they reach neither the others' rows nor their matrices."""
    rows, own = sum(sizes) + 2, sizes[0]
    dy = jnp.ones((rows, 4)).at[:own].set(jnp.inf).at[-2:].set(jnp.nan)
    with using(kernels):
        groups = jnp.asarray(sizes)
        _, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, groups), jnp.ones((rows, 5)), jnp.ones((3, 4, 5)))
        dx, dweight = pull(dy)
    assert jnp.all(dx[:own] == jnp.inf) and jnp.all(dx[own:-2] == 4) and jnp.all(dx[-2:] == 0)
    assert jnp.all(dweight[0] == jnp.inf) and jnp.all(dweight[1:] == jnp.asarray(sizes[1:])[:, None, None])


@pytest.mark.parametrize("transpose", [False, True])
def test_the_back_end_of_tpus_equals_the_oracle(transpose, monkeypatch):
    """`lax.ragged_dot`, which XLA has for CPUs too: under `vmap`, and as if it did not write rows past the groups."""
    original = lax.ragged_dot

    def ragged_dot(x, weight, sizes, **options):
        y = original(x, weight, sizes, **options)
        return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(sizes), y, jnp.nan)

    monkeypatch.setattr(lax, "ragged_dot", ragged_dot)
    random = np.random.default_rng(5)
    x, weight = random.normal(size=(2, 19, 7)), random.normal(size=(3, 6, 7))
    x, weight = x.astype(np.float32), (weight.swapaxes(1, 2) if transpose else weight).astype(np.float32)
    sizes = np.asarray([[5, 0, 9], [0, 19, 0]], np.int32)
    found = jax.vmap(lambda x, sizes: _ragged_dot(x, weight, sizes, transpose=transpose))(x, sizes)
    forwards = weight.swapaxes(1, 2) if transpose else weight
    expected = jax.vmap(lambda x, sizes: grouped_matmul_oracle(x, jnp.asarray(forwards), sizes))(x, sizes)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(("platform", "native"), [("tpu", 2), ("cuda", 0), ("cpu", 0), ("rocm", 0)])
def test_which_back_end_a_platform_gets(platform, native):
    """Of the three contractions two are XLA's `ragged_dot` on TPUs, which alone have it natively."""

    def value(x, weight):
        return jnp.sum(grouped_matmul(x, weight, jnp.asarray([9, 0, 10])) ** 2)

    traced = jax.jit(jax.grad(value, (0, 1))).trace(jnp.ones((19, 7)), jnp.ones((3, 6, 7)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('"chlo.ragged_dot"(') == native


@both_ways
@pytest.mark.parametrize("rows", [2, 11])
def test_few_rows_copy_no_matrix_and_touch_no_other(rows, kernels):
    """Each is multiplied from where its group's matrix lies; those of groups without rows hold NaN."""
    weight = jnp.full((5, 96, 128), jnp.nan).at[1].set(1).at[3].set(2)
    sizes = jnp.zeros(5, jnp.int32).at[1].set(1).at[3].set(rows - 1)
    with using(kernels):
        compiled = (
            jax.jit(lambda *inputs: grouped_matmul(*inputs)).lower(jnp.ones((rows, 128)), weight, sizes).compile()
        )
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < weight[0].nbytes
    y = compiled(jnp.ones((rows, 128)), weight, sizes)
    assert jnp.all(y[0] == 128) and jnp.all(y[1:] == 256)


def test_bfloat16_accumulates_in_float32():
    x = jnp.ones((3, 4096), jnp.bfloat16)
    out = grouped_matmul(x, jnp.full((2, 1, 4096), 1 / 64, jnp.bfloat16), jnp.asarray([1, 2]))
    assert out.dtype == jnp.bfloat16 and jnp.all(out == 64)
    # Parts of a row that is taken in parts: 257 and 257 would be 256 and 256, if they were rounded before they meet.
    wide = (
        jnp.zeros((1, 1, 16384), jnp.bfloat16)
        .at[0, 0, jnp.asarray([0, 1, 8128, 8129, 16256])]
        .set(jnp.asarray([256, 1, 256, 1, -2], jnp.bfloat16))
    )
    assert grouped_matmul(jnp.ones((1, 16384), jnp.bfloat16), wide, jnp.asarray([1])) == 512
    # And windows of 128 rows: the same in the gradient of a matrix.
    rows = jnp.zeros((301, 1), jnp.bfloat16).at[jnp.asarray([0, 1, 128, 129, 256]), 0].set(wide[wide != 0])
    _, pull = jax.vjp(lambda w: grouped_matmul(rows, w, jnp.asarray([301, 0, 0])), jnp.ones((3, 1, 1), jnp.bfloat16))
    assert pull(jnp.ones_like(rows))[0].ravel().tolist() == [512, 0, 0]


@pytest.mark.parametrize("rows", [3, 301])
def test_every_product_of_bfloat16_is_one_of_float32(rows):
    """As it is written down: XLA's CPU back end would add in float32 unasked."""

    def value(x, weight):
        return jnp.sum(grouped_matmul(x, weight, jnp.asarray([1, rows - 2])))

    inputs = jnp.ones((rows, 7), jnp.bfloat16), jnp.ones((2, 5, 7), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(jax.value_and_grad(value, (0, 1)))(*inputs))
    products = jaxpr.count("dot_general[")
    assert products >= 3 and len(re.findall(r"preferred_element_type=.*float32", jaxpr)) == products


# (tokens, hidden, ffn, experts, k)
BLOCKS = [(1, 6, 5, 4, 2), (19, 7, 11, 5, 3), (40, 5, 6, 13, 1), (33, 9, 4, 3, 3), (11, 3, 7, 64, 8)]
BLOCKS += [(21, 5, 3, 1, 1), (10, 4, 9, 7, 4), (14, 6, 7, 9, 5), (8, 7, 5, 16, 6), (13, 8, 3, 11, 7)]


@eqx.filter_jit
def _run(execution, x, weights, chosen, experts, dy):
    def value(x, weights, experts):
        return execution(x[None], Routing(chosen[None], weights[None]), experts, jnp.ones((1, len(x)), bool))[0][0]

    out, pull = eqx.filter_vjp(value, x, weights, experts)
    return out, jax.tree.leaves(pull(dy))


@given(st.sampled_from(BLOCKS), st.sampled_from(["random", "same"]), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_grouped_equals_dense_in_value_and_gradients(shape, kind, seed):
    tokens, hidden, ffn, count, k = shape
    random = np.random.default_rng(seed)
    if kind == "same":  # all tokens to the same experts, the others stay empty
        chosen = np.tile(random.permutation(count)[:k], (tokens, 1))
    else:
        chosen = np.stack([random.permutation(count)[:k] for _ in range(tokens)])
    x, dy = random.normal(size=(2, tokens, hidden)).astype(np.float32)
    weights = random.normal(size=(tokens, k)).astype(np.float32)
    # Odd numbers of experts have biases, and another function between the products.
    experts = draw_experts(count, hidden, ffn, seed, gating=ClampedSwiGLU(1.3, 0.8) if count % 2 else None)
    found, expected = (
        _run(execution, x, weights, chosen.astype(np.int32), experts, dy) for execution in (Grouped(), Dense())
    )
    for ours, theirs in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("gating", [SWIGLU, ClampedSwiGLU(1.3, 0.8)], ids=str)
def test_the_backward_pass_keeps_gate_and_up_alone(gating):
    gate, up = jax.random.normal(jax.random.key(0), (2, 40, 24))
    _, backward = jax.vjp(gating, gate, up)
    assert sum(leaf.size for leaf in jax.tree.leaves(backward)) == gate.size + up.size


def test_clamped_swiglu_by_hand():
    """Gate is cut off above the limit alone, up on both sides; what is cut off has no gradient."""
    gating = ClampedSwiGLU(alpha=1.3, limit=0.8)
    gate, up = jnp.asarray([2.0, -2.0, 0.5, 0.5]), jnp.asarray([0.3, -0.9, 1.1, 0.2])
    cut_gate, cut_up = np.asarray([0.8, -2.0, 0.5, 0.5]), np.asarray([0.3, -0.8, 0.8, 0.2])
    np.testing.assert_allclose(gating(gate, up), cut_gate / (1 + np.exp(-1.3 * cut_gate)) * (cut_up + 1), rtol=1e-6)
    of_gate, of_up = jax.grad(lambda gate, up: jnp.sum(gating(gate, up)), (0, 1))(gate, up)
    assert (of_gate != 0).tolist() == [False, True, True, True] and (of_up != 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("execution", [Grouped(), Dense()], ids=repr)
def test_pairs_that_go_nowhere_add_nothing(execution, getkey):
    """They are not run: their expert index may be anything to the matrices, their input and weight not even finite."""
    experts = draw_experts(5, 7, 11)
    x = jax.random.normal(getkey(), (1, 4, 7)).at[0, 3].set(jnp.inf)
    weights = jnp.full((1, 4, 2), 0.5).at[0, 1, 1].set(jnp.nan).at[0, 3].set(jnp.nan)
    chosen = jnp.asarray([[[0, 4], [1, 5], [5, 5], [5, 5]]])
    y, drops = execution(x, Routing(chosen, weights), experts, jnp.asarray([[True, True, True, False]]))
    alone, _ = execution(x[:, 1:2], Routing(chosen[:, 1:2, :1], weights[:, 1:2, :1]), experts, jnp.ones((1, 1), bool))
    np.testing.assert_allclose(y[0, 1], alone[0, 0], rtol=1e-5, atol=1e-6)
    assert jnp.all(y[0, 2:] == 0) and drops == 0


@pytest.mark.parametrize("execution", [Grouped(), Dense()], ids=repr)
def test_what_is_not_finite_stays_with_its_token(execution):
    """With one expert of many at hand, pairs that go nowhere have no row of their own to read."""
    x = jnp.ones((1, 5, 7)).at[0, -1].set(jnp.inf)
    chosen = jnp.asarray([[[0, 1], [1, 0], [0, 1], [0, 1], [0, 1]]])
    routing = Routing(chosen, jnp.full(chosen.shape, 0.5), num_experts=4)
    y, _ = execution(x, routing, draw_experts(1, 7, 11), jnp.ones((1, 5), bool))
    assert jnp.all(jnp.isfinite(y[0, :-1])) and not jnp.any(jnp.isfinite(y[0, -1]))


def test_permuting_experts_permutes_nothing_else(getkey):
    router = SoftmaxTopKRouter(7, 5, 2, std=0.5, dtype="float32", key=getkey())
    experts = draw_experts(5, 7, 11)
    x = jax.random.normal(getkey(), (23, 7))
    order = jnp.asarray([3, 0, 4, 2, 1])
    moved = jax.tree.map(lambda leaf: leaf[order], experts)
    moved_router = eqx.tree_at(lambda r: r.weight, router, router.weight[order])

    def run(router, experts):
        routing = router.route(router.logits(x))
        np.testing.assert_allclose(routing.weights.sum(-1), 1, rtol=1e-6)
        routing = Routing(routing.experts[None], routing.weights[None])
        return Grouped()(x[None], routing, experts, jnp.ones((1, 23), bool))[0]

    np.testing.assert_allclose(run(router, experts), run(moved_router, moved), rtol=1e-5, atol=1e-6)


def test_names_and_objects():
    assert resolve(None) == Grouped() and resolve("dense") == Dense() and resolve(Grouped()) == Grouped()
    with pytest.raises(ValueError, match=r"\['capacity', 'dense', 'expert_parallel', 'grouped'\]; got 'magic'"):
        resolve("magic")
    config = eqx_moe.LlamaConfig(
        vocab_size=11, hidden_size=12, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2
    )
    dense = eqx_moe.init(config, key=jax.random.key(0))
    assert eqx_moe.with_options(dense, execution="dense") is dense
    with pytest.raises(ValueError, match="got 'magic'"):
        eqx_moe.with_options(dense, execution="magic")
