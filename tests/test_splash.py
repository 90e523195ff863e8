"""Attention by the kernel for TPUs: run by Pallas' interpreter beside the oracle, and lowered for a TPU."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import test_attention
from jax.sharding import NamedSharding, PartitionSpec
from weights import draw

from eqx_moe import train
from eqx_moe.kernels import attention as dispatch
from eqx_moe.kernels import splash
from eqx_moe.kernels.attention import attention, attention_oracle, choose
from eqx_moe.kernels.flash import CHUNK
from eqx_moe.kernels.splash import splash_attention
from eqx_moe.models import with_options
from eqx_moe.sharding import check_mesh

# (batch, heads, kv_heads, seq, head_dim, value_dim, window, segments, sinks): one block, several blocks, lengths that
# are no multiple of one; heads alone, grouped, and sharing one key.
SHAPES = [
    (2, 4, 2, 130, 16, 16, None, False, False),
    (1, 6, 3, 300, 24, 24, None, True, True),
    (3, 2, 2, 257, 16, 8, 7, True, False),
    (1, 4, 1, 640, 8, 8, 200, False, True),
    (1, 3, 3, 200, 40, 40, 1, True, True),
]


def arrays(shape, seed=0):
    """q, k, v, sinks, the output's gradient, segments."""
    batch, heads, kv_heads, seq, head_dim, value_dim, _, segments, sinks = shape
    random = np.random.default_rng(seed)
    sizes = [(heads, seq, head_dim), (kv_heads, seq, head_dim), (kv_heads, seq, value_dim), (heads, seq, value_dim)]
    q, k, v, d_out = (random.normal(size=(batch, *size)).astype(np.float32) for size in sizes)
    found = random.normal(size=heads).astype(np.float32) * 3 if sinks else None
    # Packed rows with padding between and after: ids that come back are seen again.
    ids = np.repeat(random.permuted(np.tile([1, 2, 0, 1, 3], (batch, 1)), axis=1), -(-seq // 5), axis=1)[:, :seq]
    return q, k, v, found, d_out, ids.astype(np.int32) if segments else None


@functools.partial(jax.jit, static_argnames=("function", "window"))
def value_and_gradients(function, q, k, v, sinks, d_out, segments, window):
    def call(q, k, v, sinks):
        return function(
            q, k, v, sinks=sinks, scale=0.7, window=window, query_segments=segments, key_segments=segments
        )  # fmt: skip

    out, pull = jax.vjp(call, q, k, v, sinks)
    return out, *(x for x in pull(d_out) if x is not None)


assert_close = functools.partial(test_attention.assert_close, tolerance=2e-5)
interpreted = functools.partial(splash_attention, interpret=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_oracle(shape):
    inputs = arrays(shape)
    found = value_and_gradients(interpreted, *inputs, shape[6])
    assert_close(found, value_and_gradients(attention_oracle, *inputs, shape[6]))


def test_in_bfloat16():
    inputs = [x if x is None or x.dtype == np.int32 else jnp.asarray(x, jnp.bfloat16) for x in arrays(SHAPES[1])]
    found = value_and_gradients(interpreted, *inputs, None)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    exact = [x if x is None or x.dtype == np.int32 else np.asarray(x, np.float32) for x in inputs]
    found = [np.asarray(x, np.float32) for x in found]
    assert_close(found, value_and_gradients(attention_oracle, *exact, None), tolerance=0.04)


@pytest.mark.parametrize(
    "shape, mesh, rows, heads",
    [
        ((4, 6, 2, 135, 16, 8, None, True, True), (2, 2, 2), ("data", "expert"), "tensor"),
        ((4, 6, 2, 135, 16, 8, None, True, True), (2, 2, 2), "data", None),
        ((3, 8, 2, 135, 16, 8, 7, True, True), (2, 1, 4), None, "tensor"),  # each key for two devices
        ((1, 12, 3, 135, 16, 8, None, True, True), (2, 2, 2), None, "tensor"),  # two devices for three keys: twice each
        ((1, 3, 3, 135, 16, 8, None, True, True), (2, 2, 2), None, "tensor"),  # and not even that: whole
    ],
)
def test_rows_and_heads_may_lie_on_several_devices(shape, mesh, rows, heads):
    spread = functools.partial(interpreted, sharding=NamedSharding(meshes.mesh(mesh), PartitionSpec(rows, heads)))
    inputs = arrays(shape)
    assert_close(value_and_gradients(spread, *inputs, None), value_and_gradients(attention_oracle, *inputs, None))


def test_when_it_is_chosen():
    bf16 = jnp.bfloat16
    assert choose("tpu", 0.0, bf16, 4096, 4096, 128, plain=True, splash=True) == "splash"
    assert choose("tpu", 0.0, jnp.float32, 300, 300, 64, plain=False, splash=True) == "splash"  # packed, with sinks
    assert choose("tpu", 0.0, bf16, 4096, 8192, 128, plain=False, splash=False) == "flash"  # into a cache
    assert choose("tpu", 0.0, bf16, CHUNK, CHUNK, 128, plain=True, splash=True) == "dense"
    assert choose("tpu", 0.0, bf16, 1, 4096, 128, plain=False, splash=False) == "dense"


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_platform", lambda device: ("tpu", 0.0))


def test_a_machine_with_a_tpu_may_also_compute_on_its_cpu(as_on_a_tpu):
    inputs = arrays(SHAPES[1])
    found = value_and_gradients(on_one_device, *inputs, None)
    assert_close(found, value_and_gradients(attention_oracle, *inputs, None))


on_one_device = functools.partial(attention, sharding=NamedSharding(meshes.mesh((1, 1, 1)), PartitionSpec(None, None)))


def lowered(function, *inputs, window) -> str:
    lower = functools.partial(value_and_gradients, function, window=window)
    return jax.export.export(jax.jit(lower), platforms=["tpu"])(*inputs).mlir_module()


def test_what_the_kernel_cannot_do_is_left_to_the_portable_way(as_on_a_tpu):
    inputs = arrays(SHAPES[1])
    assert "tpu_custom_call" not in lowered(attention, *inputs, window=None)  # on which of eight devices?
    half = [x if x is None or x.dtype == np.int32 else x.astype(np.float16) for x in inputs]
    assert "tpu_custom_call" not in lowered(on_one_device, *half, window=None)
    for precision, taken in (("highest", True), ("high", False), ("BF16_BF16_F32_X3", False)):
        with jax.default_matmul_precision(precision):
            assert ("tpu_custom_call" in lowered(on_one_device, *inputs, window=None)) == taken, precision
    with jax.enable_x64(True):
        assert "tpu_custom_call" not in lowered(on_one_device, *inputs, window=None)
    inside = jax.shard_map(
        lambda q, k, v: on_one_device(q, k, v, scale=1.0),
        mesh=meshes.mesh((8, 1, 1)),
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    q, k, v = (jnp.zeros((8, 4, 300, 16)) for _ in range(3))
    assert jax.jit(inside)(q, k, v).shape == q.shape


@pytest.mark.parametrize("shape", SHAPES)
def test_lowers_for_a_tpu(as_on_a_tpu, shape):
    """The forward kernel, and the backward pass' two."""
    inputs = arrays(shape)
    kernels = lowered(on_one_device, *inputs, window=shape[6]).count("tpu_custom_call")
    assert kernels >= 3 if shape[3] > CHUNK else kernels == 0


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_model_on_a_mesh_trains_by_it(as_on_a_tpu, monkeypatch, family):
    """Packed and padded rows, a window, sinks, and values narrower than keys; the interpreter in the kernel's place."""
    one = draw(meshes.FAMILIES[family], seed=3)
    expected = one, *meshes.value_and_grad(one, meshes.batch())
    calls = []

    def platform_dependent(*arrays, default, tpu=None, **others):
        if not isinstance(arrays[0], dict):  # a product, not attention
            return default(*arrays)
        calls.append(tpu)
        return tpu(*arrays)

    monkeypatch.setattr(dispatch, "CHUNK", 5)
    monkeypatch.setattr(splash, "splash_attention", interpreted)
    monkeypatch.setattr(dispatch.lax, "platform_dependent", platform_dependent)
    mesh = meshes.mesh((2, 2, 2))
    meshes.check_loss_and_gradients(expected, mesh)
    assert calls
    # What was made for one mesh, under its own context, serves another.
    splash._kernel.cache_clear()
    batch = meshes.batch()
    with jax.set_mesh(check_mesh(mesh)):
        there = eqx.filter_jit(train.loss)(with_options(one, mesh=mesh), batch)[0]
    elsewhere = eqx.filter_jit(train.loss)(with_options(one, mesh=meshes.mesh((4, 1, 2))), batch)[0]
    np.testing.assert_allclose([there, elsewhere], expected[1][0], rtol=1e-6)
