"""What a family is: a record of its config, its wiring and its names, and the pieces that families share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.checkpoint.names import Name, Skipped
from eqx_moe.errors import CheckpointError
from eqx_moe.family.config import (
    ConfigError,
    RopeParameters,
    check_container,
    config_problem,
    fields_from_json,
    head_dim,
    to_json,
)
from eqx_moe.family.generation_config import default_generation_config
from eqx_moe.family.rope import rope
from eqx_moe.nn.attention import Attention
from eqx_moe.nn.block import Block
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.embedding import Embedding
from eqx_moe.nn.linear import Linear
from eqx_moe.nn.mla import MLA
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
    #: Models that are of this family.
    covers: tuple[str, ...] = ()
    #: Where config.json says nothing of the rope, or no theta.
    default_rope: RopeParameters = RopeParameters()
    #: Other names for `model_type`, in configs of the same form.
    also: tuple[str, ...] = ()
    #: Other spellings of config keys.
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: Keys that configs of the family may have besides its fields, with the one value that is implemented.
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: Keys that are always written so, whatever was read.
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: For a config, tensors that are known and left out.
    skipped: Callable[[Any], tuple[Skipped, ...]] = lambda config: ()
    #: Quantised containers that its checkpoints come in, by their `quant_method`; they are decoded as they are read.
    containers: tuple[str, ...] = ("fp8",)
    #: Leaves that stay float32 whatever dtype is asked for.
    keep_fp32: tuple[str, ...] = ()

    def parse(self, data: Mapping[str, Any], file: str) -> Any:
        """The config dataclass from a config.json object; `CheckpointError` with code CFG-VALUE."""
        try:
            check_container(data.get("quantization_config"), self.containers)
            return self.config(**fields_from_json(data, self.config, self.aliases, self.default_rope, self.only))
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
        return to_json(config, self.model_type, self.architecture, dtype) | dict(self.written)


def decoder(
    config: Any,
    *,
    kinds: Sequence[Any] | None = None,
    attention: Callable[[Any, PRNGKeyArray], Attention | MLA],
    feed_forward: Callable[[Any, PRNGKeyArray], MLP | MoE],
    round_last: bool = False,
    dtype: DTypeLike,
    key: PRNGKeyArray,
) -> Decoder:
    """A pre-norm decoder whose parts the family picks for each kind of layer; weights are normal(0, initializer_range).

    Args:
        kinds: all that tells layers apart, as one hashable value for each; None: they are alike. The functions that
            make a layer's parts are given the kind, so that a program traces each kind once.
        round_last: that of its norms, see `RMSNorm`.
    """

    def norm() -> RMSNorm:
        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, round_last=round_last, dtype=dtype)

    def layer(kind: Any, key: PRNGKeyArray) -> Block:
        attention_key, ffn_key = jax.random.split(key)
        part = feed_forward(kind, ffn_key)
        return Block(
            attention_norm=norm(),
            attention=attention(kind, attention_key),
            ffn_norm=norm(),
            mlp=part if isinstance(part, MLP) else None,
            moe=part if isinstance(part, MoE) else None,
        )

    embed_key, head_key, layers_key = jax.random.split(key, 3)
    layer_keys = jax.random.split(layers_key, config.num_hidden_layers)
    # Outside of a program this would compile a whole layer, where each draw of a shape compiles once for all models.
    make = eqx.filter_jit(layer) if isinstance(layer_keys, Tracer) else layer
    each = [None] * config.num_hidden_layers if kinds is None else kinds
    std = config.initializer_range
    head = None
    if not config.tie_word_embeddings:
        head = Linear(config.hidden_size, config.vocab_size, std=std, dtype=dtype, key=head_key)
    return Decoder(
        embed=Embedding(config.vocab_size, config.hidden_size, std=std, dtype=dtype, key=embed_key),
        layers=tuple(make(kind, key) for kind, key in zip(each, layer_keys, strict=True)),
        norm=norm(),
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
    qk_norm: Literal["head", "all"] | None = None,
    clip: float | None = None,
    sinks: bool = False,
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
        qk_norm=qk_norm,
        qk_norm_eps=config.rms_norm_eps,
        clip=clip,
        sinks=sinks,
        std=config.initializer_range,
        dtype=dtype,
        key=key,
    )


#: What templates of a layer begin with, ours and theirs.
LAYER, THEIRS = "layers.{l}.", "model.layers.{l}."


def decoder_names(config: Any, attention: tuple[Name, ...]) -> tuple[Name, ...]:
    """The rows that all families with Llama's layout share, and those of attention: all but the feed-forward part."""
    rows = [
        Name("embed.weight", "model.embed_tokens.weight"),
        Name(LAYER + "attention_norm.weight", THEIRS + "input_layernorm.weight"),
        Name(LAYER + "ffn_norm.weight", THEIRS + "post_attention_layernorm.weight"),
        Name("norm.weight", "model.norm.weight"),
        *attention,
    ]
    if not config.tie_word_embeddings:
        rows.append(Name("head.weight", "lm_head.weight"))
    return tuple(rows)


