"""The configs that every family is tried with, at least eight each, with sizes that all differ."""

import dataclasses
from typing import Any

SIZES = dict(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=96,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)
#: What a family needs besides, or has otherwise.
OF_FAMILY = {
    "mixtral": dict(num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=12),
    "olmoe": dict(num_experts=7, num_experts_per_tok=3, head_dim=6, pad_token_id=None),
    "gpt_oss": dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=7),
    "deepseek_v3": dict(
        num_key_value_heads=4, head_dim=10, q_lora_rank=14, kv_lora_rank=18, qk_nope_head_dim=6, qk_rope_head_dim=10,
        v_head_dim=8, moe_intermediate_size=12, n_routed_experts=12, n_shared_experts=2, num_experts_per_tok=3,
        n_group=4, topk_group=2, first_k_dense_replace=1, num_nextn_predict_layers=0,
    ),
}  # fmt: skip

LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=3.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.5)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=24,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=24)
YARN_FULL = dict(YARN, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3, truncate=False)
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=20,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.5], long_factor=[1.0, 2.0, 3.5, 5.0, 8.0],
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One config of a family, and how its checkpoint lies on disk. `length` is that of the text it is compared on."""

    model_type: str
    name: str
    config: dict[str, Any]
    packed: bool = False
    shards: bool = False
    length: int = 37

    def __str__(self) -> str:
        return f"{self.model_type}-{self.name}"

    __repr__ = __str__

    @property
    def generation(self) -> tuple[int, int]:
        """A prompt length and a number of new tokens over which transformers keeps its rotary frequencies."""
        positions = self.config["max_position_embeddings"]
        rope = self.config.get("rope_parameters", {})
        if rope.get("rope_type") == "longrope":
            original = rope["original_max_position_embeddings"]
            return (original + 3, 32) if self.length > original else (8, original - 8)
        if rope.get("rope_type") == "dynamic":
            return 12, min(32, positions - 12)
        return 12, 32

    @property
    def parsed(self):
        """The config as this library's own object."""
        from eqx_moe.models import parse_config

        return parse_config({**self.config, "model_type": self.model_type}, "config.json")


def _case(model_type: str, name: str, *, packed=False, shards=False, length=37, **config) -> Case:
    experts = OF_FAMILY.get(model_type, {})
    # One layer shows a rotary embedding as well as two.
    layers = {"num_hidden_layers": 1} if "rope_parameters" in config else {}
    return Case(model_type, name, {**SIZES, **experts, **layers, **config}, packed, shards, length)


