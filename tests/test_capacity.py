"""Experts with a fixed number of places: equal to dense with the pairs that an oracle in plain Python keeps."""

import dataclasses
import math
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import draw_experts

import eqx_moe
from eqx_moe.execution import Capacity, Dense, Grouped, Routing
from eqx_moe.execution.capacity import capacity_oracle
from eqx_moe.nn.gating import ClampedSwiGLU


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    seq: int
    hidden: int
    ffn: int
    experts: int
    k: int
    execution: Capacity


# k from 1 to 8; one token, one expert, more experts than tokens, places for all.
CASES = [
    Case(1, 1, 6, 5, 4, 2, Capacity(0.5)),
    Case(3, 19, 7, 11, 5, 3, Capacity(1.0, "residual")),
    Case(2, 11, 3, 7, 64, 8, Capacity(1.1)),
    Case(2, 23, 6, 5, 1, 1, Capacity(0.6, "residual")),
    Case(1, 29, 4, 3, 16, 7, Capacity(1.5, "residual")),
    Case(3, 17, 5, 4, 8, 4, Capacity(99.0)),
    Case(4, 13, 4, 6, 7, 5, Capacity(0.3)),
    Case(1, 31, 3, 4, 11, 6, Capacity(1.5)),
]


@st.composite
def routed(draw):
    """A case, a mask [batch, seq], and choices [batch, seq, k]: padding and a few pairs besides go nowhere."""
    case = draw(st.sampled_from(CASES))
    random = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    shape = (case.batch, case.seq)
    place, lengths = np.arange(case.seq), random.integers(0, case.seq + 1, (case.batch, 1))
    mask = {
        "none": np.ones(shape, bool),
        "right": place < lengths,
        "left": place >= lengths,
        "anywhere": random.random(shape) < 0.7,
    }[draw(st.sampled_from(["none", "right", "left", "anywhere"]))]
    kind = draw(st.sampled_from(["random", "same", "skewed"]))
    # Small scores come first: the same for all tokens, or the same but for a few.
    scores = random.random((*shape, case.experts)) * {"random": 1.0, "same": 0.0, "skewed": 0.4}[kind]
    scores += random.random(case.experts) * (kind != "random")
    chosen = np.argsort(scores, axis=-1)[:, :, : case.k]
    nowhere = ~mask[..., None] | (random.random(chosen.shape) < draw(st.sampled_from([0.0, 0.2])))
    return case, mask, np.where(nowhere, case.experts, chosen).astype(np.int32), random


def kept_by(case: Case, chosen, mask):
    return capacity_oracle(chosen, mask, case.execution.factor, case.experts)


def inputs(case: Case, random):
    x, dy = random.normal(size=(2, case.batch, case.seq, case.hidden)).astype(np.float32)
    weights = random.normal(size=(case.batch, case.seq, case.k)).astype(np.float32)
    # Odd numbers of experts have biases, and another function between the products.
    gating = ClampedSwiGLU(1.3, 0.8) if case.experts % 2 else None
    seed = int(random.integers(2**31))
    return x, dy, weights, draw_experts(case.experts, case.hidden, case.ffn, seed, gating=gating)


@eqx.filter_jit
def fast(execution, x, weights, experts, chosen, mask, dy):
    def value(x, weights, experts):
        return execution(x, Routing(chosen, weights), experts, mask)

    out, pull, drops = eqx.filter_vjp(value, x, weights, experts, has_aux=True)
    return drops, [out, *jax.tree.leaves(pull(dy))]


@eqx.filter_jit
def slow(execution, x, weights, experts, chosen, kept, mask, dy):
    real = chosen < experts.num_experts

    def value(x, weights, experts):
        y, _ = Dense()(x, Routing(jnp.where(kept, chosen, experts.num_experts), weights), experts, mask)
        if execution.dropped == "residual":
            y += jnp.sum(jnp.where(real & ~kept, weights, 0), axis=-1, keepdims=True) * x
        return y

    out, pull = eqx.filter_vjp(value, x, weights, experts)
    return jnp.sum(real & ~kept), [out, *jax.tree.leaves(pull(dy))]


def assert_close(ours, theirs):
    """Within 1e-5 of the largest entry: sums of terms that cancel have no digits of their own. Also refuses NaN."""
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max())


@given(routed())
@settings(max_examples=80, deadline=None)
def test_equals_its_oracle_in_value_and_gradients(drawn):
    case, mask, chosen, random = drawn
    x, dy, weights, experts = inputs(case, random)
    drops, found = fast(case.execution, x, weights, experts, chosen, mask, dy)
    kept = kept_by(case, chosen, mask)
    expected_drops, expected = slow(case.execution, x, weights, experts, chosen, kept, mask, dy)
    assert drops == expected_drops
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)
    if case.execution.factor == 99.0:
        assert drops == 0 and (kept == (chosen < case.experts)).all()  # It was plain dense that it equalled.


class OnOneDevice(eqx.Module):
    """Experts without arrays: there is nothing to split."""

    num_experts: eqx.AbstractVar[int]

    def partition(self, expert, tensor):
        return self

    def share(self, parts):
        return self


