"""gpt-oss (OpenAI 2025, arXiv:2508.10925); reference: transformers 5.23 `models/gpt_oss/modeling_gpt_oss.py`.

Every layer sparse, and every second one with a window; attention with biases and a sink for each head; a router with a
bias, softmax over the chosen experts; experts with biases and a clamped SwiGLU. Released with MXFP4 experts.
"""

import dataclasses

import jax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.checkpoint.names import Name
from eqx_moe.execution import AbstractExecution
from eqx_moe.family.base import LAYER, THEIRS, Family, Layouts, decoder, decoder_names, gqa, gqa_names
from eqx_moe.family.config import ConfigError, RopeParameters, check_common, check_layer_types, windows_of
from eqx_moe.family.rope import rope
from eqx_moe.nn.attention import Attention
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.gating import ClampedSwiGLU
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.router import SoftmaxTopKRouter

_ROPE = RopeParameters(
    rope_theta=150_000.0,
    rope_type="yarn",
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)


@dataclasses.dataclass(frozen=True)
class GptOssConfig:
    """config.json of a gpt-oss model, under its own names; `intermediate_size` is the width of one expert."""

    vocab_size: int = 201_088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int | None = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = _ROPE
    attention_bias: bool = True
    sliding_window: int | None = 128
    layer_types: tuple[str, ...] | None = None
    attention_dropout: float = 0.0
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_common(self)
        if self.layer_types is None:
            kinds = ("sliding_attention", "full_attention")
            object.__setattr__(self, "layer_types", tuple(kinds[i % 2] for i in range(self.num_hidden_layers)))
        check_layer_types(self)
        if self.swiglu_limit <= 0:
            raise ConfigError("swiglu_limit", "above 0", self.swiglu_limit)
        rope(self)


def build(config: GptOssConfig, *, key: PRNGKeyArray, dtype: DTypeLike, execution: AbstractExecution) -> Decoder:
    """A gpt-oss with random weights."""
    hidden, std = config.hidden_size, config.initializer_range
    experts, k = config.num_local_experts, config.num_experts_per_tok

    def attention(window: int | None, key: PRNGKeyArray) -> Attention:
        bias = config.attention_bias
        return gqa(config, window=window, qkv_bias=bias, o_bias=bias, sinks=True, dtype=dtype, key=key)

    def moe(window: int | None, key: PRNGKeyArray) -> MoE:
        router_key, experts_key = jax.random.split(key)
        gating = ClampedSwiGLU(config.swiglu_alpha, config.swiglu_limit)
        return MoE(
            router=SoftmaxTopKRouter(hidden, experts, k, bias=True, std=std, dtype=dtype, key=router_key),
            experts=Experts(
                experts,
                hidden,
                config.intermediate_size,
                bias=True,
                gating=gating,
                std=std,
                dtype=dtype,
                key=experts_key,
            ),
            execution=execution,
        )

    return decoder(
        config,
        kinds=windows_of(config),
        attention=attention,
        feed_forward=moe,
        round_last=True,
        dtype=dtype,
        key=key,
    )


_EXPERTS, _THEIRS = LAYER + "moe.experts.", THEIRS + "mlp.experts."


def names(config: GptOssConfig) -> Layouts:
    """As exported in bfloat16, which transformers calls packed too, and as released in MXFP4 (read, not written)."""
    bias, mlp = config.attention_bias, THEIRS + "mlp."
    gate_up = (_EXPERTS + "gate", _EXPERTS + "up")
    rows = (
        *decoder_names(config, gqa_names(qkv_bias=bias, o_bias=bias, sinks=True)),
        Name(LAYER + "moe.router.weight", mlp + "router.weight"),
        Name(LAYER + "moe.router.bias", mlp + "router.bias"),
        Name((_EXPERTS + "gate_bias", _EXPERTS + "up_bias"), _THEIRS + "gate_up_proj_bias", axis=-1, interleaved=True),
        Name(_EXPERTS + "down_bias", _THEIRS + "down_proj_bias"),
    )
    exported = (
        Name(gate_up, _THEIRS + "gate_up_proj", interleaved=True, transposed=True),
        Name(_EXPERTS + "down", _THEIRS + "down_proj", transposed=True),
    )
    released = (
        Name(gate_up, _THEIRS + "gate_up_proj_blocks", interleaved=True),
        Name(_EXPERTS + "down", _THEIRS + "down_proj_blocks"),
    )
    return {"original": rows + exported, "packed": rows + exported, "mxfp4": rows + released}


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    config=GptOssConfig,
    build=build,
    names=names,
    covers=("gpt-oss-20b", "gpt-oss-120b"),
    default_rope=_ROPE,
    containers=("mxfp4",),
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
)
