"""Experts spread over simulated devices, against the dense oracle on one."""

import collections
import dataclasses
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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from weights import draw_experts

from eqx_moe.execution import (
    AbstractExecution,
    Capacity,
    Dense,
    ExpertParallel,
    Grouped,
    Routing,
    expert_parallel,
    resolve,
    save_collectives,
)
from eqx_moe.execution.exchange import departures, ragged, seat_of, seats
from eqx_moe.execution.layout import Layout
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.gating import ClampedSwiGLU
from eqx_moe.sharding import AXES

EXPERTS, HIDDEN, FFN, K = 16, 24, 40, 3
MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 2, 4)]
# All shapes (data, expert, tensor) of 8 devices and fewer.
ALL_MESHES = [(d, e, t) for d in (1, 2, 4, 8) for e in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * e * t <= 8]
# (batch, seq): `expert` splits the batch on every mesh; the sequence, where it does not divide the batch; nothing does.
ALL, SEQ, NOTHING = (8, 32), (6, 16), (3, 5)

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; on a CPU, JAX_NUM_CPU_DEVICES=8")


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...] = AXES) -> Mesh:
    return jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))])


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of a block, and the cotangent of its output."""

    x: jax.Array
    routing: Routing
    mask: jax.Array
    dy: jax.Array


def make_case(kind: str, shape: tuple[int, int], seed: int = 0, experts: int = EXPERTS, k: int = K) -> Case:
    """Routing at random, or all tokens to the same experts (on one device, if it holds so many), or much padding."""
    random = np.random.default_rng(seed)
    x, dy = random.normal(size=(2, *shape, HIDDEN)).astype(np.float32)
    if kind == "same":
        chosen = np.tile(random.permutation(2) + 2 * random.integers(0, EXPERTS // 2), (*shape, 1))
        chosen = np.concatenate([chosen, (chosen[..., :1] + 5) % EXPERTS], axis=-1)
    else:
        chosen = np.argsort(random.random((*shape, experts)), axis=-1)[..., :k]
    mask = random.random(shape) < (0.4 if kind == "padding" else 1.0)
    chosen = np.where(mask[..., None], chosen, experts).astype(np.int32)
    weights = random.normal(size=(*shape, k)).astype(np.float32)
    return Case(jnp.asarray(x), Routing(jnp.asarray(chosen), jnp.asarray(weights)), jnp.asarray(mask), jnp.asarray(dy))


def skewed(case: Case, count: int, skew: float, real: float, random: np.random.Generator) -> Case:
    """The case with choices among `count` experts of any popularity, and about the part `real` of its tokens real."""
    tokens, k = case.mask.shape, case.routing.weights.shape[-1]
    chosen = np.argsort(random.random((*tokens, count)) + skew * random.random(count), axis=-1)[..., :k]
    mask = random.random(tokens) < real
    routing = Routing(jnp.asarray(np.where(mask[..., None], chosen, count), jnp.int32), case.routing.weights)
    return dataclasses.replace(case, routing=routing, mask=jnp.asarray(mask))


def make_experts(dtype: str = "float32") -> Experts:
    return draw_experts(EXPERTS, HIDDEN, FFN, dtype=dtype)


@eqx.filter_jit
def run(execution, x, routing, mask, dy, experts):
    """The output, the gradients of x, the routing's weights and the experts, and the drops."""

    def value(x, weights, experts):
        y, drops = execution(x, Routing(routing.experts, weights), experts, mask)
        return jnp.sum(y * dy), (y, drops)

    grads, (y, drops) = jax.grad(value, (0, 1, 2), has_aux=True)(x, routing.weights, experts)
    return (y, *jax.tree.leaves(grads)), drops


def assert_equal(found, expected):
    for ours, theirs in zip(jax.device_get(found), jax.device_get(expected), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def check(execution, shape, kinds=("random", "same", "padding"), experts=None):
    experts = make_experts() if experts is None else experts
    for seed, kind in enumerate(kinds):
        case = make_case(kind, shape, seed)
        inputs = (case.x, case.routing, case.mask, case.dy, experts)
        (found, drops), (expected, _) = run(execution, *inputs), run(Dense(), *inputs)
        assert_equal(found, expected)
        assert drops == 0


@pytest.fixture(params=["ring", "all_to_all", "ragged_all_to_all"])
def method(request, monkeypatch):
    """Every method; the one that XLA lacks on CPU with a stand-in for the collective."""
    if request.param == "ragged_all_to_all":
        monkeypatch.setattr(expert_parallel, "_WITHOUT_RAGGED", ())
        monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged_all_to_all)
        eqx.clear_caches()
    return request.param


