"""Models on a mesh: the plan, making, placing and running them. Eight simulated devices, see conftest.py."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_close, check_loss_and_gradients, placed_as_planned, value_and_grad
from weights import draw

import eqx_moe
from eqx_moe import sharding, train
from eqx_moe.checkpoint import leaf_paths
from eqx_moe.models import plan_sharding, skeleton

FAMILIES = {"mixtral": meshes.MIXTRAL, "llama": meshes.LLAMA}


@pytest.fixture(scope="module")
def on_one():
    """For each family: the model on one device, its loss and its gradients."""
    models = {name: draw(config, seed=3) for name, config in FAMILIES.items()}
    return {name: (model, *value_and_grad(model, meshes.batch())) for name, model in models.items()}


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- The plan --------------------------------------------------------------------------------------------------------


def test_every_weight_of_every_family_has_a_rule_and_every_rule_a_weight():
    used = set()
    assert {case.model_type for case in CASES} == eqx_moe.families().keys()
    for case in CASES:
        model = skeleton(case.parsed)
        plan_sharding(model, AbstractMesh((2,), ("data",)))
        for path in leaf_paths(model):
            used |= {rule for rule in sharding.RULES if path == rule or path.endswith("." + rule)}
    assert used == set(sharding.RULES)


def test_a_selection_bias_is_whole_everywhere():
    weights = {"layers.0.moe.router.selection_bias": jax.ShapeDtypeStruct((16,), "float32")}
    (placement,) = sharding.plan(weights, AbstractMesh((2, 4), ("data", "expert")), {}).values()
    assert placement.spec == P(None)


def test_a_weight_without_a_rule_is_an_error():
    weights = {"layers.0.mlp.gate.scale": jax.ShapeDtypeStruct((3,), "float32")}
    with pytest.raises(ValueError, match="No rule .* 'layers.0.mlp.gate.scale'"):
        sharding.plan(weights, AbstractMesh((2,), ("data",)), {})


@given(
    heads=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    group=st.sampled_from([1, 2, 3, 4]),
    head_dim=st.sampled_from([2, 6, 16]),
    tensor=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_no_head_is_ever_split(heads, group, head_dim, tensor):
    config = dataclasses.replace(
        meshes.LLAMA, num_attention_heads=heads * group, num_key_value_heads=heads, head_dim=head_dim
    )
    plan = plan_sharding(skeleton(config), AbstractMesh((tensor,), ("tensor",)))
    for part, count, axis in (("q", heads * group, 0), ("k", heads, 0), ("v", heads, 0), ("o", heads * group, 1)):
        placement = plan[f"layers.0.attention.{part}.weight"]
        here = placement.sharding.shard_shape(placement.shape)[axis]
        assert here == (count // tensor if count % tensor == 0 else count) * head_dim
        assert placement.notes == (() if count % tensor == 0 else (f"tensor={tensor} does not divide {count} heads",))


def test_the_plan_of_a_large_model_needs_no_device():
    config = eqx_moe.MixtralConfig(hidden_size=6144, intermediate_size=16384, num_hidden_layers=56)
    config = dataclasses.replace(config, num_attention_heads=48, vocab_size=32768)
    plan = plan_sharding(skeleton(config, dtype="bfloat16"), AbstractMesh((8, 8, 4), sharding.AXES))
    assert plan["layers.55.moe.experts.gate"].spec == P("expert", "tensor", "data")
    assert plan.total_bytes == 2 * 140_630_071_296
    # Experts are split 256 ways, other matrices 32 ways (routers 8 ways), norms not at all.
    experts, attention = 56 * 3 * 8 * 6144 * 16384, 56 * 2 * (48 + 8) * 128 * 6144
    norms, routers, vocabulary = 113 * 6144, 56 * 8 * 6144, 2 * 32768 * 6144
    expected = experts // 256 + (attention + vocabulary) // 32 + routers // 8 + norms
    assert plan.bytes_per_device == 2 * expected


def test_the_table():
    plan = plan_sharding(skeleton(meshes.MIXTRAL), AbstractMesh((2, 8, 4), sharding.AXES))
    lines = str(plan).splitlines()
    assert lines[0] == "mesh: data=2, expert=8, tensor=4"
    (gate,) = [line for line in lines if "experts.gate" in line]
    assert re.split("  +", gate) == [
        "layers.*.moe.experts.gate", "16 x 40 x 32", "float32", "expert, tensor, data", f"{2 * 10 * 16 * 4:,}"
    ]  # fmt: skip
    (k,) = [line for line in lines if ".k.weight" in line]
    assert k.endswith("tensor=4 does not divide 2 heads")
    assert f"{plan.bytes_per_device:,}" in lines[-1] and f"{plan.total_bytes:,}" in lines[-1]


def test_layers_that_are_stacked_stay_whole_along_the_stack():
    weights = {"layers.0.moe.experts.gate": jax.ShapeDtypeStruct((24, 16, 40, 32), "bfloat16")}
    plan = sharding.plan(weights, AbstractMesh((2, 4, 2), sharding.AXES), {})
    assert plan["layers.0.moe.experts.gate"].spec == P(None, "expert", "tensor", "data")


def test_bad_meshes(tmp_path):
    odd = dataclasses.replace(meshes.MIXTRAL, num_local_experts=6)
    model = draw(odd)
    eqx_moe.save_pretrained(model, tmp_path)
    wrong = {
        r"divides the number of experts; got 4 devices along it for 6 experts": meshes.mesh((4,), ("expert",)),
        r"axes among \('data', 'expert', 'tensor'\); got \['model'\] among its 2 axes": meshes.mesh(
            (2, 4), ("data", "model")
        ),
    }
    for message, mesh in wrong.items():
        for build in (
            lambda mesh=mesh: eqx_moe.init(odd, key=jax.random.key(0), mesh=mesh),
            lambda mesh=mesh: eqx_moe.with_options(model, mesh=mesh),
            lambda mesh=mesh: eqx_moe.from_pretrained(tmp_path, mesh=mesh),
            lambda mesh=mesh: plan_sharding(model, mesh),
        ):
            with pytest.raises(ValueError, match=message):
                build()


# --- Making and placing ----------------------------------------------------------------------------------------------


def test_init_on_a_mesh_is_init():
    model = eqx_moe.init(meshes.MIXTRAL, key=jax.random.key(3), mesh=meshes.mesh((2, 2, 2)))
    assert same(model, eqx_moe.init(meshes.MIXTRAL, key=jax.random.key(3))) and placed_as_planned(model)
    gate = model.layers[0].moe.experts.gate
    assert {shard.data.shape for shard in gate.addressable_shards} == {(8, 20, 16)}


def test_with_options_moves_a_model(on_one):
    one = on_one["mixtral"][0]
    spread = eqx_moe.with_options(one, mesh=meshes.mesh((2, 4), ("expert", "tensor")))
    assert same(spread, one) and placed_as_planned(spread)
    moved = eqx_moe.with_options(spread, mesh=meshes.mesh((8,), ("data",)))
    assert same(moved, one) and placed_as_planned(moved)
    kept = eqx_moe.with_options(moved, execution="dense")
    assert kept.mesh == moved.mesh and placed_as_planned(kept)
    back = eqx_moe.with_options(moved, mesh=meshes.mesh((1,), ("data",)))
    assert same(back, one) and back.embed.weight.devices() == {jax.devices()[0]}


# --- Running ---------------------------------------------------------------------------------------------------------

SHAPES = [
    *meshes.OVER_8[1:6],  # The first is that of the contract suite.
    *(pytest.param(shape, marks=pytest.mark.full) for shape in meshes.OVER_8[6:]),
]


def name(shape) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_on_8_devices(on_one, family, shape):
    check_loss_and_gradients(on_one[family], meshes.mesh(shape))


@pytest.mark.parametrize(
    "shape,names",
    [
        ((2,), ("expert",)),
        ((2, 2), ("tensor", "data")),  # In an order of the user's own.
        *(pytest.param((2,), (axis,), marks=pytest.mark.full) for axis in ("data", "tensor")),
        *(pytest.param((4,), (axis,), marks=pytest.mark.full) for axis in meshes.AXES),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_on_fewer_devices(on_one, family, shape, names):
    check_loss_and_gradients(on_one[family], meshes.mesh(shape, names))


@pytest.mark.full
@pytest.mark.parametrize("rows", [1, 5, 6, 12])
def test_rows_that_the_mesh_does_not_divide(on_one, rows):
    one, batch = on_one["mixtral"][0], meshes.batch(rows=rows)
    model = eqx_moe.with_options(one, mesh=meshes.mesh((2, 4), ("data", "expert")))
    (expected, gradients), (found, found_gradients) = (value_and_grad(m, batch) for m in (one, model))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert_close(found_gradients, gradients)


@pytest.mark.full
@pytest.mark.parametrize("execution", ["dense", "grouped"])
def test_jitter_and_other_executions(execution):
    """The noise is the same however the rows are spread."""
    config = dataclasses.replace(meshes.MIXTRAL, router_jitter_noise=0.3)
    one = eqx_moe.init(config, key=jax.random.key(3), execution=execution)
    model = eqx_moe.with_options(one, mesh=meshes.mesh((2, 2, 2)), execution=execution)
    key = jax.random.key(7)
    (expected, gradients), (found, found_gradients) = (value_and_grad(m, meshes.batch(), key) for m in (one, model))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert_close(found_gradients, gradients)
    step = train.make_step(train.adamw(1e-2, 3))
    metrics = step(model, train.init_optimizer(train.adamw(1e-2, 3), model), meshes.batch(), key)[2]
    np.testing.assert_allclose(metrics["loss"], expected[0], rtol=1e-6)


def test_what_fsdp_moves_are_weights(on_one):
    """Along `data` alone, the forward pass gathers each matrix once, and moves nothing else but a few numbers."""
    model = eqx_moe.with_options(on_one["llama"][0], mesh=meshes.mesh((8,), ("data",)))
    arrays, static = eqx.partition(model, eqx.is_array)
    batch = sharding.put(meshes.batch(), model.mesh, rows=True)
    compiled = jax.jit(lambda arrays: train.loss(eqx.combine(arrays, static), batch)[0]).lower(arrays).compile()
    moved = [(kind, [int(n) for n in shape.split(",") if n]) for shape, kind in re.findall(
        r"= \w+\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )]  # fmt: skip
    gathered = sorted(sorted(shape) for kind, shape in moved if kind == "all-gather")
    matrices = sorted(sorted(x.shape) for x in jax.tree.leaves(arrays) if x.ndim == 2)
    assert gathered in (matrices, sorted([*matrices, [32, 56]]))  # The embedding is tied: once or twice.
    assert all(kind in ("all-gather", "all-reduce") for kind, _ in moved)
    assert all(np.prod(shape, dtype=int) <= 1 for kind, shape in moved if kind == "all-reduce")


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((4, 1, 2), marks=pytest.mark.full)], ids=name)
def test_greedy_generation_is_one_devices(on_one, shape):
    one = on_one["mixtral"][0]
    model = eqx_moe.with_options(one, mesh=meshes.mesh(shape))
    prompts = [[3, 1, 4, 1], [5, 9], [2, 6, 5], [35, 8, 9, 7, 9]]
    expected = eqx_moe.generate(one, prompts, 9, eos_ids=[])
    assert eqx_moe.generate(model, prompts, 9, eos_ids=[]) == expected
    assert list(eqx_moe.stream(model, prompts[1], 9, eos_ids=[])) == expected[1]


def test_a_model_on_a_mesh_is_not_mapped_over_rows(on_one):
    model = eqx_moe.with_options(on_one["llama"][0], mesh=meshes.mesh((2,), ("data",)))
    for run in (eqx.filter_vmap(model), eqx.filter_jit(eqx.filter_vmap(model)), eqx.filter_vmap(eqx.filter_jit(model))):
        with pytest.raises(ValueError, match="cannot run under `vmap` .here over 24 rows.*as a batch"):
            run(meshes.batch().tokens)


def test_explicit_meshes_become_auto_and_explicit_surroundings_are_refused():
    mesh = meshes.mesh((2,), ("data",), explicit=True)
    model = eqx_moe.init(meshes.LLAMA, key=jax.random.key(0), mesh=mesh)
    assert set(model.mesh.axis_types) == {AxisType.Auto} and placed_as_planned(model)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="`jax.set_mesh` has set Explicit"):
        model(meshes.batch().tokens)


# --- Training --------------------------------------------------------------------------------------------------------


def test_training_on_a_mesh_is_training():
    # Not Adam: it divides gradients by their size, and where they are all but zero that shows rounding.
    one, optimizer = draw(dataclasses.replace(meshes.LLAMA, num_hidden_layers=2)), optax.sgd(0.1, momentum=0.9)
    model = eqx_moe.with_options(one, mesh=meshes.mesh((2, 2, 2)))
    (expected, history), (found, found_history) = (
        train.fit(start, iter([meshes.batch(seed=i) for i in range(3)]), steps=3, optimizer=optimizer)
        for start in (one, model)
    )
    for a, b in zip(found_history, history, strict=True):
        np.testing.assert_allclose([a[k] for k in b], list(b.values()), rtol=1e-4)
    assert_close(found, expected)
    assert placed_as_planned(found) and same(model, one) and len(found.layers) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gradients_on_a_mesh(on_one, family):
    """Near those in float32, in a dense model; in the other, rounding may choose another expert."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), on_one[family][0])
    _, found = value_and_grad(eqx_moe.with_options(half, mesh=meshes.mesh((2, 2, 2))), meshes.batch())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    if family == "llama":
        found = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)
        assert_close(found, on_one[family][2], most=0.05)


