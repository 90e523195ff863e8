"""Configs, batches and meshes for the tests of sharded models, and what is compared; sizes that a mesh splits are
multiples of 8."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_moe
from eqx_moe import train
from eqx_moe.checkpoint import leaf_paths
from eqx_moe.models import plan_sharding
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

_SPARSE = dict(_SIZES, num_experts_per_tok=3, router_aux_loss_coef=0.02)
_TWO = dict(num_hidden_layers=2)
#: One of each family, with a layer of each kind that it has.
FAMILIES = {
    "mixtral": MIXTRAL,
    "llama": LLAMA,
    "mistral": eqx_moe.MistralConfig(**_SIZES, sliding_window=5),
    "qwen2": eqx_moe.Qwen2Config(**_SIZES | _TWO, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": eqx_moe.Qwen3Config(**_SIZES),
    "qwen3_moe": eqx_moe.Qwen3MoeConfig(
        **_SPARSE | _TWO, num_experts=16, moe_intermediate_size=24, mlp_only_layers=(0,), attention_bias=True
    ),
    "olmoe": eqx_moe.OlmoeConfig(**_SPARSE | dict(head_dim=4), num_experts=16, clip_qkv=0.6, pad_token_id=0),
    "gpt_oss": eqx_moe.GptOssConfig(**_SPARSE | _TWO, num_local_experts=16, sliding_window=5),
    "deepseek_v3": eqx_moe.DeepseekV3Config(
        **_SIZES | _TWO | dict(num_key_value_heads=8, head_dim=6), qk_rope_head_dim=6, qk_nope_head_dim=10,
        v_head_dim=4, kv_lora_rank=16, q_lora_rank=48, moe_intermediate_size=24, n_routed_experts=16,
        num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1, num_nextn_predict_layers=0,
    ),
}  # fmt: skip

AXES = ("data", "expert", "tensor")

#: Every way to make 8 of three factors, data x expert x tensor; the first six are tried in every run, and the first
#: with every family.
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


# --- What is compared ------------------------------------------------------------------------------------------------

value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(train.loss, has_aux=True))


def placed_as_planned(model) -> bool:
    plan = plan_sharding(model, model.mesh)
    return all(plan[path].sharding.is_equivalent_to(x.sharding, x.ndim) for path, x in leaf_paths(model).items())


def assert_close(found, expected, most: float = 1e-5):
    """Each leaf within `most` of the largest entry of all."""
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for path, leaf in leaf_paths(expected).items():
        off = np.max(np.abs(np.asarray(leaf_paths(found)[path]) - np.asarray(leaf)))
        assert off <= most * largest, (path, off, largest)


def check_loss_and_gradients(expected, mesh):
    """`expected` is a model on one device, its loss with metrics, and its gradients."""
    one, (loss, metrics), gradients = expected
    model = eqx_moe.with_options(one, mesh=mesh)
    (found, found_metrics), found_gradients = value_and_grad(model, batch())
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    for key in metrics:
        np.testing.assert_allclose(found_metrics[key], metrics[key], rtol=1e-5)
    assert_close(found_gradients, gradients)
    assert placed_as_planned(found_gradients)
    unknown = eqx.tree_at(lambda batch: batch.tokens, batch(), batch().tokens.at[5, 7].set(56))
    assert np.isnan(value_and_grad(model, unknown)[0][0])