def emulated_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What JAX's documentation says that the collective does, by gathering all that there is."""
    gather = functools.partial(lax.all_gather, axis_name=axis_name)
    operands, starts, sizes, places = (gather(each) for each in (operand, input_offsets, send_sizes, output_offsets))
    me, row = lax.axis_index(axis_name), jnp.arange(len(output))
    for sender in range(lax.axis_size(axis_name)):
        place = row - places[sender, me]
        sent = operands[sender][jnp.clip(starts[sender, me] + place, 0, len(operand) - 1)]
        # If the two do not agree on a size, nothing comes.
        here = (place >= 0) & (place < recv_sizes[sender]) & (recv_sizes[sender] == sizes[sender, me])
        output = jnp.where(here.reshape(-1, *[1] * (output.ndim - 1)), sent, output)
    return output


@pytest.mark.parametrize(
    "mesh, shape, dropped",
    [
        ((2, 2, 2), ALL, "residual"),
        ((1, 4, 2), SEQ, "zero"),
        pytest.param((2, 2, 2), ALL, "zero", marks=pytest.mark.full),
        pytest.param((1, 4, 2), SEQ, "residual", marks=pytest.mark.full),
    ],
)
def test_capacity_on_a_mesh_drops_what_it_drops_on_one_device(mesh, shape, dropped):
    """A row is split over devices, its capacity is not; shards along `tensor` add what is left out once."""
    case = make_case("padding", shape)
    capacity, args = Capacity(0.6, dropped), (case.x, case.routing, case.mask, case.dy, make_experts())
    (found, drops), (expected, dropped_alone) = (
        run(execution, *args) for execution in (ExpertParallel(make_mesh(mesh), inner=capacity), capacity)
    )
    assert_equal(found, expected)
    assert drops == dropped_alone > 0


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_equals_dense_on_every_mesh(shape):
    check(ExpertParallel(make_mesh(shape)), ALL)


@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 2, 4)], ids=str)
def test_all_to_all_equals_dense(shape):
    check(ExpertParallel(make_mesh(shape), method="all_to_all"), ALL)


@pytest.mark.parametrize("name", ["ring", "all_to_all"])
@given(
    skew=st.sampled_from([0.0, 0.3, 3.0]), real=st.sampled_from([0.0, 0.1, 0.6, 1.0]), seed=st.integers(0, 2**31 - 1)
)
@settings(max_examples=12, deadline=None)
def test_any_routing_equals_dense(name, skew, real, seed):
    """Experts of any popularity, up to those that all tokens choose; rows of any padding, up to nothing else."""
    # A shape that is compiled for other tests too.
    case = skewed(make_case("random", ALL, seed % 100), EXPERTS, skew, real, np.random.default_rng(seed))
    inputs = (case.x, case.routing, case.mask, case.dy, make_experts())
    (found, drops), (expected, _) = run(ExpertParallel(make_mesh((2, 4, 1)), name), *inputs), run(Dense(), *inputs)
    assert_equal(found, expected)
    assert drops == 0


@pytest.mark.parametrize(
    ("name", "shape", "count", "k"),
    [
        # More choices than a device has experts, one choice, and many of many.
        ("ring", (1, 8, 1), 8, 5),
        ("all_to_all", (2, 4, 1), 4, 1),
        ("ring", (2, 2, 2), 64, 8),
        pytest.param("all_to_all", (1, 8, 1), 8, 5, marks=pytest.mark.full),
        pytest.param("all_to_all", (2, 4, 1), 64, 8, marks=pytest.mark.full),
        pytest.param("ring", (8, 1, 1), 1, 1, marks=pytest.mark.full),
    ],
)
def test_other_numbers_of_experts_and_choices(name, shape, count, k):
    execution, experts = ExpertParallel(make_mesh(shape), name), draw_experts(count, HIDDEN, FFN)
    for seed, kind in enumerate(("random", "padding")):
        case = make_case(kind, ALL, seed, count, k)
        inputs = (case.x, case.routing, case.mask, case.dy, experts)
        (found, drops), (expected, _) = run(execution, *inputs), run(Dense(), *inputs)
        assert_equal(found, expected)
        assert drops == 0


