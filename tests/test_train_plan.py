"""`plan_step` beside what XLA makes of the step that it plans."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import equinox as eqx
import jax
import meshes
import pytest
from jax.sharding import AbstractMesh, AxisType
from test_family_configs import PUBLISHED

import eqx_moe
from eqx_moe.checkpoint.names import leaf_paths, replace_leaves
from eqx_moe.models import parse_config, skeleton
from eqx_moe.sharding import like_weights, rows_sharding
from eqx_moe.train import StepPlan, adamw, plan_step
from eqx_moe.train.loop import update

OPTIMIZER = adamw(1e-4, 10)


def planned(config, shape, rows: int, length: int) -> StepPlan:
    mesh = AbstractMesh(tuple(shape), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    return plan_step(skeleton(config), mesh, rows=rows, length=length, optimizer=OPTIMIZER)


def compiled(config, shape, rows: int, length: int):
    """The step that `fit` would run, compiled ahead of time from shapes."""
    mesh = meshes.mesh(tuple(shape))
    model = eqx.filter_eval_shape(lambda m: eqx_moe.stack(m, rematerialise=True), skeleton(config, mesh=mesh))
    plan = eqx_moe.plan_sharding(model, mesh)

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    model = replace_leaves(model, {path: place(leaf, plan[path].sharding) for path, leaf in leaf_paths(model).items()})
    state = jax.eval_shape(OPTIMIZER.init, model)
    state = jax.tree.map(place, state, like_weights(state, plan))
    batch = jax.tree.map(lambda leaf: place(leaf, rows_sharding(model.mesh, rows)), meshes.batch(rows, length))

    def step(model, state, batch):
        return update(OPTIMIZER, model, state, batch)

    return jax.jit(step, donate_argnums=(0, 1)).lower(model, state, batch).compile()


# --- What a compiled program sends -----------------------------------------------------------------------------------

_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
_OP = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter)\(.*?replica_groups="
    r"(?:\{\{([\d,]+)\}.*?|\[\d+,(\d+)\]\S*|mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}), "
)


def sent(program: str) -> dict[str, float]:
    """Bytes that each device sends around rings, by the kind of collective; loops are counted by their trips."""
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = head[2]
            lines[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            lines[name].append(line)
    total = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter"), 0.0)

    def visit(name: str, times: int) -> None:
        for line in lines.get(name, ()):
            if found := _OP.search(line):
                total[found[2]] += times * _sent(found)
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for key, other in re.findall(r"(body|true_computation|false_computation)=%?([\w.\-]+)", line):
                visit(other, times * int(trips[1]) if trips and key == "body" else times)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                for other in branches[1].split(","):
                    visit(other.strip().lstrip("%"), times)
            if " call(" in line:
                visit(re.search(r"to_apply=%?([\w.\-]+)", line)[1], times)

    visit(entry, 1)
    return total


def _sent(found: re.Match) -> float:
    size = 0
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
        count = 1
        for dimension in filter(None, shape.split(",")):
            count *= int(dimension)
        size += count * _BYTES[dtype]
    if found[3]:
        ways = found[3].count(",") + 1
    elif found[4]:
        ways = int(found[4])
    else:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[5]))
        ways = 1
        for axis in re.findall(r"'(\w+)'", found[6]):
            ways *= int(sizes[axis])
    return size * {"all-reduce": 2 / ways, "all-gather": 1 / ways, "reduce-scatter": 1}[found[2]] * (ways - 1)


def compare(config, shape, rows: int, length: int) -> dict[str, float]:
    plan, program = planned(config, shape, rows, length), compiled(config, shape, rows, length)
    memory = program.memory_analysis()
    return {
        "arguments": plan.arguments - memory.argument_size_in_bytes,
        "temporaries": plan.temporaries / memory.temp_size_in_bytes,
        "sent": sum(plan.sent.values()) / sum(sent(program.as_text()).values()),
    }


# --- Tests -----------------------------------------------------------------------------------------------------------

# Wide enough that what the plan leaves out (masks, indices, tables) is small beside what it counts.
WIDE = dict(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_local_experts=8,
)


# As deep and wide, of the other sparse families: a window on every second layer, biases and sinks; and dense layers
# before the sparse ones, latents of queries and of keys and values, shared experts.
_WIDE = dict(vocab_size=1024, hidden_size=512, num_hidden_layers=10, num_attention_heads=8, num_experts_per_tok=4)
FAMILIES = {
    "gpt_oss": eqx_moe.GptOssConfig(
        **_WIDE, intermediate_size=512, num_key_value_heads=4, head_dim=64, num_local_experts=16, sliding_window=64
    ),
    "deepseek_v3": eqx_moe.DeepseekV3Config(
        **_WIDE, num_key_value_heads=8, intermediate_size=1408, first_k_dense_replace=3, moe_intermediate_size=256,
        n_routed_experts=32, n_group=4, topk_group=2, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64,
    ),
    "qwen3_moe": eqx_moe.Qwen3MoeConfig(
        **_WIDE, num_key_value_heads=4, head_dim=64, intermediate_size=1408, decoder_sparse_step=2,
        moe_intermediate_size=256, num_experts=32,
    ),
    "olmoe": eqx_moe.OlmoeConfig(
        **_WIDE, num_key_value_heads=8, intermediate_size=256, num_experts=32, eos_token_id=2, pad_token_id=0
    ),
}  # fmt: skip
# One wide dense layer, which no scan runs: nothing of it is computed again.
FAMILIES["kimi_k2"] = dataclasses.replace(FAMILIES["deepseek_v3"], first_k_dense_replace=1, intermediate_size=4096)


def check(found: dict[str, float]):
    print(found)
    assert found["arguments"] == 0
    assert 0.75 < found["temporaries"] < 1.25, found
    assert 0.75 < found["sent"] < 1.25, found


def config_of(kind: str, sizes: dict):
    config = getattr(eqx_moe, kind)
    return config(**{name: sizes[name] for name in sizes.keys() & {field.name for field in dataclasses.fields(config)}})


@pytest.mark.parametrize(
    ("kind", "shape", "rows"),
    [("MixtralConfig", (2, 2, 2), 8), ("MixtralConfig", (1, 8, 1), 16), ("LlamaConfig", (4, 1, 2), 24)],
)
def test_plan_on_8_devices(kind, shape, rows):
    check(compare(config_of(kind, WIDE), shape, rows, 256))


@pytest.mark.parametrize(
    ("family", "shape", "rows"),
    [
        ("gpt_oss", (2, 2, 2), 8),
        ("deepseek_v3", (1, 8, 1), 16),
        pytest.param("kimi_k2", (4, 2, 1), 64, marks=pytest.mark.full),
        *(
            pytest.param(family, shape, rows, marks=pytest.mark.full)
            for family in ("gpt_oss", "deepseek_v3", "qwen3_moe", "olmoe")
            for shape, rows in (((2, 2, 2), 8), ((1, 8, 1), 16), ((4, 2, 1), 16))
        ),
    ],
)
def test_plan_of_each_sparse_family(family, shape, rows):
    check(compare(FAMILIES[family], shape, rows, 256))


def test_weights_are_those_of_the_sharding():
    plan = planned(meshes.MIXTRAL, (2, 4, 1), 24, 16)
    assert plan.weights == plan.gradients == plan.sharding.bytes_per_device
    # Two moments and two counters.
    assert plan.optimizer == 2 * plan.weights + 8
    assert plan.batch == 3 * 4 * (24 // 8) * 16
    text = str(plan)
    for number in (plan.weights, plan.kept, plan.working, plan.arguments + plan.temporaries, *plan.sent.values()):
        assert f"{number:,}" in text


def test_more_devices_hold_less():
    few, many = (planned(meshes.MIXTRAL, shape, 32, 64) for shape in ((2, 2, 1), (2, 4, 2)))
    assert many.weights < few.weights and many.kept < few.kept and many.working < few.working
    assert few.sent["to add activations along tensor"] == 0 < many.sent["to add activations along tensor"]


def test_a_stacked_model_is_planned_as_its_layers():
    config = dataclasses.replace(meshes.MIXTRAL, num_hidden_layers=2)
    mesh = AbstractMesh((2, 2, 2), meshes.AXES)
    stacked = eqx.filter_eval_shape(eqx_moe.stack, skeleton(config))
    assert plan_step(stacked, mesh, rows=8, length=16, optimizer=OPTIMIZER) == planned(config, (2, 2, 2), 8, 16)


@pytest.mark.parametrize(("rows", "length"), [(0, 16), (-8, 16), (8, 0)])
def test_a_batch_has_tokens(rows, length):
    with pytest.raises(ValueError, match=f"{rows=} and {length=}"):
        planned(meshes.MIXTRAL, (2, 2, 2), rows, length)


def test_one_device_sends_nothing():
    assert set(planned(meshes.MIXTRAL, (1, 1, 1), 5, 64).sent.values()) == {0}


# Mixtral-8x22B, and a dense model of its size.
LARGE = dict(
    vocab_size=32000,
    hidden_size=6144,
    intermediate_size=16384,
    num_hidden_layers=56,
    num_attention_heads=48,
    num_key_value_heads=8,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=65536,
)


def released(name: str):
    """The config of a model as it was published."""
    return parse_config(PUBLISHED[name][0], "config.json")


def check_on_64_devices(config: str, shape, rows: int, length: int):
    code = f"import json, test_train_plan as t; print(json.dumps(t.compare(t.{config}, {shape}, {rows}, {length})))"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "64", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(config, shape, rows, length)
    check(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "shape", "rows", "length"),
    [
        ("MixtralConfig", (8, 8, 1), 64, 2048),
        ("MixtralConfig", (8, 8, 1), 64, 512),
        ("MixtralConfig", (4, 4, 4), 64, 1024),
        ("MixtralConfig", (8, 1, 8), 64, 2048),
        ("MixtralConfig", (1, 8, 8), 16, 1024),
        ("MixtralConfig", (64, 1, 1), 64, 1024),
        ("LlamaConfig", (8, 1, 8), 64, 2048),
        ("LlamaConfig", (64, 1, 1), 128, 1024),
    ],
)
def test_plan_on_64_devices(kind, shape, rows, length):
    check_on_64_devices(f"config_of({kind!r}, t.LARGE)", shape, rows, length)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "shape", "rows", "length"),
    [
        ("DeepSeek-V3", (8, 8, 1), 64, 2048),
        ("DeepSeek-V3", (4, 4, 4), 64, 1024),
        ("DeepSeek-V3", (1, 64, 1), 64, 1024),
        ("DeepSeek-V3", (64, 1, 1), 64, 1024),
        ("gpt-oss-120b", (8, 8, 1), 64, 2048),
        ("gpt-oss-120b", (4, 4, 4), 64, 1024),
        ("gpt-oss-120b", (1, 8, 8), 16, 1024),
        ("gpt-oss-120b", (64, 1, 1), 64, 1024),
        ("Qwen3-30B-A3B", (8, 8, 1), 64, 2048),
    ],
)
def test_plan_of_released_models_on_64_devices(name, shape, rows, length):
    check_on_64_devices(f"released({name!r})", shape, rows, length)