MIXTRAL = [
    _case("mixtral", "plain"),
    _case("mixtral", "packed", packed=True, num_local_experts=3, num_experts_per_tok=1),
    _case("mixtral", "sharded-tied", shards=True, tie_word_embeddings=True, num_hidden_layers=3),
    _case("mixtral", "window-packed-shards", packed=True, shards=True, sliding_window=7),
    _case("mixtral", "many-experts", num_local_experts=13, num_experts_per_tok=4, num_key_value_heads=1, head_dim=6),
    _case("mixtral", "mha-yarn", num_key_value_heads=4, rope_parameters=YARN, sliding_window=11),
    _case("mixtral", "longrope-long", rope_parameters=LONGROPE, packed=True),
    _case("mixtral", "longrope-short", rope_parameters=LONGROPE, length=19),
    _case("mixtral", "dynamic-short", rope_parameters=DYNAMIC),
    _case("mixtral", "dynamic-long", rope_parameters=DYNAMIC, max_position_embeddings=23),
    _case("mixtral", "linear-all-experts", rope_parameters=LINEAR, num_experts_per_tok=5, intermediate_size=36),
    _case("mixtral", "llama3", rope_parameters=LLAMA3, sliding_window=13),
]
LLAMA = [
    _case("llama", "plain"),
    _case("llama", "tied-shards", tie_word_embeddings=True, shards=True),
    _case("llama", "biases", attention_bias=True, mlp_bias=True),
    _case("llama", "llama3", rope_parameters=LLAMA3, num_key_value_heads=1),
    _case("llama", "linear", rope_parameters=LINEAR, num_hidden_layers=3),
    _case("llama", "dynamic-long", rope_parameters=DYNAMIC, max_position_embeddings=23, head_dim=6),
    _case("llama", "yarn-full", rope_parameters=YARN_FULL, attention_bias=True),
    _case("llama", "longrope-long", rope_parameters=LONGROPE, mlp_bias=True, packed=True),
    _case("llama", "longrope-short", rope_parameters=LONGROPE, length=20, num_key_value_heads=4),
    _case("llama", "dynamic-short", rope_parameters=DYNAMIC),
]
MISTRAL = [
    _case("mistral", "window", sliding_window=9),
    _case("mistral", "no-window", sliding_window=None, num_key_value_heads=1),
    _case("mistral", "tied-shards", sliding_window=13, tie_word_embeddings=True, shards=True),
    _case("mistral", "wide-window", sliding_window=64, head_dim=6),
    _case("mistral", "yarn", sliding_window=5, rope_parameters=YARN_FULL),
    _case("mistral", "llama3", sliding_window=None, rope_parameters=LLAMA3, num_hidden_layers=3),
    _case("mistral", "window-one", sliding_window=1, rope_parameters=LINEAR),
    _case("mistral", "dynamic-long", sliding_window=19, rope_parameters=DYNAMIC, max_position_embeddings=23),
    _case("mistral", "longrope-long", sliding_window=None, rope_parameters=LONGROPE, packed=True),
    _case("mistral", "dynamic-short", rope_parameters=DYNAMIC, sliding_window=9),
    _case("mistral", "longrope-short", rope_parameters=LONGROPE, length=19, sliding_window=9),
]
QWEN2 = [
    _case("qwen2", "plain"),
    _case("qwen2", "tied-shards", tie_word_embeddings=True, shards=True, num_hidden_layers=3),
    _case("qwen2", "windows-above-one", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    _case("qwen2", "windows-all", use_sliding_window=True, sliding_window=11, max_window_layers=0,
          num_key_value_heads=4),
    _case("qwen2", "layer-types", use_sliding_window=True, sliding_window=8, num_hidden_layers=3,
          layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    _case("qwen2", "yarn", rope_parameters=YARN, num_key_value_heads=1),
    _case("qwen2", "dynamic-long", rope_parameters=DYNAMIC, max_position_embeddings=23),
    _case("qwen2", "linear", rope_parameters=LINEAR, head_dim=6),
    _case("qwen2", "longrope-long", rope_parameters=LONGROPE, packed=True),
    _case("qwen2", "llama3", rope_parameters=LLAMA3),
    _case("qwen2", "dynamic-short", rope_parameters=DYNAMIC),
    _case("qwen2", "longrope-short", rope_parameters=LONGROPE, length=19),
]  # fmt: skip
QWEN3 = [
    _case("qwen3", "plain"),
    _case("qwen3", "tied-biases", tie_word_embeddings=True, attention_bias=True),
    _case("qwen3", "windows-above-one", use_sliding_window=True, sliding_window=6, max_window_layers=1, shards=True),
    _case("qwen3", "layer-types", use_sliding_window=True, sliding_window=8, num_hidden_layers=3,
          layer_types=["full_attention", "sliding_attention", "full_attention"]),
    _case("qwen3", "yarn-biases", rope_parameters=YARN_FULL, attention_bias=True, num_key_value_heads=1),
    _case("qwen3", "llama3", rope_parameters=LLAMA3, num_key_value_heads=4),
    _case("qwen3", "dynamic-long", rope_parameters=DYNAMIC, max_position_embeddings=23, head_dim=6),
    _case("qwen3", "linear", rope_parameters=LINEAR, num_hidden_layers=3),
    _case("qwen3", "longrope-long", rope_parameters=LONGROPE, packed=True),
    _case("qwen3", "dynamic-short", rope_parameters=DYNAMIC),
    _case("qwen3", "longrope-short", rope_parameters=LONGROPE, length=19),
]  # fmt: skip

QWEN3_MOE = [
    _case("qwen3_moe", "plain"),
    _case("qwen3_moe", "renormalised-packed", norm_topk_prob=True, packed=True),
    _case("qwen3_moe", "dense-by-list", mlp_only_layers=[1], num_hidden_layers=3, shards=True, norm_topk_prob=True),
    _case("qwen3_moe", "dense-by-step", decoder_sparse_step=2, num_hidden_layers=4, tie_word_embeddings=True),
    _case("qwen3_moe", "windows-biases", use_sliding_window=True, sliding_window=6, attention_bias=True,
          packed=True, shards=True),
    _case("qwen3_moe", "yarn-many-experts", rope_parameters=YARN, num_experts=16, num_experts_per_tok=5),
    _case("qwen3_moe", "dynamic-long", rope_parameters=DYNAMIC, max_position_embeddings=23, num_key_value_heads=1),
    _case("qwen3_moe", "llama3-one-expert", rope_parameters=LLAMA3, num_experts_per_tok=1, num_key_value_heads=4),
    _case("qwen3_moe", "all-dense", mlp_only_layers=[0, 1], head_dim=6),
]  # fmt: skip
OLMOE = [
    _case("olmoe", "plain"),
    _case("olmoe", "clipped", clip_qkv=0.6),
    _case("olmoe", "renormalised-packed", norm_topk_prob=True, packed=True, num_key_value_heads=1),
    _case("olmoe", "clipped-biases-shards", clip_qkv=0.9, attention_bias=True, shards=True, num_hidden_layers=3),
    _case("olmoe", "tied", tie_word_embeddings=True, num_key_value_heads=4),
    _case("olmoe", "yarn", rope_parameters=YARN_FULL, num_experts=16, num_experts_per_tok=5),
    _case("olmoe", "linear-clipped", rope_parameters=LINEAR, clip_qkv=0.3, packed=True, shards=True),
    _case("olmoe", "dynamic-long", rope_parameters=DYNAMIC, max_position_embeddings=23),
    _case("olmoe", "llama3-all-experts", rope_parameters=LLAMA3, num_experts_per_tok=7),
]
GPT_OSS = [
    _case("gpt_oss", "plain"),
    _case("gpt_oss", "layer-types-shards", num_hidden_layers=3, shards=True, sliding_window=5,
          layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    _case("gpt_oss", "no-biases", attention_bias=False, num_key_value_heads=1),
    _case("gpt_oss", "tied-tight-clamp", tie_word_embeddings=True, swiglu_limit=0.4, swiglu_alpha=1.1),
    _case("gpt_oss", "default-rope", rope_parameters=dict(rope_type="default", rope_theta=1e4), num_hidden_layers=2),
    _case("gpt_oss", "yarn-truncated", rope_parameters=YARN, num_hidden_layers=2, num_key_value_heads=4),
    _case("gpt_oss", "yarn-many-experts", rope_parameters=dict(YARN, truncate=False, beta_fast=32.0, beta_slow=1.0),
          num_local_experts=16, num_experts_per_tok=4, num_hidden_layers=2, packed=True),
    _case("gpt_oss", "one-expert", num_local_experts=3, num_experts_per_tok=1, packed=True, shards=True),
    _case("gpt_oss", "dynamic-long", rope_parameters=DYNAMIC, max_position_embeddings=23),
]  # fmt: skip
DEEPSEEK_V3 = [
    _case("deepseek_v3", "plain"),
    _case("deepseek_v3", "no-query-latent", q_lora_rank=None, n_group=1, topk_group=1, packed=True),
    _case("deepseek_v3", "yarn-mscale", rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0),
          num_hidden_layers=2, first_k_dense_replace=0),
    _case("deepseek_v3", "yarn-mscales-differ", rope_parameters=YARN_FULL, num_hidden_layers=2, shards=True),
    _case("deepseek_v3", "half-layout-biases", rope_interleave=False, attention_bias=True, num_hidden_layers=3),
    _case("deepseek_v3", "not-normalised", norm_topk_prob=False, routed_scaling_factor=1.0, topk_group=3,
          packed=True, shards=True),
    _case("deepseek_v3", "all-dense-tied", first_k_dense_replace=2, tie_word_embeddings=True),
    _case("deepseek_v3", "wide-values", v_head_dim=16, kv_lora_rank=10, n_shared_experts=1, num_experts_per_tok=6),
    _case("deepseek_v3", "dynamic-long", rope_parameters=DYNAMIC, max_position_embeddings=23, num_hidden_layers=2),
]  # fmt: skip

CASES = [*MIXTRAL, *LLAMA, *MISTRAL, *QWEN2, *QWEN3, *QWEN3_MOE, *OLMOE, *GPT_OSS, *DEEPSEEK_V3]

#: One per family, for properties that do not depend on every switch, and two whose rotary embedding goes by the length.
FEW = [
    *(MIXTRAL[3], LLAMA[2], LLAMA[5], LLAMA[7], MISTRAL[0], QWEN2[4], QWEN3[1]),
    *(QWEN3_MOE[2], OLMOE[3], GPT_OSS[1], DEEPSEEK_V3[0]),
]
