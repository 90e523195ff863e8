"""Llama (Touvron et al. 2023, Grattafiori et al. 2024); reference: transformers 5.23 `models/llama/modeling_llama.py`.

Dense: grouped-query attention, SwiGLU; biases by `attention_bias` (q, k, v and o) and `mlp_bias`.
"""

import dataclasses

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.execution import AbstractExecution
from eqx_moe.family.base import Family, Layouts, decoder, decoder_names, gqa, gqa_names, mlp_names, rotary_buffers
from eqx_moe.family.config import RopeParameters, check_common
from eqx_moe.family.rope import rope
from eqx_moe.nn.attention import Attention
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.mlp import MLP


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """config.json of a Llama model, under its own names."""

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    dtype: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_common(self)
        rope(self)


def build(config: LlamaConfig, *, key: PRNGKeyArray, dtype: DTypeLike, execution: AbstractExecution) -> Decoder:
    """A Llama with random weights; it has no experts, so `execution` says nothing to it."""

    def attention(kind: None, key: PRNGKeyArray) -> Attention:
        return gqa(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, dtype=dtype, key=key)

    def mlp(kind: None, key: PRNGKeyArray) -> MLP:
        std = config.initializer_range
        return MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, std=std, dtype=dtype, key=key)

    return decoder(config, attention=attention, feed_forward=mlp, dtype=dtype, key=key)


def names(config: LlamaConfig) -> Layouts:
    """Dense models have one layout; it answers to both names."""
    attention = gqa_names(qkv_bias=config.attention_bias, o_bias=config.attention_bias)
    rows = decoder_names(config, attention) + mlp_names(bias=config.mlp_bias)
    return {"original": rows, "packed": rows}


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    config=LlamaConfig,
    build=build,
    names=names,
    covers=("Llama 2", "Llama 3", "Llama 3.1 and 3.2 (text)"),
    skipped=rotary_buffers,
)
