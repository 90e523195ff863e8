"""Whole programs compiled by XLA for TPUs that are not there: `pip install libtpu`, then `pytest -m full` of this file.

libtpu compiles for a topology by its name, on any x86-64 machine under Linux; nothing runs.
"""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import test_train_plan
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_expert_parallel import ALL, make_case, make_experts

import eqx_moe
from eqx_moe.execution import ExpertParallel
from eqx_moe.kernels.attention import attention
from eqx_moe.models import skeleton

pytestmark = pytest.mark.full

_SIZES = dict(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
)
CONFIGS = {
    "mixtral": eqx_moe.MixtralConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2),
    "gpt_oss": eqx_moe.GptOssConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2, sliding_window=128),
    "llama": eqx_moe.LlamaConfig(**_SIZES),
    "deepseek_v3": dataclasses.replace(meshes.FAMILIES["deepseek_v3"], hidden_size=512, max_position_embeddings=4096),
}


@pytest.fixture(scope="module")
def devices():
    """Eight chips of a TPU v5e."""
    pytest.importorskip("libtpu", reason="no libtpu to compile with")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        yield np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_step_of_training(devices, monkeypatch, family, shape):
    """Packed rows of 600 tokens; attention by the Pallas kernel forward and backward, experts by XLA's `ragged_dot`."""
    monkeypatch.setattr(meshes, "mesh", lambda shape: Mesh(devices.reshape(shape), meshes.AXES))
    text = test_train_plan.compiled(CONFIGS[family], shape, 16, 600).as_text()
    assert text.count("tpu_custom_call") >= 3
    assert ("ragged" in text) == (family != "llama")


# (batch, heads, kv_heads, seq, head_dim, value_dim, window, packed, sinks): those of released models, then odd ones.
ATTENTIONS = [
    (1, 32, 8, 4096, 128, 128, None, False, False),
    (1, 64, 8, 4096, 64, 64, 128, True, True),
    (1, 16, 16, 4096, 192, 128, None, True, False),
    (1, 32, 8, 32768, 128, 128, 4096, False, False),
    (2, 4, 2, 1000, 64, 64, None, True, False),
    (2, 4, 4, 300, 6, 10, 7, True, True),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("shape", ATTENTIONS)
def test_attention(devices, shape, dtype):
    batch, heads, kv_heads, seq, head_dim, value_dim, window, packed, sinks = shape
    place = NamedSharding(Mesh(devices[:1], ("data",)), PartitionSpec())
    given = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    segments = given((batch, seq), jnp.int32) if packed else None

    def total(q, k, v, sinks, segments):
        options = dict(scale=0.1, window=window, query_segments=segments, key_segments=segments, sinks=sinks)
        sharding = NamedSharding(place.mesh, PartitionSpec(None, None))
        return jnp.sum(attention(q, k, v, sharding=sharding, **options).astype(jnp.float32))

    sizes = (heads, seq, head_dim), (kv_heads, seq, head_dim), (kv_heads, seq, value_dim)
    arrays = (given((batch, *size), dtype) for size in sizes)
    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    compiled = step.lower(*arrays, given((heads,), dtype) if sinks else None, segments).compile()
    kernels = compiled.as_text().count("tpu_custom_call")
    assert kernels == 0 if dtype == "float16" else kernels >= 3


@pytest.mark.parametrize("method", ["ring", "all_to_all", "ragged_all_to_all"])
def test_every_exchange_of_tokens(devices, method):
    mesh = Mesh(devices.reshape(2, 4, 1), meshes.AXES)
    case, execution = make_case("random", ALL), ExpertParallel(mesh, method)
    arrays = shapes((case.x, case.routing, make_experts(), case.mask), mesh)

    def total(x, routing, experts, mask):
        return jnp.sum(execution(x, routing, experts, mask)[0])

    text = jax.jit(jax.grad(total, argnums=(0, 2))).lower(*arrays).compile().as_text()
    assert ("ragged-all-to-all" in text) == (method == "ragged_all_to_all")


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("family", CONFIGS)
def test_reading_into_a_cache(devices, family, tokens):
    """A prompt, and a token after it."""
    mesh = Mesh(devices.reshape(2, 2, 2), meshes.AXES)
    model = skeleton(CONFIGS[family], dtype="bfloat16", mesh=mesh)
    cache = eqx.filter_eval_shape(lambda model: model.init_cache(8, 640), model)
    given = shapes((model, jax.ShapeDtypeStruct((8, tokens), jnp.int32), cache), mesh)

    def step(model, ids, cache):
        out = model.forward(ids, cache=cache)
        return out.hidden, out.cache

    assert jax.jit(step).lower(*given).compile().memory_analysis() is not None


def shapes(tree, mesh: Mesh):
    """Arrays as shapes, whole on every device."""
    place = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)
