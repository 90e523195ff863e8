"""What a family is: a record of its config, its wiring and its names, and the pieces that families share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.checkpoint.names import Name
from eqx_moe.errors import CheckpointError
from eqx_moe.family.config import ConfigError, config_problem, fields_from_json, head_dim, to_json
from eqx_moe.family.generation_config import default_generation_config
from eqx_moe.family.rope import rope
from eqx_moe.nn.attention import Attention
from eqx_moe.nn.block import Block
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.embedding import Embedding
from eqx_moe.nn.linear import Linear
from eqx_moe.nn.mlp import MLP
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.norm import RMSNorm

Layouts = Mapping[str, tuple[Name, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    `build(config, key=, dtype=, execution=)` makes a model with random weights, `names(config)` gives its name table
    for each layout on disk.
    """

    model_type: str
    architecture: str
    config: type
    build: Callable[..., Decoder]
    names: Callable[[Any], Layouts]
    default_theta: float = 10_000.0
    #: Other spellings of config keys.
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: Tensors that are known and left out, each with its reason.
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: Leaves that stay float32 whatever dtype is asked for.
    keep_fp32: tuple[str, ...] = ()

    def parse(self, data: Mapping[str, Any], file: str) -> Any:
        """The config dataclass from a config.json object; `CheckpointError` with code CFG-VALUE."""
        try:
            return self.config(**fields_from_json(data, self.config, self.aliases, self.default_theta))
        except ConfigError as error:
            raise config_problem(error, file, f"reading the config of a {self.model_type!r} model") from error
        except TypeError as error:  # a field without a default is missing
            missing = [
                field.name
                for field in dataclasses.fields(self.config)
                if field.default is dataclasses.MISSING and field.name not in data
            ]
            if not missing:
                raise
            raise CheckpointError(
                code="CFG-MISSING",
                doing=f"reading the config of a {self.model_type!r} model",
                file=file,
                item=missing[0],
                expected=f"the keys {missing}",
                found="a config without them",
                fix="take config.json from the checkpoint's source again",
            ) from error

    def to_json(self, config: Any, dtype: str) -> dict[str, Any]:
        """The config.json object of a model saved in `dtype`."""
        return to_json(config, self.model_type, self.architecture, dtype)


def decoder(
    config: Any,
    *,
    attention: Callable[[int, PRNGKeyArray], Attention],
    feed_forward: Callable[[int, PRNGKeyArray], MLP | MoE],
    dtype: DTypeLike,
    key: PRNGKeyArray,
) -> Decoder:
    """A pre-norm decoder whose parts the family picks layer by layer; weights are normal(0, initializer_range)."""
    embed_key, head_key, layers_key = jax.random.split(key, 3)
    std = config.initializer_range
    layers = []
    for i, layer_key in enumerate(jax.random.split(layers_key, config.num_hidden_layers)):
        attention_key, ffn_key = jax.random.split(layer_key)
        part = feed_forward(i, ffn_key)
        layers.append(
            Block(
                attention_norm=RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype),
                attention=attention(i, attention_key),
                ffn_norm=RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype),
                mlp=part if isinstance(part, MLP) else None,
                moe=part if isinstance(part, MoE) else None,
            )
        )
    head = None
    if not config.tie_word_embeddings:
        head = Linear(config.hidden_size, config.vocab_size, std=std, dtype=dtype, key=head_key)
    return Decoder(
        embed=Embedding(config.vocab_size, config.hidden_size, std=std, dtype=dtype, key=embed_key),
        layers=tuple(layers),
        norm=RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype),
        head=head,
        config=config,
        generation_config=default_generation_config(config),
    )


def gqa(
    config: Any,
    *,
    window: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    dtype: DTypeLike,
    key: PRNGKeyArray,
) -> Attention:
    """Grouped-query attention with the sizes and the rope of a config."""
    return Attention(
        config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        rope=rope(config),
        window=window,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm_eps=config.rms_norm_eps if qk_norm else None,
        std=config.initializer_range,
        dtype=dtype,
        key=key,
    )


_LAYER, _THEIRS = "layers.{l}.", "model.layers.{l}."


def decoder_names(
    config: Any, *, qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False
) -> tuple[Name, ...]:
    """The rows that all families with Llama's layout share: everything but the feed-forward part."""
    rows = [
        Name("embed.weight", "model.embed_tokens.weight"),
        Name(_LAYER + "attention_norm.weight", _THEIRS + "input_layernorm.weight"),
        Name(_LAYER + "ffn_norm.weight", _THEIRS + "post_attention_layernorm.weight"),
        Name("norm.weight", "model.norm.weight"),
    ]
    for part, bias in (("q", qkv_bias), ("k", qkv_bias), ("v", qkv_bias), ("o", o_bias)):
        rows += linear_names(_LAYER + f"attention.{part}", _THEIRS + f"self_attn.{part}_proj", bias=bias)
    if qk_norm:
        rows += [
            Name(_LAYER + f"attention.{part}_norm.weight", _THEIRS + f"self_attn.{part}_norm.weight") for part in "qk"
        ]
    if not config.tie_word_embeddings:
        rows.append(Name("head.weight", "lm_head.weight"))
    return tuple(rows)


def mlp_names(*, bias: bool = False) -> tuple[Name, ...]:
    """The rows of a dense feed-forward part."""
    rows: list[Name] = []
    for part in ("gate", "up", "down"):
        rows += linear_names(_LAYER + f"mlp.{part}", _THEIRS + f"mlp.{part}_proj", bias=bias)
    return tuple(rows)


def linear_names(ours: str, theirs: str, *, bias: bool) -> list[Name]:
    """The rows of one linear map."""
    return [Name(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in (("weight", "bias") if bias else ("weight",))]


#: Older Llama checkpoints carry the rotary frequencies, which follow from the config.
ROTARY_BUFFERS = {"model.layers.{l}.self_attn.rotary_emb.inv_freq": "follows from config.json"}