@pytest.mark.full
@pytest.mark.parametrize("tokens", [ALL, NOTHING, (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("shape", "count", "k"),
    [
        ((8, 1, 1), 1, 1),
        ((4, 2, 1), 2, 2),
        ((2, 4, 1), 4, 1),
        ((1, 8, 1), 8, 5),
        ((2, 2, 2), 24, 7),
        ((1, 8, 1), 64, 8),
    ],
    ids=str,
)
def test_any_routing_of_any_numbers_equals_dense(method, tokens, shape, count, k):
    execution, experts = ExpertParallel(make_mesh(shape), method), draw_experts(count, HIDDEN, FFN)
    for seed in range(12):
        random = np.random.default_rng(seed)
        skew, real = random.choice([0.0, 0.3, 3.0]), random.choice([0.1, 0.6, 1.0])
        case = skewed(make_case("random", tokens, seed, count, k), count, skew, real, random)
        inputs = (case.x, case.routing, case.mask)
        # The output as its own cotangent: of one token the gradient of the weight is one sum, which must not cancel.
        (y, *_), _ = run(Dense(), *inputs, case.dy, experts)
        (found, drops), (expected, _) = run(execution, *inputs, y, experts), run(Dense(), *inputs, y, experts)
        assert_equal(found, expected)
        assert drops == 0


@pytest.mark.full
@pytest.mark.parametrize("tokens", [ALL, SEQ], ids=str)
@pytest.mark.parametrize("shape", ALL_MESHES, ids=str)
def test_equals_dense_on_every_mesh_of_8_and_fewer(shape, tokens, method):
    check(ExpertParallel(make_mesh(shape), method=method), tokens)


def test_a_batch_that_expert_does_not_divide_is_split_along_the_sequence(method):
    check(ExpertParallel(make_mesh((2, 4, 1)), method=method), SEQ)


def test_tokens_that_nothing_divides_are_the_same_on_all_devices():
    check(ExpertParallel(make_mesh((2, 4, 1)), method="all_to_all"), NOTHING)


@pytest.mark.parametrize(
    ("shape", "tokens", "batch", "seq", "split"),
    [
        ((2, 4, 1), ALL, ("data", "expert"), (), 0),
        ((2, 4, 1), SEQ, ("data",), ("expert",), 1),
        ((4, 2, 1), SEQ, ("expert",), (), 0),
        ((2, 4, 1), NOTHING, (), (), None),
        ((8, 1, 1), ALL, ("data", "expert"), (), 0),
    ],
)
def test_no_device_does_what_another_does_if_tokens_divide(shape, tokens, batch, seq, split):
    layout = Layout.of(make_mesh(shape), *tokens, make_experts())
    assert (layout.tokens, layout.split) == (PartitionSpec(batch, seq), split)


def test_ffn_that_tensor_does_not_divide_is_repeated():
    # With biases, of which a device then has no share but all.
    experts = draw_experts(EXPERTS, HIDDEN, 30, gating=ClampedSwiGLU(1.3, 0.8))
    check(ExpertParallel(make_mesh((1, 2, 4))), ALL, experts=experts)


@pytest.mark.parametrize("names, shape", [(("data",), (4,)), (("expert",), (8,)), (("tensor", "expert"), (2, 4))])
def test_axes_that_a_mesh_lacks_or_has_in_another_order(names, shape):
    check(ExpertParallel(make_mesh(shape, names)), ALL, kinds=["random"])


def test_the_inner_execution_may_be_any():
    check(ExpertParallel(make_mesh((2, 2, 2)), inner=Dense()), ALL)


@pytest.mark.parametrize("context", [False, True], ids=["no context", "set_mesh"])
def test_explicit_axes(context):
    """`jax.make_mesh` makes Explicit axes by default; inputs may lie on such a mesh, and it may be the context's."""
    mesh = make_mesh((2, 2, 2))
    assert set(mesh.axis_types) == {AxisType.Explicit}
    case, experts = make_case("padding", ALL), make_experts()
    expected, _ = run(Dense(), case.x, case.routing, case.mask, case.dy, experts)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x, dy, routing, mask = jax.device_put((case.x, case.dy, case.routing, case.mask), rows)
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), experts, experts.partition("expert", None)
    )
    with jax.set_mesh(mesh) if context else jax.set_mesh(jax.sharding.get_mesh()):
        found, drops = run(ExpertParallel(mesh), x, routing, mask, dy, placed)
        assert_equal(found, expected)
    assert drops == 0


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 2, 2)], ids=str)
def test_biases_are_added_once(shape):
    experts = draw_experts(EXPERTS, HIDDEN, FFN, gating=ClampedSwiGLU(1.3, 0.8))
    check(ExpertParallel(make_mesh(shape)), ALL, experts=experts)