def test_the_optimizers_state_is_spread_like_its_weights_and_donated():
    optimizer = train.adamw(1e-2, 3)
    # Not the model of other tests: a step would take along what they share.
    model = eqx_moe.with_options(draw(meshes.MIXTRAL), mesh=meshes.mesh((2, 2, 2)))
    state = train.init_optimizer(optimizer, model)
    plan = plan_sharding(model, model.mesh)

    def check(state):
        moments = 0
        for path, leaf in leaf_paths(state).items():
            weight = next((weight for weight in plan if path.endswith("." + weight)), None)
            due = NamedSharding(plan.mesh, P()) if weight is None else plan[weight].sharding
            assert leaf.sharding.is_equivalent_to(due, leaf.ndim), path
            moments += weight is not None
        assert moments == 2 * len(plan)

    check(state)
    # On the device already, so that not the transfer but the step is looked at.
    given = sharding.put(meshes.batch(), model.mesh, rows=True)
    moved, new_state, metrics = train.make_step(optimizer)(model, state, given, None)
    check(new_state)
    assert placed_as_planned(moved) and bool(metrics["finite"])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((model, state)) if leaf.ndim > 0)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_evaluation_on_a_mesh(on_one):
    one = on_one["llama"][0]
    model = eqx_moe.with_options(one, mesh=meshes.mesh((4, 2), ("data", "tensor")))
    expected, found = (train.evaluate(m, [meshes.batch()]) for m in (one, model))
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-6)


def test_factored_optimizers_have_states_of_other_shapes(on_one):
    """Adafactor's rows and columns do not have their weight's shape: they are whole on every device."""
    model = eqx_moe.with_options(on_one["llama"][0], mesh=meshes.mesh((2,), ("data",)))
    state = train.init_optimizer(optax.adafactor(1e-3, min_dim_size_to_factor=8), model)
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(state))
