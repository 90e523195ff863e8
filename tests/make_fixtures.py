"""Writes tests/fixtures: tiny checkpoints made by transformers, and what transformers computes with them.

With them the parity tests run where torch is not installed. Each `NAME/` is a checkpoint as transformers saves it, each
`NAME.npz` holds

    tokens    [2, 53]      two texts
    logits    [2, 53, 53]  of these texts, computed in float32 by the eager attention
    prompt0, prompt1       two prompts of different lengths
    greedy0, greedy1       what follows each of them, greedily: 32 ids, or up to the end-of-text id
    aux_loss               the load-balancing loss of both texts (families that have one)

Run `python tests/make_fixtures.py` in an environment with the `oracle` extra (`pip install torch==2.13.0` first, then
`pip install -e '.[oracle]'`). Everything is seeded: a second run writes the same numbers. `--missing` makes only those
that are not there.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "fixtures"
TEXT = 53  # tokens in a text: longer than every window, and than `max_position_embeddings` of the dynamic rope
NEW = 32

SIZES = dict(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=17,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=97,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
HEAD = dict(head_dim=10)  # not hidden_size / num_attention_heads
MIXTRAL = SIZES | HEAD | dict(num_local_experts=5, num_experts_per_tok=2, rms_norm_eps=1e-5)
QWEN3_MOE = SIZES | HEAD | dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=12)
OLMOE = SIZES | dict(num_experts=7, num_experts_per_tok=3)
GPT_OSS = SIZES | HEAD | dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=7)
DEEPSEEK_V3 = SIZES | dict(
    num_key_value_heads=4,
    q_lora_rank=14,
    kv_lora_rank=18,
    qk_nope_head_dim=6,
    qk_rope_head_dim=10,
    v_head_dim=8,
    moe_intermediate_size=12,
    n_routed_experts=12,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
)

DEFAULT = dict(rope_type="default", rope_theta=10000.0)
LINEAR = dict(rope_type="linear", rope_theta=5000.0, factor=2.5)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.1, 1.3, 1.7, 2.0],
    long_factor=[1.0, 1.9, 2.9, 4.1, 5.3],
    original_max_position_embeddings=47,
)


@dataclasses.dataclass
class Case:
    family: str
    config: dict
    rope: dict
    dtype: torch.dtype = torch.float32
    packed: bool = False
    shard_size: str = "1GB"
    old_dialect: bool = False  # the config.json that transformers 4 wrote
    ends: bool = False  # the generation config has an end-of-text id that greedy decoding meets


BALANCED = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")  # with a loss that balances the experts
QWEN2_WINDOW = dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)
CASES = {
    "mixtral-window-sharded": Case("mixtral", MIXTRAL | dict(sliding_window=7), DEFAULT, shard_size="20KB"),
    "mixtral-packed-yarn-tied": Case("mixtral", MIXTRAL | dict(tie_word_embeddings=True), YARN, packed=True, ends=True),
    "mixtral-bf16-longrope": Case(
        "mixtral",
        MIXTRAL | dict(num_hidden_layers=2, num_local_experts=7, num_experts_per_tok=3, max_position_embeddings=188),
        LONGROPE,
        dtype=torch.bfloat16,
    ),
    "llama-llama3-biases": Case("llama", SIZES | HEAD | dict(attention_bias=True, mlp_bias=True), LLAMA3),
    "llama-old-linear-tied": Case("llama", SIZES | HEAD | dict(tie_word_embeddings=True), LINEAR, old_dialect=True),
    "llama-dynamic-sharded": Case(
        "llama", SIZES | dict(num_hidden_layers=2, max_position_embeddings=47), DYNAMIC, shard_size="10KB"
    ),
    "mistral-window": Case("mistral", SIZES | HEAD | dict(sliding_window=7), DEFAULT, ends=True),
    "mistral-yarn-f16": Case(
        "mistral", SIZES | HEAD | dict(sliding_window=None, num_hidden_layers=2), YARN, dtype=torch.float16
    ),
    "qwen2-window-tied": Case("qwen2", SIZES | QWEN2_WINDOW | dict(tie_word_embeddings=True), DEFAULT),
    "qwen2-old-yarn": Case("qwen2", SIZES | dict(num_hidden_layers=2), YARN, old_dialect=True),
    "qwen3-tied": Case("qwen3", SIZES | HEAD | dict(tie_word_embeddings=True), DEFAULT),
    "qwen3-window-llama3-biases": Case("qwen3", SIZES | HEAD | QWEN2_WINDOW | dict(attention_bias=True), LLAMA3),
    "qwen3-moe-dense-layer-sharded": Case(
        "qwen3_moe", QWEN3_MOE | dict(mlp_only_layers=[1], norm_topk_prob=True), DEFAULT, shard_size="20KB"
    ),
    "qwen3-moe-packed-yarn": Case("qwen3_moe", QWEN3_MOE | dict(num_hidden_layers=2), YARN, packed=True, ends=True),
    "olmoe-clipped": Case("olmoe", OLMOE | dict(clip_qkv=0.9), DEFAULT),
    "olmoe-bf16-packed-tied": Case(
        "olmoe",
        OLMOE | dict(num_hidden_layers=2, tie_word_embeddings=True, norm_topk_prob=True),
        LINEAR,
        dtype=torch.bfloat16,
        packed=True,
    ),
    "gpt-oss-windows-yarn": Case("gpt_oss", GPT_OSS | dict(num_hidden_layers=4), dict(YARN, truncate=False)),
    "gpt-oss-no-biases-tight-clamp": Case(
        "gpt_oss", GPT_OSS | dict(attention_bias=False, swiglu_limit=0.4, num_hidden_layers=2), DEFAULT, ends=True
    ),
    "deepseek-v3-groups-sharded": Case("deepseek_v3", DEEPSEEK_V3, DEFAULT, shard_size="20KB"),
    "deepseek-v3-packed-yarn-no-latent": Case(
        "deepseek_v3",
        DEEPSEEK_V3 | dict(q_lora_rank=None, n_group=1, topk_group=1, num_hidden_layers=2),
        dict(YARN, mscale=0.7, mscale_all_dim=1.3),
        packed=True,
    ),
}


def write_old_dialect(path: pathlib.Path) -> None:
    """Rewrites config.json with the keys of transformers 4."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_checkpoint(case: Case, folder: pathlib.Path, seed: int) -> None:
    """Saves a model of random numbers: biases and norms too are away from the values that they start training with."""
    config = transformers.AutoConfig.for_model(case.family, **case.config, rope_parameters=case.rope)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    # Buffers that are saved are weights too: the selection bias of a router is one.
    stored = model.state_dict()
    tensors = [*model.named_parameters(), *(each for each in model.named_buffers() if each[0] in stored)]
    for _, tensor in sorted(tensors, key=lambda each: each[0]):
        start = 1.0 if tensor.ndim == 1 and bool((tensor == 1).all()) else 0.0
        tensor.data = start + 0.3 * torch.randn(tensor.shape, generator=generator)
    model.tie_weights()
    model = model.to(case.dtype)
    model.save_pretrained(folder, max_shard_size=case.shard_size, save_original_format=not case.packed)
    if case.old_dialect:
        write_old_dialect(folder / "config.json")


