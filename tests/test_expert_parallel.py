"""Experts spread over simulated devices, against the dense oracle on one."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eqx_moe.execution import Dense, ExpertParallel, Grouped, Routing, resolve
from eqx_moe.nn.experts import Experts
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


def make_case(kind: str, shape: tuple[int, int], seed: int = 0) -> Case:
    """Routing at random, or all tokens to the same experts (on one device, if it holds so many), or much padding."""
    random = np.random.default_rng(seed)
    x, dy = random.normal(size=(2, *shape, HIDDEN)).astype(np.float32)
    if kind == "same":
        chosen = np.tile(random.permutation(2) + 2 * random.integers(0, EXPERTS // 2), (*shape, 1))
        chosen = np.concatenate([chosen, (chosen[..., :1] + 5) % EXPERTS], axis=-1)
    else:
        chosen = np.argsort(random.random((*shape, EXPERTS)), axis=-1)[..., :K]
    mask = random.random(shape) < (0.4 if kind == "padding" else 1.0)
    chosen = np.where(mask[..., None], chosen, EXPERTS).astype(np.int32)
    weights = random.normal(size=(*shape, K)).astype(np.float32)
    return Case(jnp.asarray(x), Routing(jnp.asarray(chosen), jnp.asarray(weights)), jnp.asarray(mask), jnp.asarray(dy))


def make_experts(dtype: str = "float32") -> Experts:
    return Experts(EXPERTS, HIDDEN, FFN, std=0.5, dtype=dtype, key=jax.random.key(1))


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


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_equals_dense_on_every_mesh(shape):
    check(ExpertParallel(make_mesh(shape)), ALL)


@pytest.mark.full
@pytest.mark.parametrize("tokens", [ALL, SEQ, NOTHING], ids=str)
@pytest.mark.parametrize("shape", ALL_MESHES, ids=str)
def test_equals_dense_on_every_mesh_of_8_and_fewer(shape, tokens):
    check(ExpertParallel(make_mesh(shape)), tokens)


@pytest.mark.parametrize("tokens", [SEQ, NOTHING], ids=str)
def test_tokens_that_no_axis_divides(tokens):
    check(ExpertParallel(make_mesh((2, 4, 1))), tokens)


def test_ffn_that_tensor_does_not_divide_is_repeated():
    experts = Experts(EXPERTS, HIDDEN, 30, std=0.5, dtype="float32", key=jax.random.key(2))
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


class BiasedExperts(eqx.Module):
    """Like `Experts`, with biases: of the last product, which is added to the output, and of another."""

    stacks: Experts
    up_bias: jax.Array
    down_bias: jax.Array

    @property
    def num_experts(self):
        return self.stacks.num_experts

    def __call__(self, x, linear):
        hidden = linear(x, self.stacks.up, self.up_bias) * jax.nn.silu(linear(x, self.stacks.gate))
        return linear(hidden, self.stacks.down, self.down_bias)

    def partition(self, expert, tensor):
        specs = (
            self.stacks.partition(expert, tensor),
            PartitionSpec(expert, tensor),
            PartitionSpec(expert),
        )
        return eqx.tree_at(lambda e: (e.stacks, e.up_bias, e.down_bias), self, specs)

    def share(self, parts):
        return eqx.tree_at(lambda e: e.down_bias, self, self.down_bias / parts)


def test_biases_are_added_once():
    random = np.random.default_rng(3)
    biases = [jnp.asarray(random.normal(size=(EXPERTS, size)), jnp.float32) for size in (FFN, HIDDEN)]
    check(ExpertParallel(make_mesh((1, 2, 4))), ALL, experts=BiasedExperts(make_experts(), *biases))


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
    experts = Experts(6, HIDDEN, FFN, std=0.5, dtype="float32", key=jax.random.key(2))
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
    with pytest.raises(ValueError, match="`method` must be one of .*; got 'telepathy'"):
        ExpertParallel(mesh, method="telepathy")
    with pytest.raises(ValueError, match="`inner` must be an execution for one device"):
        ExpertParallel(mesh, inner=ExpertParallel(mesh))
