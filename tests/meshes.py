"""Configs, batches and meshes for the tests of sharded models; sizes that a mesh splits are multiples of 8."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import eqx_moe
from eqx_moe.train import Batch

_SIZES = dict(
    vocab_size=56,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=96,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)
MIXTRAL = eqx_moe.MixtralConfig(**_SIZES, num_local_experts=16, num_experts_per_tok=3, router_aux_loss_coef=0.02)
LLAMA = eqx_moe.LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)

AXES = ("data", "expert", "tensor")

#: Every way to make 8 of three factors, data x expert x tensor; the first six are tried in every run.
OVER_8 = [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 1, 2), (1, 4, 2), (4, 2, 1), (2, 4, 1), (2, 1, 4), (1, 2, 4)]
assert sorted(OVER_8) == [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8]


def mesh(shape: tuple[int, ...], names: tuple[str, ...] = AXES, explicit: bool = False) -> jax.sharding.Mesh:
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def batch(rows: int = 24, seq: int = 11, seed: int = 0) -> Batch:
    """Random tokens, with left padding, and a second segment in some rows."""
    random = np.random.default_rng(seed)
    tokens = jnp.asarray(random.integers(0, MIXTRAL.vocab_size, (rows, seq)), jnp.int32)
    segments = np.ones((rows, seq), np.int32)
    segments[::3, :2] = 0
    segments[1::4, 6:] = 2
    return Batch(tokens=tokens, segment_ids=jnp.asarray(segments), labels=tokens)
