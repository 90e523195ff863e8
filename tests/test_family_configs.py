"""What the four families of stage 5 refuse by name, and the published configs that they read."""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DEEPSEEK_V3, GPT_OSS, LINEAR, LLAMA3, LONGROPE, OLMOE, QWEN3_MOE, YARN

from eqx_moe.errors import CheckpointError
from eqx_moe.family import gpt_oss
from eqx_moe.family.base import decoder, gqa
from eqx_moe.family.rope import rope
from eqx_moe.models import config_to_json, count_parameters, parse_config, skeleton
from eqx_moe.nn.mlp import MLP
from eqx_moe.nn.rope import YarnRope

PLAIN = {
    cases[0].model_type: {**cases[0].config, "model_type": cases[0].model_type}
    for cases in (QWEN3_MOE, OLMOE, GPT_OSS, DEEPSEEK_V3)
}
MXFP4, FP8 = {"quant_method": "mxfp4"}, {"quant_method": "fp8", "weight_block_size": [128, 128]}

#: Of every family: the key that the error names, and the changes to a config that is read.
REFUSED = [
    ("rope_parameters.rope_type", dict(rope_parameters=dict(rope_type="proportional", rope_theta=1e4))),
    ("rope_parameters.rope_type", dict(rope_scaling=dict(type="su", factor=4.0))),
    ("rope_parameters.partial_rotary_factor", dict(partial_rotary_factor=0.5)),
    ("rope_parameters.factor", dict(rope_parameters=dict(YARN, factor=-4.0))),
    ("rope_parameters.factor", dict(rope_parameters=dict(LINEAR, factor=1e-300))),
    ("rope_parameters.factor", dict(rope_parameters=dict(LINEAR, factor=1e35))),
    ("rope_parameters.factor", dict(rope_parameters=dict(YARN, factor=1e299))),
    ("rope_parameters.attention_factor", dict(rope_parameters=dict(YARN, attention_factor=1e39))),
    ("rope_parameters.beta_slow", dict(rope_parameters=dict(YARN, beta_slow=1e-307))),
    ("rope_parameters.rope_theta", dict(rope_parameters=dict(YARN, rope_theta=1e299))),
    ("rope_parameters.rope_theta", dict(rope_parameters=dict(rope_type="default", rope_theta=1e39))),
    ("rope_parameters", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0, mscale=0.5))),
    ("hidden_act", dict(hidden_act="gelu")),
    ("attention_dropout", dict(attention_dropout=0.1)),
    ("num_experts_per_tok", dict(num_experts_per_tok=13)),
    ("num_experts_per_tok", dict(num_experts_per_tok=0)),
    ("rms_norm_eps", dict(rms_norm_eps=0.0)),
    ("attention_bias", dict(attention_bias="yes")),
    ("quantization_config", dict(quantization_config={"quant_method": "compressed-tensors"})),
    ("quantization_config", dict(quantization_config={"quant_method": "gptq", "bits": 4})),
    ("quantization_config", dict(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})),
    ("quantization_config", dict(quantization_config={"quant_method": "fp8"})),
    ("quantization_config", dict(quantization_config=[])),
]
REFUSED_BY = {
    "qwen3_moe": [
        ("num_local_experts", dict(num_local_experts=9)),
        ("decoder_sparse_step", dict(decoder_sparse_step=0)),
        ("mlp_only_layers[0]", dict(mlp_only_layers=["1"])),
        ("mlp_only_layers", dict(mlp_only_layers=1)),
        ("sliding_window", dict(use_sliding_window=True, sliding_window=None)),
        ("layer_types", dict(layer_types=["sliding_attention", "full_attention"])),
        ("moe_intermediate_size", dict(moe_intermediate_size=0)),
        ("num_key_value_heads", dict(num_key_value_heads=3)),
        ("use_qk_norm", dict(use_qk_norm=False)),
        ("use_qk_norm", dict(use_qk_norm=1)),
        ("qkv_bias", dict(qkv_bias=True)),
        ("shared_expert_intermediate_size", dict(shared_expert_intermediate_size=512)),
    ],
    "olmoe": [
        ("clip_qkv", dict(clip_qkv=0.0)),
        ("clip_qkv", dict(clip_qkv=-8.0)),
        ("clip_qkv", dict(clip_qkv="8")),
        ("head_dim", dict(head_dim=8)),
        ("norm_topk_prob", dict(norm_topk_prob=1)),
        ("layer_types", dict(layer_types=["sliding_attention"] * 2)),
        ("num_local_experts", dict(num_local_experts=9)),
    ],
    "gpt_oss": [
        ("swiglu_limit", dict(swiglu_limit=0.0)),
        ("swiglu_limit", dict(swiglu_limit=-7.0)),
        ("swiglu_limit", dict(swiglu_limit=None)),
        ("layer_types", dict(layer_types=["full_attention"])),
        ("layer_types", dict(layer_types=["full_attention", "chunked_attention"])),
        ("layer_types", dict(layer_types="full_attention")),
        ("sliding_window", dict(sliding_window=None)),
        ("sliding_window", dict(sliding_window=0)),
        ("experts_per_token", dict(experts_per_token=3)),
        ("num_experts", dict(num_experts=6)),
    ],
    "deepseek_v3": [
        ("scoring_func", dict(scoring_func="softmax")),
        ("topk_method", dict(topk_method="group_limited_greedy")),
        ("moe_layer_freq", dict(moe_layer_freq=2)),
        ("n_group", dict(n_group=5)),
        ("n_group", dict(n_group=12)),  # of one expert each, and a group is judged by two
        ("n_group", dict(n_group=0)),
        ("topk_group", dict(topk_group=5)),
        ("topk_group", dict(topk_group=1, num_experts_per_tok=4)),
        ("topk_group", dict(topk_group=0)),
        ("num_key_value_heads", dict(num_key_value_heads=2)),
        ("head_dim", dict(head_dim=16)),
        ("head_dim", dict(head_dim=None, qk_rope_head_dim=5)),
        ("q_lora_rank", dict(q_lora_rank=0)),
        ("kv_lora_rank", dict(kv_lora_rank=None)),
        ("n_shared_experts", dict(n_shared_experts=0)),
        ("n_shared_experts", dict(n_shared_experts=None)),
        ("first_k_dense_replace", dict(first_k_dense_replace=-1)),
        ("num_nextn_predict_layers", dict(num_nextn_predict_layers=-1)),
        ("num_mtp_layers", dict(num_mtp_layers=2)),
        ("num_nextn_predict_layers", dict(num_nextn_predict_layers=9)),
        ("rope_interleave", dict(rope_interleave=1)),
        ("rope_parameters.factor", dict(rope_parameters={**YARN, "mscale_all_dim": 1.0, "factor": None})),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key", "changes"), [(name, *row) for name in PLAIN for row in [*REFUSED, *REFUSED_BY[name]]]
)
def test_what_is_not_implemented_is_refused_by_name(family, key, changes):
    parse_config(PLAIN[family], "config.json")
    with pytest.raises(CheckpointError) as caught:
        parse_config({**PLAIN[family], **changes}, "config.json")
    error = caught.value
    assert (error.code, error.file, error.item) == ("CFG-VALUE", "config.json", key)
    assert error.expected and error.found and error.fix and family in error.doing


@pytest.mark.parametrize("family", PLAIN)
def test_containers_that_are_read_leave_nothing_in_the_config(family):
    """gpt-oss is released in MXFP4, the others in FP8; a container that a family does not come in is refused."""
    own, other = (MXFP4, FP8) if family == "gpt_oss" else (FP8, MXFP4)
    for container in (own, None):
        config = parse_config({**PLAIN[family], "quantization_config": container}, "config.json")
        assert config == parse_config(PLAIN[family], "config.json")
        assert "quantization_config" not in config_to_json(config, "bfloat16")
    with pytest.raises(CheckpointError, match="no other container") as caught:
        parse_config({**PLAIN[family], "quantization_config": other}, "config.json")
    assert (caught.value.code, caught.value.item) == ("CFG-VALUE", "quantization_config")


# --- Published configs, with the keys that their config.json has -----------------------------------------------------

_DEEPSEEK_ROPE = dict(
    beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=4096,
    type="yarn",
)  # fmt: skip
_DEEPSEEK = dict(
    architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    auto_map={
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    ep_size=1, hidden_act="silu", initializer_range=0.02, kv_lora_rank=512, moe_layer_freq=1, norm_topk_prob=True,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, scoring_func="sigmoid", topk_method="noaux_tc",
    tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
_GPT_OSS = dict(
    architectures=["GptOssForCausalLM"], attention_bias=True, attention_dropout=0.0, eos_token_id=200002,
    experts_per_token=4, head_dim=64, hidden_act="silu", hidden_size=2880, initial_context_length=4096,
    initializer_range=0.02, intermediate_size=2880, max_position_embeddings=131072, model_type="gpt_oss",
    num_attention_heads=64, num_experts_per_tok=4, num_key_value_heads=8, output_router_logits=False,
    pad_token_id=199999, rms_norm_eps=1e-05, rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128,
    quantization_config=dict(
        modules_to_not_convert=[
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
        quant_method="mxfp4",
    ),
    rope_scaling=dict(
        beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096, rope_type="yarn",
        truncate=False,
    ),
    swiglu_limit=7.0, tie_word_embeddings=False, transformers_version="4.55.0.dev0", use_cache=True, vocab_size=201088,
)  # fmt: skip

#: The config, and how many parameters there are in all and active, in billions. The card of gpt-oss leaves the
#: embedding out of the active ones, which is counted here.
PUBLISHED = {
    "Qwen3-30B-A3B": (
        dict(
            architectures=["Qwen3MoeForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
            decoder_sparse_step=1, eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=2048,
            initializer_range=0.02, intermediate_size=6144, max_position_embeddings=40960, max_window_layers=48,
            mlp_only_layers=[], model_type="qwen3_moe", moe_intermediate_size=768, norm_topk_prob=True,
            num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
            num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-06, rope_scaling=None,
            rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None, tie_word_embeddings=False,
            torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True, use_sliding_window=False,
            vocab_size=151936,
        ),
        30.5, 3.35,
    ),
    "Qwen3-Coder-480B-A35B": (
        dict(
            architectures=["Qwen3MoeForCausalLM"], attention_dropout=0.0, decoder_sparse_step=1, eos_token_id=151645,
            head_dim=128, hidden_act="silu", hidden_size=6144, initializer_range=0.02, intermediate_size=8192,
            max_position_embeddings=262144, max_window_layers=62, mlp_only_layers=[], model_type="qwen3_moe",
            moe_intermediate_size=2560, norm_topk_prob=True, num_attention_heads=96, num_experts=160,
            num_experts_per_tok=8, num_hidden_layers=62, num_key_value_heads=8, output_router_logits=False,
            qkv_bias=False, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=10000000, router_aux_loss_coef=0.0,
            shared_expert_intermediate_size=0, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
            transformers_version="4.51.0", use_cache=True, use_qk_norm=True, use_sliding_window=False,
            vocab_size=151936,
        ),
        480.2, 35.4,
    ),
    "OLMoE-1B-7B-0924": (
        dict(
            architectures=["OlmoeForCausalLM"], attention_bias=False, attention_dropout=0.0, clip_qkv=None,
            eos_token_id=50279, hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=1024,
            max_position_embeddings=4096, model_type="olmoe", norm_topk_prob=False, num_attention_heads=16,
            num_experts=64, num_experts_per_tok=8, num_hidden_layers=16, num_key_value_heads=16,
            output_router_logits=False, pad_token_id=1, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0,
            router_aux_loss_coef=0.01, tie_word_embeddings=False, torch_dtype="bfloat16",
            transformers_version="4.43.0.dev0", use_cache=True, vocab_size=50304,
        ),
        6.92, 1.28,
    ),
    "gpt-oss-20b": (
        dict(
            _GPT_OSS, num_hidden_layers=24, num_local_experts=32, swiglu_limit=7.0,
            layer_types=["sliding_attention", "full_attention"] * 12,
        ),
        20.9, 3.61 + 0.579,
    ),
    "gpt-oss-120b": (
        dict(
            _GPT_OSS, num_hidden_layers=36, num_local_experts=128,
            layer_types=["sliding_attention", "full_attention"] * 18,
        ),
        116.8, 5.13 + 0.579,
    ),
    "DeepSeek-V3": (
        dict(
            _DEEPSEEK, bos_token_id=0, eos_token_id=1, first_k_dense_replace=3, hidden_size=7168,
            intermediate_size=18432, max_position_embeddings=163840, model_type="deepseek_v3",
            moe_intermediate_size=2048, n_group=8, n_routed_experts=256, n_shared_experts=1, num_attention_heads=128,
            num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128, num_nextn_predict_layers=1,
            q_lora_rank=1536, rms_norm_eps=1e-06, rope_scaling=_DEEPSEEK_ROPE, rope_theta=10000,
            routed_scaling_factor=2.5, topk_group=4, transformers_version="4.33.1", vocab_size=129280,
            quantization_config=dict(
                activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]
            ),
        ),
        671.0, 37.6,
    ),
    "Kimi-K2-Instruct": (
        dict(
            _DEEPSEEK, aux_loss_alpha=0.001, bos_token_id=163584, eos_token_id=163585, first_k_dense_replace=1,
            hidden_size=7168, intermediate_size=18432, max_position_embeddings=131072, model_type="kimi_k2",
            moe_intermediate_size=2048, n_group=1, n_routed_experts=384, n_shared_experts=1, num_attention_heads=64,
            num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=64, num_nextn_predict_layers=0,
            pretraining_tp=1, q_lora_rank=1536, rms_norm_eps=1e-06,
            rope_scaling=dict(_DEEPSEEK_ROPE, beta_fast=1.0, beta_slow=1.0, factor=32.0),
            rope_theta=50000.0, routed_scaling_factor=2.827, seq_aux=True, topk_group=1,
            transformers_version="4.48.3", vocab_size=163840,
            quantization_config=dict(
                activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]
            ),
        ),
        1026.0, 32.6,
    ),
    "Moonlight-16B-A3B": (
        dict(
            _DEEPSEEK, aux_loss_alpha=0.001, bos_token_id=163584, eos_token_id=163585, first_k_dense_replace=1,
            hidden_size=2048, intermediate_size=11264, max_position_embeddings=8192, model_type="deepseek_v3",
            moe_intermediate_size=1408, n_group=1, n_routed_experts=64, n_shared_experts=2, num_attention_heads=16,
            num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16, num_nextn_predict_layers=0,
            pretraining_tp=1, q_lora_rank=None, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=50000.0,
            routed_scaling_factor=2.446, seq_aux=True, topk_group=1, transformers_version="4.48.3", vocab_size=163840,
        ),
        15.96, 2.9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_parse_without_a_warning_and_give_the_published_sizes(name):
    data, total, active = PUBLISHED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = parse_config(data, "config.json")
        again = parse_config(config_to_json(config, "bfloat16"), "config.json")
    # No module that predicts ahead is written, nor code.
    changes = dict(dtype="bfloat16", head_dim=again.head_dim)
    if hasattr(config, "num_nextn_predict_layers"):
        changes |= dict(num_nextn_predict_layers=0)
    assert again == dataclasses.replace(config, **changes)
    assert "auto_map" not in dict(again.extra)
    found = [count / 1e9 for count in count_parameters(skeleton(config, dtype="bfloat16"))]
    assert found == [pytest.approx(total, rel=0.01), pytest.approx(active, rel=0.01)]


def test_published_configs_mean_what_their_authors_meant():
    """Numbers that follow from a config, worked out by hand."""
    deepseek, kimi, moonlight, oss = (
        parse_config(PUBLISHED[name][0], "config.json")
        for name in ("DeepSeek-V3", "Kimi-K2-Instruct", "Moonlight-16B-A3B", "gpt-oss-20b")
    )
    # The two mscales leave cosine and sine as they are.
    assert deepseek.attention_scale == pytest.approx((128 + 64) ** -0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert isinstance(rope(deepseek), YarnRope) and rope(deepseek).scale == 1.0 and rope(deepseek).dim == 64
    assert kimi.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2)
    assert moonlight.attention_scale == pytest.approx(192**-0.5)
    assert [deepseek.is_sparse(layer) for layer in (2, 3)] == [False, True]
    assert rope(oss) == YarnRope(64, 150_000.0, 32.0, 4096, 32.0, 1.0, False, 0.1 * math.log(32) + 1)
    assert oss.layer_types[:3] == ("sliding_attention", "full_attention", "sliding_attention")


@pytest.mark.parametrize(
    "parameters",
    [
        dict(rope_type="default", rope_theta=1.5),
        dict(rope_type="default", rope_theta=1e38),
        dict(LINEAR, factor=0.25),
        dict(LINEAR, factor=1e-9),
        dict(LINEAR, factor=1e9),
        dict(LLAMA3, factor=0.5),
        dict(YARN, factor=0.5),
        dict(YARN, factor=1e12),
        dict(LONGROPE, factor=0.5, short_factor=[0.5, 0.1, 1e-6, 3.0, 1e6]),
    ],
    ids=str,
)
def test_odd_numbers_that_mean_something_are_what_they_are_to_the_reference(parameters):
    """It warns of a factor below 1 and goes on."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    data = dict(PLAIN["qwen3_moe"], rope_parameters=parameters, head_dim=10)
    ours = rope(parse_config(data, "config.json"))
    found = np.asarray(ours.frequencies(jnp.zeros((1,), jnp.int32))).reshape(-1)
    theirs = transformers.Qwen3MoeConfig(**{key: value for key, value in data.items() if key != "model_type"})
    if parameters["rope_type"] == "default":
        expected, scale = 1.0 / parameters["rope_theta"] ** (np.arange(0, 10, 2) / 10), 1.0
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu", seq_len=1)
    np.testing.assert_allclose(found, np.asarray(expected), rtol=2e-6)
    assert ours.scale == pytest.approx(scale) and np.all(found > 0)


def test_a_skeleton_traces_each_kind_of_layer_once(monkeypatch):
    traced = []
    monkeypatch.setattr(
        gpt_oss, "gqa", lambda *args, **options: traced.append(options["window"]) or gqa(*args, **options)
    )
    config = parse_config(dict(PLAIN["gpt_oss"], num_hidden_layers=7, layer_types=None), "config.json")
    windows = [layer.attention.window for layer in skeleton(config).layers]
    assert windows == [config.sliding_window, None] * 3 + [config.sliding_window]
    assert traced == windows[:2]


def test_as_many_kinds_as_layers():
    config = parse_config(dict(PLAIN["olmoe"], num_hidden_layers=3), "config.json")
    with pytest.raises(ValueError, match="longer"):
        decoder(
            config,
            kinds=[None, None],
            attention=lambda kind, key: gqa(config, dtype="float32", key=key),
            feed_forward=lambda kind, key: MLP(config.hidden_size, 16, std=1.0, dtype="float32", key=key),
            dtype="float32",
            key=jax.random.key(0),
        )
