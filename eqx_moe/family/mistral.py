"""Mistral 7B (Jiang et al. 2023); reference: transformers 5.23 `models/mistral/modeling_mistral.py`.

Dense: grouped-query attention without biases, SwiGLU, one sliding window for all layers (4096 unless the config says
null).
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
class MistralConfig:
    """config.json of a Mistral model, under its own names."""

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
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    sliding_window: int | None = 4096
    attention_dropout: float = 0.0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    dtype: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_common(self)
        rope(self)


def build(config: MistralConfig, *, key: PRNGKeyArray, dtype: DTypeLike, execution: AbstractExecution) -> Decoder:
    """A Mistral with random weights; it has no experts, so `execution` says nothing to it."""

    def attention(kind: None, key: PRNGKeyArray) -> Attention:
        return gqa(config, window=config.sliding_window, dtype=dtype, key=key)

    def mlp(kind: None, key: PRNGKeyArray) -> MLP:
        std = config.initializer_range
        return MLP(config.hidden_size, config.intermediate_size, std=std, dtype=dtype, key=key)

    return decoder(config, attention=attention, feed_forward=mlp, dtype=dtype, key=key)


def names(config: MistralConfig) -> Layouts:
    """Dense models have one layout; it answers to both names."""
    rows = decoder_names(config, gqa_names()) + mlp_names()
    return {"original": rows, "packed": rows}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    config=MistralConfig,
    build=build,
    names=names,
    covers=("Mistral 7B", "Mistral Nemo"),
    skipped=rotary_buffers,
)
