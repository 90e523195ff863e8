"""A checkpoint small enough for any test, with a tokenizer that can spell every text."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import eqx_moe
from eqx_moe.models import skeleton

END = "<|endoftext|>"
TEXT = "The wren is a small bird.\n\nIt sings in the hedge, and it does not tire: naïve, ☕, 漢字.\n" * 3

CONFIG = eqx_moe.MixtralConfig(
    vocab_size=283,
    hidden_size=12,
    intermediate_size=17,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=4,
    num_local_experts=5,
    num_experts_per_tok=2,
    max_position_embeddings=61,
    router_aux_loss_coef=0.02,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
)
DENSE = eqx_moe.LlamaConfig(
    **{
        field.name: getattr(CONFIG, field.name)
        for field in dataclasses.fields(eqx_moe.LlamaConfig)
        if hasattr(CONFIG, field.name)
    }
)


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def model(config: object = CONFIG, seed: int = 3) -> eqx_moe.Decoder:
    return eqx_moe.init(config, key=jax.random.key(seed))


def drawn(seed: int) -> eqx_moe.Decoder:
    """Such a model from numpy's generator: nothing is compiled."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), skeleton(CONFIG))


def write(folder: pathlib.Path, config: object = CONFIG, dtype: str = "float32") -> pathlib.Path:
    eqx_moe.save_pretrained(model(config), folder, tokenizer=tokenizer(), dtype=dtype)
    return folder