def test_bfloat16_stays_bfloat16():
    case, experts = make_case("random", ALL), make_experts("bfloat16")
    inputs = (case.x.astype(jnp.bfloat16), case.routing, case.mask, case.dy, experts)
    (found, _), (expected, _) = run(ExpertParallel(make_mesh((2, 2, 2))), *inputs), run(Dense(), *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
        assert np.abs(ours - theirs).max() <= 0.03 * np.abs(theirs).max()


def test_bad_meshes():
    with pytest.raises(ValueError, match=r"axes among \('data', 'expert', 'tensor'\); got \['pipe'\] among its 2 axes"):
        ExpertParallel(make_mesh((2, 4), ("data", "pipe")))
    case = make_case("random", ALL)
    experts = draw_experts(6, HIDDEN, FFN)
    with pytest.raises(ValueError, match="got 4 devices along it for 6 experts"):
        ExpertParallel(make_mesh((2, 4, 1)))(case.x, case.routing, experts, case.mask)


def test_names_with_a_mesh():
    mesh = make_mesh((2, 4, 1))
    assert resolve(None, mesh) == resolve("expert_parallel", mesh) == ExpertParallel(mesh)
    assert resolve("dense", mesh) == resolve(Dense(), mesh) == ExpertParallel(mesh, inner=Dense())
    assert hash(resolve("grouped", mesh)) == hash(ExpertParallel(mesh, inner=Grouped()))
    assert resolve(ExpertParallel(mesh), mesh) == resolve(ExpertParallel(mesh)) == ExpertParallel(mesh)
    with pytest.raises(ValueError, match="needs a `mesh`.*mesh=None"):
        resolve("expert_parallel")
    with pytest.raises(ValueError, match="the same mesh.*'data': 2, 'expert': 4.*'data': 4, 'expert': 2"):
        resolve(ExpertParallel(mesh), make_mesh((4, 2, 1)))
    with pytest.raises(ValueError, match="`inner` must be an execution for one device"):
        ExpertParallel(mesh, inner=ExpertParallel(mesh))


def test_names_of_methods_and_their_options():
    mesh = make_mesh((2, 4, 1))
    with pytest.raises(ValueError, match=r"\['ring', 'all_to_all', 'ragged_all_to_all'\]; got 'telepathy'"):
        ExpertParallel(mesh, method="telepathy")
    with pytest.raises(ValueError, match="does not exist on the platform of `mesh`, 'cpu'. Use 'ring' or"):
        ExpertParallel(mesh, method="ragged_all_to_all")
    for factor in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"`factor` must be in \(0, inf\).*got {factor}"):
            ExpertParallel(mesh, method="all_to_all", factor=factor)
    with pytest.raises(ValueError, match="got factor=1.5 with method='ring'"):
        ExpertParallel(mesh, factor=1.5)
    with pytest.raises(ValueError, match="looks at whole rows, which `method='all_to_all'` takes apart"):
        ExpertParallel(mesh, method="all_to_all", inner=Passes())


@dataclasses.dataclass(frozen=True)
class Passes(AbstractExecution):
    """Stands in for an execution that drops every pair and passes the block's input on instead; needs whole rows."""

    @property
    def by_row(self):
        return True

    def __call__(self, x, routing, experts, mask):
        assert routing.num_experts == EXPERTS
        real = routing.experts < experts.num_experts
        row = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1, keepdims=True)
        y = (x + row) * jnp.sum(jnp.where(real, routing.weights, 0), axis=-1, keepdims=True) / routing.shares
        return y, jnp.sum(real, dtype=jnp.int32)