class Marks(OnOneDevice):
    """Experts whose outputs say which of them ran: expert e adds the e-th unit vector."""

    num_experts: int = eqx.field(static=True)

    def __call__(self, x, linear):
        return linear(x, jnp.zeros((self.num_experts, self.num_experts, x.shape[-1])), jnp.eye(self.num_experts))


@eqx.filter_jit
def runs(case: Case, x, chosen, mask):
    """[batch, seq, experts]: how often each expert ran for each token, and the drops."""
    x = jnp.broadcast_to(x[..., :1], (case.batch, case.seq, case.experts))
    routing = Routing(chosen, jnp.ones(chosen.shape, jnp.float32))
    return dataclasses.replace(case.execution, dropped="zero")(x, routing, Marks(case.experts), mask)


@given(routed())
@settings(max_examples=60, deadline=None)
def test_capacity_is_never_exceeded_and_counters_add_up(drawn):
    case, mask, chosen, random = drawn
    ran, drops = runs(case, inputs(case, random)[0], chosen, mask)
    ran = np.asarray(ran)
    wanted = (chosen[..., None] == np.arange(case.experts)).any(axis=2)
    assert set(np.unique(ran)) <= {0, 1} and not ran[~wanted].any()
    for load, demand, real in zip(ran.sum(axis=1), wanted.sum(axis=1), mask, strict=True):
        capacity = math.ceil(Fraction(str(case.execution.factor)) * case.k * int(real.sum()) / case.experts)
        # Never more than there are places, and nobody is turned away where one is free.
        np.testing.assert_array_equal(load, np.minimum(demand, capacity))
    assert ran.sum() + int(drops) == (chosen < case.experts).sum()


def test_first_choices_come_first_and_earlier_tokens_before_later():
    """Expert 0 has two places: tokens 0 and 2 get them with their first choice, before token 1 with its second."""
    chosen = np.asarray([[[0, 1], [1, 0], [0, 2], [0, 1]]], np.int32)
    case = Case(1, 4, 1, 1, 3, 2, Capacity(0.75))  # C = ceil(0.75 * 2 * 4 / 3) = 2
    ran, drops = runs(case, jnp.ones((1, 4, 1)), chosen, np.ones((1, 4), bool))
    assert ran[0].tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]] and drops == 3
    kept = capacity_oracle(chosen, np.ones((1, 4), bool), 0.75, 3)
    assert kept[0].tolist() == [[True, True], [True, False], [True, True], [False, False]]


@pytest.mark.parametrize(
    ("factor", "k", "tokens", "experts", "capacity"),
    [
        (1.25, 2, 8, 5, 4),
        (1.1, 1, 10, 11, 1),
        (0.1, 3, 10, 1, 3),
        (2, 1, 7, 2, 7),
        (1e-9, 1, 5, 2, 1),
        (1.25, 2, 9, 5, 5),
    ],
)
def test_capacity_is_counted_in_whole_numbers(factor, k, tokens, experts, capacity):
    """In floating point 1.1 * 10 / 11 and 0.1 * 3 * 10 are a little more than 1 and 3."""
    needed = Capacity(factor)._tokens_needed(23, k, experts)
    assert (needed <= tokens).sum() == capacity
    for real in range(24):
        exact = math.ceil(Fraction(str(factor)) * k * real / experts)
        assert (needed <= real).sum() == min(exact, len(needed)) and len(needed) <= 23


def case_and_inputs(**changes):
    case = dataclasses.replace(CASES[1], **changes)
    random = np.random.default_rng(7)
    x, _, weights, experts = inputs(case, random)
    scores = random.random((case.batch, case.seq, case.experts)) + 0.4 * random.random(case.experts)
    chosen, mask = np.argsort(scores)[:, :, : case.k].astype(np.int32), np.ones((case.batch, case.seq), bool)
    return case, jnp.asarray(x), jnp.asarray(weights), experts, jnp.asarray(chosen), jnp.asarray(mask)


@eqx.filter_jit
def run(execution, x, routing, experts, mask):
    return execution(x, routing, experts, mask)


def test_rows_do_not_touch_each_other():
    case, x, weights, experts, chosen, mask = case_and_inputs()
    together, drops = run(case.execution, x, Routing(chosen, weights), experts, mask)
    rows = [slice(row, row + 1) for row in range(case.batch)]
    alone = [run(case.execution, x[row], Routing(chosen[row], weights[row]), experts, mask[row]) for row in rows]
    assert_close(together, np.concatenate([y for y, _ in alone]))
    assert drops == sum(each for _, each in alone) and drops > 0


