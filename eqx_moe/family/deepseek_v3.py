"""DeepSeek-V3 (2024, arXiv:2412.19437), and with it R1, Kimi-K2 and Moonlight; reference: transformers 5.23
`models/deepseek_v3/modeling_deepseek_v3.py`.

Multi-head latent attention; the first layers dense; a sigmoid router with a selection bias, limited to groups of
experts; a shared expert. Released in FP8.
"""

import dataclasses
import math

import jax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.checkpoint.names import Name, Skipped
from eqx_moe.execution import AbstractExecution
from eqx_moe.family.base import (
    LAYER,
    THEIRS,
    Family,
    Layouts,
    decoder,
    decoder_names,
    mla_names,
    mlp_names,
    moe_names,
    rotary_buffers,
)
from eqx_moe.family.config import ConfigError, RopeParameters, check_common
from eqx_moe.family.rope import rope
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.mla import MLA
from eqx_moe.nn.mlp import MLP
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.router import SigmoidTopKRouter

# The norms of both latents have this one, whatever rms_norm_eps is.
_LATENT_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class DeepseekV3Config:
    """config.json of a DeepSeek-V3 model, under its own names; `intermediate_size` is the width of dense layers, and
    `head_dim` that of the rotated part of a head."""

    vocab_size: int = 129_280
    hidden_size: int = 7168
    intermediate_size: int = 18_432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = 128
    head_dim: int | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    rope_interleave: bool = True
    attention_bias: bool = False
    attention_dropout: float = 0.0
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    dtype: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.qk_rope_head_dim)
        check_common(self)
        for key, only in {
            "head_dim": self.qk_rope_head_dim,
            "num_key_value_heads": self.num_attention_heads,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        }.items():
            if getattr(self, key) != only:
                raise ConfigError(key, f"{only!r}, the one that is implemented", getattr(self, key))
        for key, most in (("first_k_dense_replace", 10_000), ("num_nextn_predict_layers", 8)):
            if not 0 <= getattr(self, key) <= most:
                raise ConfigError(key, f"in [0, {most}]", getattr(self, key))
        each, odd = divmod(self.n_routed_experts, self.n_group)
        if odd or (each < 2 and self.n_group > 1):
            expected = f"a divisor of n_routed_experts ({self.n_routed_experts}), with 2 and more in a group"
            raise ConfigError("n_group", expected, self.n_group)
        if not -(-self.num_experts_per_tok // each) <= self.topk_group <= self.n_group:
            expected = f"at most n_group ({self.n_group}), with {self.num_experts_per_tok} experts in {each} each"
            raise ConfigError("topk_group", expected, self.topk_group)
        if self.rope_parameters.mscale_all_dim and self.rope_parameters.factor is None:
            raise ConfigError("rope_parameters.factor", "given where mscale_all_dim is", None)
        rope(self)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer >= self.first_k_dense_replace

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are multiplied with; YaRN's mscale_all_dim is in it, squared."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        p = self.rope_parameters
        factor = p.factor or 1.0
        if p.mscale_all_dim and factor > 1:
            scale *= (0.1 * p.mscale_all_dim * math.log(factor) + 1) ** 2
        return scale


def build(config: DeepseekV3Config, *, key: PRNGKeyArray, dtype: DTypeLike, execution: AbstractExecution) -> Decoder:
    """A DeepSeek-V3 with random weights."""
    hidden, std = config.hidden_size, config.initializer_range

    def attention(sparse: bool, key: PRNGKeyArray) -> MLA:
        return MLA(
            hidden,
            heads=config.num_attention_heads,
            nope=config.qk_nope_head_dim,
            rotated=config.qk_rope_head_dim,
            value=config.v_head_dim,
            rank=config.kv_lora_rank,
            q_rank=config.q_lora_rank,
            rope=rope(config),
            interleaved=config.rope_interleave,
            scale=config.attention_scale,
            bias=config.attention_bias,
            norm_eps=_LATENT_EPS,
            std=std,
            dtype=dtype,
            key=key,
        )

    def feed_forward(sparse: bool, key: PRNGKeyArray) -> MLP | MoE:
        if not sparse:
            return MLP(hidden, config.intermediate_size, std=std, dtype=dtype, key=key)
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        return MoE(
            router=SigmoidTopKRouter(
                hidden,
                experts,
                config.num_experts_per_tok,
                groups=config.n_group,
                kept_groups=config.topk_group,
                normalise=config.norm_topk_prob,
                scale=config.routed_scaling_factor,
                std=std,
                dtype=dtype,
                key=router_key,
            ),
            experts=Experts(experts, hidden, width, std=std, dtype=dtype, key=experts_key),
            shared=MLP(hidden, width * config.n_shared_experts, std=std, dtype=dtype, key=shared_key),
            execution=execution,
        )

    sparse = [config.is_sparse(layer) for layer in range(config.num_hidden_layers)]
    return decoder(config, kinds=sparse, attention=attention, feed_forward=feed_forward, dtype=dtype, key=key)


def names(config: DeepseekV3Config) -> Layouts:
    """As released (an own tensor per expert), and as transformers 5 packs it."""
    rows = decoder_names(config, mla_names(q_latent=config.q_lora_rank is not None, bias=config.attention_bias))
    sparse = [config.is_sparse(layer) for layer in range(config.num_hidden_layers)]
    rows += () if all(sparse) else mlp_names()
    if not any(sparse):
        return {"original": rows, "packed": rows}
    rows += (
        Name(LAYER + "moe.router.selection_bias", THEIRS + "mlp.gate.e_score_correction_bias"),
        *mlp_names("moe.shared", "mlp.shared_experts"),
    )
    return {layout: rows + moe for layout, moe in moe_names().items()}


def skipped(config: DeepseekV3Config) -> tuple[Skipped, ...]:
    """The modules that predict tokens further ahead stand behind the last layer, each a sparse layer and its ends."""
    reason = "predicts a token further ahead, which nothing here does"
    ends = ("embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    templates = [THEIRS + end for end in (*ends, "shared_head.head.weight")]
    whole = dataclasses.replace(config, first_k_dense_replace=0)
    templates += [row.theirs for table in names(whole).values() for row in table if row.theirs.startswith(THEIRS)]
    ahead: list[Skipped] = []
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        # Without it the layer is one like the others, and config.json has the wrong number of them.
        marker = f"{THEIRS.replace('{l}', str(layer))}eh_proj.weight"
        ahead += [Skipped(each.replace("{l}", str(layer)), reason, beside=marker) for each in templates]
    return (*rotary_buffers(config), *ahead)


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    config=DeepseekV3Config,
    build=build,
    names=names,
    covers=("DeepSeek-V3", "DeepSeek-R1", "Kimi-K2", "Moonlight"),
    also=("kimi_k2",),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    # The modules that predict further ahead are not written.
    written={"num_nextn_predict_layers": 0},
    skipped=skipped,
    keep_fp32=("layers.{l}.moe.router.selection_bias",),
)
