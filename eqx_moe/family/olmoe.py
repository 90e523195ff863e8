"""OLMoE (Muennighoff et al. 2024); reference: transformers 5.23 `models/olmoe/modeling_olmoe.py`.

Every layer sparse; a norm over all query heads together and one over all key heads; queries, keys and values clipped at
`clip_qkv`; a softmax router that renormalises by `norm_topk_prob`.
"""

import dataclasses

import jax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.execution import AbstractExecution
from eqx_moe.family.base import Family, Layouts, decoder, decoder_names, gqa, gqa_names, moe_names, rotary_buffers
from eqx_moe.family.config import ConfigError, RopeParameters, check_common, head_dim
from eqx_moe.family.rope import rope
from eqx_moe.nn.attention import Attention
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.router import SoftmaxTopKRouter


@dataclasses.dataclass(frozen=True)
class OlmoeConfig:
    """config.json of an OLMoE model, under its own names; `intermediate_size` is the width of one expert."""

    vocab_size: int = 50_304
    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    attention_dropout: float = 0.0
    clip_qkv: float | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.01
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 50_279
    pad_token_id: int | None = 1
    dtype: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_common(self)
        if head_dim(self) * self.num_attention_heads != self.hidden_size:
            expected = f"hidden_size / num_attention_heads ({self.hidden_size} / {self.num_attention_heads})"
            raise ConfigError("head_dim", expected, self.head_dim)
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise ConfigError("clip_qkv", "above 0, or null", self.clip_qkv)
        rope(self)


def build(config: OlmoeConfig, *, key: PRNGKeyArray, dtype: DTypeLike, execution: AbstractExecution) -> Decoder:
    """An OLMoE with random weights."""
    hidden, std = config.hidden_size, config.initializer_range

    def attention(kind: None, key: PRNGKeyArray) -> Attention:
        bias = config.attention_bias
        return gqa(config, qkv_bias=bias, o_bias=bias, qk_norm="all", clip=config.clip_qkv, dtype=dtype, key=key)

    def moe(kind: None, key: PRNGKeyArray) -> MoE:
        router_key, experts_key = jax.random.split(key)
        experts, k, normalise = config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
        return MoE(
            router=SoftmaxTopKRouter(hidden, experts, k, normalise=normalise, std=std, dtype=dtype, key=router_key),
            experts=Experts(experts, hidden, config.intermediate_size, std=std, dtype=dtype, key=experts_key),
            execution=execution,
        )

    return decoder(config, attention=attention, feed_forward=moe, dtype=dtype, key=key)


def names(config: OlmoeConfig) -> Layouts:
    """As released (an own tensor per expert), and as transformers 5 packs it."""
    bias = config.attention_bias
    rows = decoder_names(config, gqa_names(qkv_bias=bias, o_bias=bias, qk_norm=True))
    return {layout: rows + moe for layout, moe in moe_names().items()}


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    config=OlmoeConfig,
    build=build,
    names=names,
    covers=("OLMoE-1B-7B",),
    aliases={"num_local_experts": "num_experts"},
    skipped=rotary_buffers,
)