@pytest.mark.parametrize("tokens", [ALL, SEQ, NOTHING], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 2)], ids=str)
def test_an_inner_execution_that_drops_and_looks_at_whole_rows(shape, tokens):
    """What it adds beside the experts' outputs is added once, and every drop counts once."""
    case = make_case("padding", tokens)
    inputs = (case.x, case.routing, case.mask, case.dy, make_experts())
    found, drops = run(ExpertParallel(make_mesh(shape), inner=Passes()), *inputs)
    x, mask, weights = (np.asarray(array) for array in (case.x, case.mask, case.routing.weights))
    row = np.where(mask[..., None], x, 0).sum(1, keepdims=True)
    expected = (x + row) * np.where(mask[..., None], weights, 0).sum(-1, keepdims=True)
    assert np.abs(found[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert drops == K * mask.sum()


@dataclasses.dataclass(frozen=True)
class PassesRows(AbstractExecution):
    """Stands in for an execution that drops all that it is told is no padding, and passes it on instead."""

    @property
    def by_row(self):
        return False

    def __call__(self, x, routing, experts, mask):
        return jnp.where(mask[..., None], x, jnp.nan) / routing.shares, jnp.sum(mask, dtype=jnp.int32)


def test_an_inner_execution_is_told_which_rows_came_for_its_experts():
    """Each pair of a token and an expert is one row on one device along `expert`; all else is room."""
    case, execution = make_case("padding", ALL), ExpertParallel(make_mesh((2, 2, 2)), "all_to_all", inner=PassesRows())
    found, rows = eqx.filter_jit(execution)(case.x, case.routing, make_experts(), case.mask)
    weights = jnp.where(case.mask[..., None], case.routing.weights, 0)
    assert_equal([found], [case.x * weights.sum(axis=-1, keepdims=True)])
    assert rows == K * case.mask.sum()


@pytest.mark.parametrize("shape", [(2, 2, 2)], ids=str)
def test_a_factor_drops_what_does_not_fit_and_counts_it(shape):
    """Each device keeps the first pairs for each receiver, first choices before second; the oracle is a loop."""
    data, devices, _ = shape
    factor = 0.8
    for seed, kind in enumerate(["random", "same", "padding"]):
        case, experts = make_case(kind, ALL, seed), make_experts()
        batch, seq = ALL
        rows = batch // (data * devices)
        capacity = -(-8 * rows * seq * K // (10 * devices))
        chosen, kept = np.asarray(case.routing.experts), []
        for part in chosen.reshape(-1, rows * seq, K):
            sent, keep = [0] * devices, np.full(part.shape, EXPERTS, np.int32)
            for choice in range(K):
                for token in range(len(part)):
                    to = part[token, choice] // (EXPERTS // devices)
                    if to < devices and sent[to] < capacity:
                        sent[to] += 1
                        keep[token, choice] = part[token, choice]
            kept.append(keep)
        kept = jnp.asarray(kept).reshape(batch, seq, K)
        execution = ExpertParallel(make_mesh(shape), method="all_to_all", factor=factor)
        found, drops = run(execution, case.x, case.routing, case.mask, case.dy, experts)
        expected, _ = run(Dense(), case.x, Routing(kept, case.routing.weights), case.mask, case.dy, experts)
        assert_equal(found, expected)
        dropped = np.sum((chosen < EXPERTS) & (np.asarray(kept) == EXPERTS))
        assert drops == dropped and (dropped > 0 or kind == "padding")


queues = st.sampled_from([1, 3]).flatmap(
    lambda devices: st.tuples(
        st.just(devices),
        st.lists(st.lists(st.integers(0, devices), min_size=7, max_size=7), min_size=devices, max_size=devices),
    )
)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _seats(to, devices: int, places: int):
    queue = departures(to, devices)
    return seats(queue, places), seat_of(queue, to, places)


@given(queues, st.sampled_from([1, 4, 9]))
@settings(max_examples=20, deadline=None)
def test_seats_by_hand(case, places):
    """Against a loop: the first of those who go to one device sit there, and the inverse finds them."""
    devices, lists = case
    (pair, taken), (at, seated) = jax.device_get(_seats(np.asarray(lists[0], np.int32), devices, places))
    for device in range(devices):
        first = [i for i, other in enumerate(lists[0]) if other == device][:places]
        assert pair[device][: len(first)].tolist() == first
        assert taken[device].tolist() == [True] * len(first) + [False] * (places - len(first))
        assert at[np.asarray(first, int)].tolist() == [device * places + i for i in range(len(first))]
    assert seated.sum() == taken.sum()


@given(queues)
@settings(max_examples=40, deadline=None)
def test_ragged_plans_bring_every_row_there_and_back(case):
    """A loop that follows the documentation of `jax.lax.ragged_all_to_all`, with rows that say who they are."""
    devices, lists = case
    queue = [departures(jnp.asarray(to), devices) for to in lists]
    counts = jnp.stack([each.counts for each in queue])
    plans = [jax.device_get(ragged(counts, me)) for me in range(devices)]

    def exchange(rows, way, room):
        out = [[None] * room for _ in range(devices)]
        for sender in range(devices):
            for receiver in range(devices):
                plan = plans[sender][way]
                start, size, at = (int(part[receiver]) for part in plan[:3])
                assert size == plans[receiver][way].recv_sizes[sender]
                assert out[receiver][at : at + size] == [None] * size, "rows overwrite each other"
                out[receiver][at : at + size] = rows[sender][start : start + size]
        return out

    rows = [[(me, int(pair)) for pair in each.order] for me, each in enumerate(queue)]
    arrived = exchange(rows, 0, 7 * devices)
    for me, each in enumerate(arrived):
        expected = [(s, pair) for s, to in enumerate(lists) for pair, device in enumerate(to) if device == me]
        assert each == expected + [None] * (len(each) - len(expected))
    for me, each in enumerate(exchange(arrived, 1, 7)):
        going = int(counts[me].sum())
        assert each == rows[me][:going] + [None] * (7 - going)


def count_collectives(function, *args) -> collections.Counter[str]:
    """How many collectives of each kind there are in the jaxpr with all that it calls."""
    jaxpr = str(jax.make_jaxpr(function)(*args))
    return collections.Counter(
        re.findall(r"\b(all_gather|reduce_scatter|all_to_all|ragged_all_to_all|psum)\w*\[", jaxpr)
    )


@pytest.mark.parametrize("method", ["ring", "all_to_all", "ragged_all_to_all"])
def test_rematerialisation_sends_nothing_twice(method, monkeypatch):
    monkeypatch.setattr(expert_parallel, "_WITHOUT_RAGGED", ())  # It is only traced.
    case, experts = make_case("random", ALL), make_experts()
    execution = ExpertParallel(make_mesh((2, 2, 2)), method=method)

    def block(x, weights, experts):
        y, _ = execution(jnp.sin(x), Routing(case.routing.experts, weights), experts, case.mask)
        return jnp.sin(x + y)

    def gradient(block):
        return jax.grad(lambda *args: jnp.sum(block(*args) * case.dy), (0, 1, 2))

    inputs = (case.x, case.routing.weights, experts)
    kept, again = jax.checkpoint(block, policy=save_collectives), jax.checkpoint(block)
    plain, sent, sent_again = (count_collectives(gradient(each), *inputs) for each in (block, kept, again))
    assert sent <= plain and plain.total() - plain["psum"] < sent_again.total() - sent_again["psum"]
    # Sums over `tensor` too. (In `plain` there is also that of the drops, which nobody reads.)
    assert sent["psum"] < sent_again["psum"]
    if method == "all_to_all":
        assert_equal(*(jax.tree.leaves(jax.jit(gradient(each))(*inputs)) for each in (kept, block)))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_ragged_all_to_all_lowers_where_it_exists(platform, monkeypatch):
    """The real collective and its gradient, for a platform that is not here."""
    monkeypatch.setattr(expert_parallel, "_WITHOUT_RAGGED", ())
    case, experts = make_case("random", ALL), make_experts()
    execution = ExpertParallel(make_mesh((2, 2, 2)), method="ragged_all_to_all")

    def value(x, experts):
        return jnp.sum(execution(x, case.routing, experts, case.mask)[0])

    lowered = jax.jit(jax.grad(value, (0, 1))).trace(case.x, experts).lower(lowering_platforms=(platform,))
    # Rows and their experts there; cotangents of the results there, of the rows back. Nobody needs the results.
    assert lowered.as_text().count("@ragged_all_to_all(") == 4
