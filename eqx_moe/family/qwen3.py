"""Qwen3 (Yang et al. 2025); reference: transformers 5.23 `models/qwen3/modeling_qwen3.py`.

Dense: grouped-query attention with a norm on every query and key head, biases on q, k, v and o by `attention_bias`,
SwiGLU, sliding windows by layer.
"""

import dataclasses

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.execution import AbstractExecution
from eqx_moe.family.base import Family, Layouts, decoder, decoder_names, gqa, gqa_names, mlp_names, rotary_buffers
from eqx_moe.family.config import RopeParameters, check_common, check_windows, windows_of
from eqx_moe.family.rope import rope
from eqx_moe.nn.attention import Attention
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.mlp import MLP


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """config.json of a Qwen3 model, under its own names."""

    vocab_size: int = 151_936
    hidden_size: int = 4096
    intermediate_size: int = 22_016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    attention_dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_common(self)
        check_windows(self)
        rope(self)


def build(config: Qwen3Config, *, key: PRNGKeyArray, dtype: DTypeLike, execution: AbstractExecution) -> Decoder:
    """A Qwen3 with random weights; it has no experts, so `execution` says nothing to it."""

    def attention(window: int | None, key: PRNGKeyArray) -> Attention:
        bias = config.attention_bias
        return gqa(config, window=window, qkv_bias=bias, o_bias=bias, qk_norm="head", dtype=dtype, key=key)

    def mlp(window: int | None, key: PRNGKeyArray) -> MLP:
        std = config.initializer_range
        return MLP(config.hidden_size, config.intermediate_size, std=std, dtype=dtype, key=key)

    return decoder(config, kinds=windows_of(config), attention=attention, feed_forward=mlp, dtype=dtype, key=key)


def names(config: Qwen3Config) -> Layouts:
    """Dense models have one layout; it answers to both names."""
    attention = gqa_names(qkv_bias=config.attention_bias, o_bias=config.attention_bias, qk_norm=True)
    rows = decoder_names(config, attention) + mlp_names()
    return {"original": rows, "packed": rows}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    config=Qwen3Config,
    build=build,
    names=names,
    covers=("Qwen3",),
    skipped=rotary_buffers,
)
