"""Qwen3-MoE (Yang et al. 2025); reference: transformers 5.23 `models/qwen3_moe/modeling_qwen3_moe.py`.

Qwen3's attention, with a norm on every query and key head; a softmax router over many narrow experts, renormalised by
`norm_topk_prob`; dense layers where `mlp_only_layers` or `decoder_sparse_step` say so.
"""

import dataclasses

import jax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.execution import AbstractExecution
from eqx_moe.family.base import (
    Family,
    Layouts,
    decoder,
    decoder_names,
    gqa,
    gqa_names,
    mlp_names,
    moe_names,
    rotary_buffers,
)
from eqx_moe.family.config import ConfigError, RopeParameters, check_common
from eqx_moe.family.rope import rope
from eqx_moe.nn.attention import Attention
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.mlp import MLP
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.router import SoftmaxTopKRouter


@dataclasses.dataclass(frozen=True)
class Qwen3MoeConfig:
    """config.json of a Qwen3-MoE model, under its own names; `intermediate_size` is the width of dense layers."""

    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    moe_intermediate_size: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    attention_dropout: float = 0.0
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = None
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_common(self)
        if self.use_sliding_window and self.sliding_window is None:
            raise ConfigError("sliding_window", "given when use_sliding_window is true", None)
        rope(self)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in (self.mlp_only_layers or ()) and (layer + 1) % self.decoder_sparse_step == 0


def build(config: Qwen3MoeConfig, *, key: PRNGKeyArray, dtype: DTypeLike, execution: AbstractExecution) -> Decoder:
    """A Qwen3-MoE with random weights."""
    hidden, std = config.hidden_size, config.initializer_range

    def attention(sparse: bool, key: PRNGKeyArray) -> Attention:
        window = config.sliding_window if config.use_sliding_window else None
        bias = config.attention_bias
        return gqa(config, window=window, qkv_bias=bias, o_bias=bias, qk_norm="head", dtype=dtype, key=key)

    def feed_forward(sparse: bool, key: PRNGKeyArray) -> MLP | MoE:
        if not sparse:
            return MLP(hidden, config.intermediate_size, std=std, dtype=dtype, key=key)
        router_key, experts_key = jax.random.split(key)
        experts, k, normalise = config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
        return MoE(
            router=SoftmaxTopKRouter(hidden, experts, k, normalise=normalise, std=std, dtype=dtype, key=router_key),
            experts=Experts(experts, hidden, config.moe_intermediate_size, std=std, dtype=dtype, key=experts_key),
            execution=execution,
        )

    sparse = [config.is_sparse(layer) for layer in range(config.num_hidden_layers)]
    return decoder(config, kinds=sparse, attention=attention, feed_forward=feed_forward, dtype=dtype, key=key)


def names(config: Qwen3MoeConfig) -> Layouts:
    """As released (an own tensor per expert), and as transformers 5 packs it."""
    bias = config.attention_bias
    rows = decoder_names(config, gqa_names(qkv_bias=bias, o_bias=bias, qk_norm=True))
    sparse = [config.is_sparse(layer) for layer in range(config.num_hidden_layers)]
    rows += () if all(sparse) else mlp_names()
    return {layout: rows + moe if any(sparse) else rows for layout, moe in moe_names().items()}


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    config=Qwen3MoeConfig,
    build=build,
    names=names,
    covers=("Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder"),
    aliases={"num_local_experts": "num_experts"},
    only={"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0},
    skipped=rotary_buffers,
)