def gqa_names(
    *, qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False, sinks: bool = False
) -> tuple[Name, ...]:
    """The rows of grouped-query attention."""
    rows: list[Name] = []
    for part, bias in (("q", qkv_bias), ("k", qkv_bias), ("v", qkv_bias), ("o", o_bias)):
        rows += linear_names(LAYER + f"attention.{part}", THEIRS + f"self_attn.{part}_proj", bias=bias)
    if qk_norm:
        rows += [
            Name(LAYER + f"attention.{part}_norm.weight", THEIRS + f"self_attn.{part}_norm.weight") for part in "qk"
        ]
    if sinks:
        rows.append(Name(LAYER + "attention.sinks", THEIRS + "self_attn.sinks"))
    return tuple(rows)


def mla_names(*, q_latent: bool, bias: bool) -> tuple[Name, ...]:
    """The rows of multi-head latent attention; `bias` is that of the maps to latents and of the output."""
    ours, theirs = LAYER + "attention.", THEIRS + "self_attn."
    rows = linear_names(ours + "kv_a", theirs + "kv_a_proj_with_mqa", bias=bias)
    rows += linear_names(ours + "kv_b", theirs + "kv_b_proj", bias=False)
    rows += linear_names(ours + "o", theirs + "o_proj", bias=bias)
    rows.append(Name(ours + "kv_a_norm.weight", theirs + "kv_a_layernorm.weight"))
    if not q_latent:
        return (*rows, *linear_names(ours + "q", theirs + "q_proj", bias=False))
    rows += linear_names(ours + "q_a", theirs + "q_a_proj", bias=bias)
    rows += linear_names(ours + "q", theirs + "q_b_proj", bias=False)
    return (*rows, Name(ours + "q_a_norm.weight", theirs + "q_a_layernorm.weight"))


def mlp_names(ours: str = "mlp", theirs: str = "mlp", *, bias: bool = False) -> tuple[Name, ...]:
    """The rows of a dense feed-forward part."""
    rows: list[Name] = []
    for part in ("gate", "up", "down"):
        rows += linear_names(f"{LAYER}{ours}.{part}", f"{THEIRS}{theirs}.{part}_proj", bias=bias)
    return tuple(rows)


def moe_names() -> Layouts:
    """The rows of a router and its experts, as most families have them, and as transformers 5 packs them."""
    experts, theirs = LAYER + "moe.experts.", THEIRS + "mlp."
    router = Name(LAYER + "moe.router.weight", theirs + "gate.weight")
    original = [Name(experts + part, f"{theirs}experts.{{e}}.{part}_proj.weight") for part in ("gate", "up", "down")]
    packed = (
        Name((experts + "gate", experts + "up"), theirs + "experts.gate_up_proj"),
        Name(experts + "down", theirs + "experts.down_proj"),
    )
    return {"original": (router, *original), "packed": (router, *packed)}


def linear_names(ours: str, theirs: str, *, bias: bool) -> list[Name]:
    """The rows of one linear map."""
    return [Name(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in (("weight", "bias") if bias else ("weight",))]


def rotary_buffers(config: Any) -> tuple[Skipped, ...]:
    """Older Llama checkpoints carry the rotary frequencies, which follow from the config."""
    return (Skipped("model.layers.{l}.self_attn.rotary_emb.inv_freq", "follows from config.json"),)