def greedy(model, prompt: np.ndarray) -> tuple[np.ndarray, float]:
    """The ids that follow, and how clear the closest choice was, relative to the largest score."""
    out = model.generate(
        torch.tensor(prompt)[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = torch.cat(out.scores)
    best, second = scores.topk(2).values.T
    return out.sequences[0, len(prompt) :].numpy(), float(((best - second) / scores.abs().max()).min())


def clear_prompt(model, random: np.random.Generator, length: int) -> np.ndarray:
    """A prompt whose continuation rounding cannot turn."""
    while True:
        prompt = random.integers(0, model.config.vocab_size, length)
        if greedy(model, prompt)[1] > 2e-3:
            return prompt


def load(folder: pathlib.Path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the grouped one wants sizes that are multiples of four
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def make(name: str, case: Case, seed: int) -> None:
    folder = FOLDER / name
    write_checkpoint(case, folder, seed)
    model = load(folder)
    random = np.random.default_rng(seed)
    prompts = [clear_prompt(model, random, length) for length in (5, 11)]
    if case.ends:
        (folder / "generation_config.json").unlink(missing_ok=True)
        first, second = (int(greedy(model, prompt)[0][step]) for prompt, step in zip(prompts, (7, 9), strict=True))
        transformers.GenerationConfig(eos_token_id=[first, second]).save_pretrained(folder)
        model = load(folder)
    tokens = random.integers(0, model.config.vocab_size, (2, TEXT))
    moe = {"output_router_logits": True} if case.family in BALANCED else {}
    out = model(torch.tensor(tokens), **moe)
    expected = {"tokens": tokens.astype(np.int32), "logits": out.logits.numpy()}
    for i, prompt in enumerate(prompts):
        expected |= {f"prompt{i}": prompt.astype(np.int32), f"greedy{i}": greedy(model, prompt)[0].astype(np.int32)}
    if moe:
        expected["aux_loss"] = out.aux_loss.numpy()
    np.savez(FOLDER / f"{name}.npz", **expected)
    print(f"{name}: max |logit| {out.logits.abs().max():.3g}; {expected['greedy0'].tolist()}")


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "--missing" not in sys.argv[1:]:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(exist_ok=True)
    for i, (name, case) in enumerate(CASES.items()):
        if not (FOLDER / f"{name}.npz").exists():
            make(name, case, seed=1000 + i)
    total = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    print(f"{len(CASES)} fixtures, {total:,} bytes")
    assert total < 3_000_000


if __name__ == "__main__":
    main()