@pytest.mark.parametrize(("left", "right"), [(6, 0), (0, 11), (3, 4)])
def test_padding_takes_no_place_and_gives_none(left, right):
    """Whatever it holds, also infinities, and weighs; and in a row that holds nothing else."""
    case, x, weights, experts, chosen, mask = case_and_inputs()
    pads = ((0, 1), (left, right))
    padded_chosen = np.pad(chosen, (*pads, (0, 0)), constant_values=case.experts)
    padded_x = np.pad(x, (*pads, (0, 0)), constant_values=np.inf)
    padded_weights = np.pad(weights, (*pads, (0, 0)), constant_values=np.nan)
    dy = np.ones_like(x)
    drops, plain = fast(case.execution, x, weights, experts, chosen, mask, dy)
    padded_drops, padded = fast(
        case.execution,
        padded_x,
        padded_weights,
        experts,
        padded_chosen,
        np.pad(mask, pads),
        np.pad(dy, (*pads, (0, 0))),
    )
    assert drops == padded_drops and drops > 0
    real = slice(left, left + case.seq)
    for ours, theirs in zip([leaf[: case.batch, real] for leaf in padded[:3]] + padded[3:], plain, strict=True):
        assert_close(ours, theirs)
    assert all(np.isfinite(leaf).all() for leaf in padded)


@pytest.mark.parametrize("dropped", ["zero", "residual"])
def test_parts_of_a_block_add_up_to_it(dropped):
    """Two calls with two and three of five experts; and two calls with half of every expert's ffn dimension each."""
    case, x, weights, experts, chosen, mask = case_and_inputs(execution=Capacity(1.0, dropped), ffn=6)
    whole, drops = run(case.execution, x, Routing(chosen, weights), experts, mask)
    assert drops > 0

    def part(start, stop):
        mine = jax.tree.map(lambda leaf: leaf[start:stop], experts)
        local = jnp.where((chosen >= start) & (chosen < stop), chosen - start, stop - start)
        return run(case.execution, x, Routing(local, weights, num_experts=case.experts), mine, mask)

    (first, first_drops), (second, second_drops) = part(0, 2), part(2, 5)
    assert_close(first + second, whole)
    assert first_drops + second_drops == drops

    def half(ffn):
        mine = experts.share(2)
        biases = (mine.gate_bias[:, ffn], mine.up_bias[:, ffn])
        cut = (mine.gate[:, ffn], mine.up[:, ffn], mine.down[:, :, ffn], *biases)
        mine = eqx.tree_at(lambda e: (e.gate, e.up, e.down, e.gate_bias, e.up_bias), mine, cut)
        return run(case.execution, x, Routing(chosen, weights, shares=2), mine, mask)

    (first, first_drops), (second, second_drops) = half(slice(0, 2)), half(slice(2, 6))
    assert_close(first + second, whole)
    assert first_drops == second_drops == drops


def test_permuting_experts_permutes_nothing_else():
    case, x, weights, experts, chosen, mask = case_and_inputs()
    order = jnp.asarray([3, 0, 4, 2, 1])
    moved = jax.tree.map(lambda leaf: leaf[order], experts)
    found, found_drops = run(case.execution, x, Routing(jnp.argsort(order)[chosen], weights), moved, mask)
    expected, drops = run(case.execution, x, Routing(chosen, weights), experts, mask)
    assert_close(found, expected)
    assert found_drops == drops and drops > 0


class Identity(OnOneDevice):
    num_experts: int = eqx.field(static=True)

    def __call__(self, x, linear):
        return linear(x, jnp.broadcast_to(jnp.eye(x.shape[-1]), (self.num_experts, x.shape[-1], x.shape[-1])))


@pytest.mark.parametrize("execution", [Dense(), Grouped(), Capacity(0.5, "residual"), Capacity(99.0)], ids=repr)
def test_a_tokens_weights_sum_to_what_the_router_says(execution):
    """Experts that do nothing give back the input times that sum; so does a dropped pair that stands for one."""
    case, x, weights, _, chosen, mask = case_and_inputs()
    y, _ = run(execution, x, Routing(chosen, weights), Identity(case.experts), mask)
    assert_close(y, weights.sum(axis=-1, keepdims=True) * x)


def test_a_dropped_pair_adds_nothing_and_the_kept_weights_stay():
    case, x, weights, _, chosen, mask = case_and_inputs(execution=Capacity(0.5, "zero"))
    y, drops = run(case.execution, x, Routing(chosen, weights), Identity(case.experts), mask)
    kept = kept_by(case, np.asarray(chosen), np.asarray(mask))
    assert_close(y, np.where(kept, weights, 0).sum(axis=-1, keepdims=True) * x)
    assert drops == (~kept).sum() > 0


def test_half_precision_keeps_its_dtype_and_sums_in_that_of_the_weights():
    case, x, weights, experts, chosen, mask = case_and_inputs()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), experts)
    y, _ = run(case.execution, jnp.asarray(x, jnp.bfloat16), Routing(chosen, weights), half, mask)
    full, _ = run(case.execution, x, Routing(chosen, weights), experts, mask)
    assert y.dtype == jnp.bfloat16
    assert np.abs(y.astype(jnp.float32) - full).max() < 0.03 * np.abs(full).max()


def test_bad_options():
    for factor in (0, -1.5, math.nan, math.inf, True):
        with pytest.raises(ValueError, match=rf"`factor` must be in \(0, inf\).*got {factor}"):
            Capacity(factor)
    with pytest.raises(ValueError, match=r"\['zero', 'residual'\]; got 'norm'"):
        Capacity(dropped="norm")
    assert eqx_moe.execution.resolve("capacity") == Capacity(1.25, "zero")
