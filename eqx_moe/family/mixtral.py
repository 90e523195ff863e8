"""Mixtral (Jiang et al. 2024); reference: transformers 5.23 `models/mixtral/modeling_mixtral.py`.

Every layer sparse, softmax router with renormalised weights, SwiGLU experts, grouped-query attention without biases.
"""

import dataclasses

import jax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.checkpoint.names import Name
from eqx_moe.execution import AbstractExecution
from eqx_moe.family.base import Family, Layouts, decoder, decoder_names, gqa, gqa_names, moe_names, rotary_buffers
from eqx_moe.family.config import RopeParameters, check_common
from eqx_moe.family.rope import rope
from eqx_moe.nn.attention import Attention
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.router import SoftmaxTopKRouter

_ROPE = RopeParameters(rope_theta=1e6)


@dataclasses.dataclass(frozen=True)
class MixtralConfig:
    """config.json of a Mixtral model, under its own names; `intermediate_size` is the width of one expert."""

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = _ROPE
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    dtype: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_common(self)
        rope(self)


def build(config: MixtralConfig, *, key: PRNGKeyArray, dtype: DTypeLike, execution: AbstractExecution) -> Decoder:
    """A Mixtral with random weights."""
    hidden, std = config.hidden_size, config.initializer_range

    def attention(kind: None, key: PRNGKeyArray) -> Attention:
        return gqa(config, window=config.sliding_window, dtype=dtype, key=key)

    def moe(kind: None, key: PRNGKeyArray) -> MoE:
        router_key, experts_key = jax.random.split(key)
        return MoE(
            router=SoftmaxTopKRouter(
                hidden, config.num_local_experts, config.num_experts_per_tok, std=std, dtype=dtype, key=router_key
            ),
            experts=Experts(
                config.num_local_experts, hidden, config.intermediate_size, std=std, dtype=dtype, key=experts_key
            ),
            execution=execution,
            jitter=config.router_jitter_noise,
        )

    return decoder(config, attention=attention, feed_forward=moe, dtype=dtype, key=key)


_EXPERTS, _ORIGINAL = "layers.{l}.moe.experts.", "model.layers.{l}.block_sparse_moe."


def names(config: MixtralConfig) -> Layouts:
    """As released (an own tensor per expert), and as transformers 5 packs it."""
    shared = decoder_names(config, gqa_names())
    original = (
        Name("layers.{l}.moe.router.weight", _ORIGINAL + "gate.weight"),
        Name(_EXPERTS + "gate", _ORIGINAL + "experts.{e}.w1.weight"),
        Name(_EXPERTS + "up", _ORIGINAL + "experts.{e}.w3.weight"),
        Name(_EXPERTS + "down", _ORIGINAL + "experts.{e}.w2.weight"),
    )
    return {"original": shared + original, "packed": shared + moe_names()["packed"]}


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    config=MixtralConfig,
    build=build,
    names=names,
    covers=("Mixtral 8x7B", "Mixtral 8x22B"),
    default_rope=_ROPE,
    aliases={"num_experts": "num_local_experts"},
    skipped=rotary_buffers,
)
