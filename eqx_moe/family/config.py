"""Reading and writing config.json: which keys there are, what they may hold, and what is not understood.

A config is a frozen dataclass whose fields are the json file's own. Every other key is either ignored on purpose
(`IGNORED`, each with its reason) or unknown (one warning); both are kept in `extra` and written back.
"""

import dataclasses
import json
import math
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any

from eqx_moe.checkpoint.quantised import BLOCK
from eqx_moe.errors import CheckpointError

IGNORED = {
    "_name_or_path": "where a checkpoint once lay",
    "architectures": "follows from model_type; written anew",
    "aux_loss_alpha": "a loss of DeepSeek's training, which is not in the reference",
    "auto_map": "code from a checkpoint is never run",
    "ep_size": "how DeepSeek's own code spreads its experts",
    "initial_context_length": "gpt-oss's other name for the rope's original_max_position_embeddings",
    "layer_types": "in families that mix no kinds of layers: checked to say so",
    "max_window_layers": "in families whose layers all have the window or none, as Qwen3-MoE's in the reference",
    "model_type": "chooses the family",
    "output_attentions": "a switch of the reference's forward pass",
    "output_hidden_states": "a switch of the reference's forward pass",
    "output_router_logits": "`forward` always returns them",
    "original_max_position_embeddings": "only some kinds of rope read it",
    "pretraining_tp": "a way to slice the reference's matrix products",
    "qk_head_dim": "the sum of qk_nope_head_dim and qk_rope_head_dim",
    "return_dict": "a switch of the reference's forward pass",
    "seq_aux": "a loss of DeepSeek's training, which is not in the reference",
    "torch_dtype": "the older name of dtype",
    "transformers_version": "who wrote the file",
    "transformers.js_config": "for another runtime",
    "trust_remote_code": "code from a checkpoint is never run",
    "unsloth_fixed": "who wrote the file",
    "unsloth_version": "who wrote the file",
    "use_cache": "whether to cache is said by each call",
}

# Keys that are written from the fields, under every name that readers know; and what names code that is not written.
_REWRITTEN = {"architectures", "model_type", "torch_dtype", "rope_scaling", "rope_theta", "auto_map"}

#: Under which name a config has its number of experts.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")

# What is a size or a count, and at least 1.
_SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads max_position_embeddings head_dim num_experts_per_tok sliding_window decoder_sparse_step "
    "n_shared_experts n_group topk_group kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
).split()

# Above these a number is a mistake, and building names or shapes from it would only take long. The largest releases of
# 2026 have 126 layers, 512 experts in a layer, and 23,424 in all.
_LIMITS = {"num_hidden_layers": 512} | dict.fromkeys(EXPERT_COUNTS, 8192)
_MOST_EXPERTS = 2**16  # in all layers
_LARGEST = 2**31 - 1

# quant_method -> what its `quantization_config` must say.
_CONTAINERS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    "mxfp4": {"quant_method": "mxfp4"},
}

_DTYPES = ("float32", "float16", "bfloat16")


class ConfigError(ValueError):
    """A config value that cannot be: which key, what was expected, what was found."""

    def __init__(self, key: str, expected: str, found: Any):
        super().__init__(f"`{key}` must be {expected}; got {found!r}.")
        self.key, self.expected, self.found = key, expected, found


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """The `rope_parameters` object of config.json. Fields that a kind of rope does not read must stay None."""

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self):
        check_types(self, "rope_parameters.")


def typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its field's annotation, or a `ConfigError`. Only integers convert, to floats."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, hint):
        return value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if value is None and option is types.NoneType:
            return None
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _finite(key, value)
        if option is str and isinstance(value, str):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            element = typing.get_args(option)[0]
            return tuple(typed(f"{key}[{i}]", each, element) for i, each in enumerate(value))
    raise ConfigError(key, _describe(options), value)


def _finite(key: str, value: int | float) -> float:
    if not math.isfinite(value) or abs(value) > 1e300:
        raise ConfigError(key, "a finite number", value)
    return float(value)


def _describe(options: tuple[Any, ...]) -> str:
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", types.NoneType: "null"}
    words |= {RopeParameters: "a RopeParameters"}
    return " or ".join(words.get(option, "a list") for option in options)


def check_types(config: Any, prefix: str = "") -> None:
    """Type-checks every field of a config in place; integers become floats where a float is due."""
    for name, hint in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, typed(prefix + name, getattr(config, name), hint))


def rope_from_json(value: dict[str, Any]) -> RopeParameters:
    """A `RopeParameters` from its json object."""
    value = dict(value)
    partial = value.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ConfigError("rope_parameters.partial_rotary_factor", "1.0: this family turns whole heads", partial)
    hints = typing.get_type_hints(RopeParameters)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ConfigError("rope_parameters", f"made of the keys {sorted(hints)}", unknown)
    return RopeParameters(**{k: typed(f"rope_parameters.{k}", v, hints[k]) for k, v in value.items()})


def check_common(config: Any) -> None:
    """What holds for every family: sizes in range, heads shared evenly, ids in the vocabulary, all implemented."""
    if config.num_key_value_heads is None:
        object.__setattr__(config, "num_key_value_heads", config.num_attention_heads)
    check_types(config)
    for key in (*_SIZES, *EXPERT_COUNTS):
        value = getattr(config, key, None)
        if key == "sliding_window" and value == 0 and getattr(config, "use_sliding_window", True) is False:
            continue  # how Qwen checkpoints that were saved again say "none"
        if value is not None and not 0 < value <= _LIMITS.get(key, _LARGEST):
            raise ConfigError(key, f"in [1, {_LIMITS.get(key, _LARGEST)}]", value)
    check_experts(config)
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            "num_key_value_heads",
            f"a divisor of num_attention_heads ({config.num_attention_heads})",
            config.num_key_value_heads,
        )
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            "hidden_size",
            f"a multiple of num_attention_heads ({config.num_attention_heads}), or head_dim be given",
            config.hidden_size,
        )
    if head_dim(config) % 2:
        raise ConfigError("head_dim", "even, for rotary embeddings turn pairs", head_dim(config))
    if not 0 < config.rms_norm_eps < 1:
        raise ConfigError("rms_norm_eps", "in (0, 1)", config.rms_norm_eps)
    if config.hidden_act != "silu":
        raise ConfigError("hidden_act", "'silu', the one that is implemented", config.hidden_act)
    if config.attention_dropout != 0:
        raise ConfigError("attention_dropout", "0.0: dropout is not implemented", config.attention_dropout)
    if config.initializer_range < 0:
        raise ConfigError("initializer_range", "at least 0", config.initializer_range)
    if config.dtype is not None and config.dtype not in _DTYPES:
        raise ConfigError("dtype", f"one of {list(_DTYPES)}", config.dtype)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_token_ids(key, getattr(config, key), config.vocab_size)


def check_experts(config: Any) -> None:
    """A token visits no more experts than there are, of which there are not too many; router losses and noise are in
    range."""
    for key in EXPERT_COUNTS:
        experts = getattr(config, key, None)
        if experts is not None and experts * config.num_hidden_layers > _MOST_EXPERTS:
            most = _MOST_EXPERTS // config.num_hidden_layers
            raise ConfigError(key, f"at most {most} with {config.num_hidden_layers} layers", experts)
        if experts is not None and config.num_experts_per_tok > experts:
            raise ConfigError("num_experts_per_tok", f"at most {key} ({experts})", config.num_experts_per_tok)
    if getattr(config, "router_aux_loss_coef", 0.0) < 0:
        raise ConfigError("router_aux_loss_coef", "at least 0", config.router_aux_loss_coef)
    if not 0 <= getattr(config, "router_jitter_noise", 0.0) < 1:
        raise ConfigError("router_jitter_noise", "in [0, 1)", config.router_jitter_noise)


def check_token_ids(key: str, value: int | tuple[int, ...] | None, vocab: int) -> None:
    """Special ids must be tokens."""
    for token in () if value is None else value if isinstance(value, tuple) else (value,):
        if not 0 <= token < vocab:
            raise ConfigError(key, f"in [0, {vocab}), the vocabulary", token)


def head_dim(config: Any) -> int:
    """The head size: its own key, or hidden_size / num_attention_heads."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def check_windows(config: Any) -> None:
    """Qwen's way to say which layers have a window: `layer_types`, or the layers from `max_window_layers` on."""
    if config.use_sliding_window and config.sliding_window is None:
        raise ConfigError("sliding_window", "given when use_sliding_window is true", None)
    if config.max_window_layers < 0:
        raise ConfigError("max_window_layers", "at least 0", config.max_window_layers)
    if config.layer_types is None:
        return
    check_layer_types(config)
    if "sliding_attention" in config.layer_types and not config.use_sliding_window:
        raise ConfigError(
            "layer_types", "without 'sliding_attention' when use_sliding_window is false", list(config.layer_types)[:20]
        )


def check_layer_types(config: Any) -> None:
    """`layer_types` names one of two kinds of attention for each layer."""
    kinds = ("full_attention", "sliding_attention")
    if len(config.layer_types) != config.num_hidden_layers or not set(config.layer_types) <= set(kinds):
        raise ConfigError("layer_types", f"{config.num_hidden_layers} of {list(kinds)}", list(config.layer_types)[:20])
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ConfigError("sliding_window", "given where layer_types has 'sliding_attention'", None)


def windows_of(config: Any) -> list[int | None]:
    """The window of each layer, by `layer_types` or else by the rule that `check_windows` describes."""
    if config.layer_types is not None:
        slides = [kind == "sliding_attention" for kind in config.layer_types]
    else:
        slides = [config.use_sliding_window and i >= config.max_window_layers for i in range(config.num_hidden_layers)]
    return [config.sliding_window if each else None for each in slides]


def fields_from_json(
    data: Mapping[str, Any],
    config: type,
    aliases: Mapping[str, str],
    default_rope: RopeParameters,
    only: Mapping[str, Any],
) -> dict[str, Any]:
    """The constructor's arguments from a config.json object, either dialect (v4: rope_theta and rope_scaling; v5:
    rope_parameters). Keys of `only` may be there, with that value.

    Warns once about keys that nobody knows. Contradictions between two spellings of one thing are `ConfigError`s.
    """
    data = dict(data)
    for alias, key in aliases.items():
        if alias in data:
            value = data.pop(alias)
            _agree(data.setdefault(key, value), value, alias, key)
    rope = _rope_json(data, default_rope)
    spellings = [
        value.removeprefix("torch.") if isinstance(value, str) else value
        for value in (data.get("dtype"), data.get("torch_dtype"))
        if value is not None
    ]
    if len(spellings) == 2:
        _agree(spellings[0], spellings[1], "torch_dtype", "dtype")
    dtype = spellings[0] if spellings else None
    # Weights in a quantised container are decoded as they are read, so that the config keeps nothing of it.
    data.pop("quantization_config", None)
    known = {field.name for field in dataclasses.fields(config)} - {"extra", "rope_parameters", "dtype"}
    hints = typing.get_type_hints(config)
    values: dict[str, Any] = {key: typed(key, data[key], hints[key]) for key in sorted(known) if key in data}
    _check_layer_types(data, values, config)
    rest = {k: v for k, v in data.items() if k not in known and k not in ("rope_parameters", "dtype")}
    for key, value in only.items():
        if key in rest and (rest[key] != value or type(rest[key]) is not type(value)):
            raise ConfigError(key, f"{value!r}, the one that is implemented", rest[key])
    unknown = sorted(key for key in rest if key not in IGNORED and key not in _REWRITTEN and key not in only)
    if unknown:
        warnings.warn(
            f"config.json has keys that nothing here reads: {[key[:80] for key in unknown[:20]]}. They are kept.",
            stacklevel=2,
        )
    extra = tuple((k, json.dumps(v)) for k, v in rest.items() if k not in _REWRITTEN)
    dtype = typed("dtype", dtype, hints["dtype"])
    return values | {"rope_parameters": rope_from_json(rope), "dtype": dtype, "extra": extra}


def check_container(container: Any, methods: tuple[str, ...]) -> None:
    """The `quantization_config` of a config.json must be of one of the methods that a family is read in."""
    if container is None:
        return
    read = [_CONTAINERS[method] for method in methods]
    found = container if isinstance(container, dict) else {}
    if not any(all(found.get(key) == value for key, value in keys.items()) for keys in read):
        expected = f"absent, or with {' or '.join(map(str, read))}: no other container of this family is read"
        raise ConfigError("quantization_config", expected, container)


def _agree(found: Any, other: Any, spelled: str, proper: str) -> None:
    """Two spellings of one thing, `proper` and `spelled`, must say the same."""
    if found != other:
        raise ConfigError(spelled, f"equal to {proper} ({found!r})", other)


def _check_layer_types(data: Mapping[str, Any], values: Mapping[str, Any], config: type) -> None:
    """Families without the key have one kind of attention; a list that says otherwise would change results."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    if "layer_types" in defaults or data.get("layer_types") is None:
        return
    window, layers = ({**defaults, **values}.get(key) for key in ("sliding_window", "num_hidden_layers"))
    if not {**defaults, **values}.get("use_sliding_window", True):
        window = None
    kind = "full_attention" if window is None else "sliding_attention"
    found = data["layer_types"]
    # The length is compared, no list of it made: the number of layers is not held against its limit yet.
    if not isinstance(found, list) or len(found) != layers or any(each != kind for each in found):
        raise ConfigError("layer_types", f"{kind!r} for each of {layers} layers (this family mixes none)", found)


def _rope_json(data: dict[str, Any], default: RopeParameters) -> dict[str, Any]:
    """One rope object out of the two dialects and the keys beside them, which it takes out of `data`."""
    rope = _one_dialect(data) or {**_given(default), "rope_theta": None}
    for key in ("rope_theta", "partial_rotary_factor"):
        _take_over(data, key, rope)
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = default.rope_theta
    if rope.get("rope_type", "default") in ("llama3", "yarn", "longrope"):
        # Elsewhere the key says nothing, and stays among those that are kept.
        _take_over(data, "original_max_position_embeddings", rope)
        rope.setdefault("original_max_position_embeddings", data.get("max_position_embeddings"))
    return rope


def _take_over(data: dict[str, Any], key: str, rope: dict[str, Any]) -> None:
    """Moves a top-level key into the rope object, which must not say otherwise."""
    value = data.pop(key, None)
    if value is not None:
        if rope.get(key) is not None:
            _agree(rope[key], value, key, f"rope_parameters.{key}")
        rope[key] = value


def _one_dialect(data: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (v5) or `rope_scaling` (v4), whichever is there; an empty one says nothing.

    Where both are, transformers 5.23 `standardize_rope_params` takes the older in silence; here they must agree.
    """
    given: dict[str, dict[str, Any]] = {}
    for source in ("rope_scaling", "rope_parameters"):
        value = data.get(source)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(source, "an object or null", value)
        if value:
            given[source] = dict(value)
            if "type" in value:
                kind = given[source].pop("type")
                _agree(given[source].setdefault("rope_type", kind), kind, f"{source}.type", f"{source}.rope_type")
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if len(given) < 2:
        return rope
    scaling = given["rope_scaling"]
    for key in (*scaling, *sorted(set(rope) - set(scaling))):
        # The older dialect has these two beside rope_scaling, and does not speak of the default kind.
        beside = key in ("rope_theta", "partial_rotary_factor") or (key, rope.get(key)) == ("rope_type", "default")
        if key in scaling or not beside:
            _agree(rope.get(key), scaling.get(key), f"rope_scaling.{key}", f"rope_parameters.{key}")
    return rope


def to_json(config: Any, model_type: str, architecture: str, dtype: str) -> dict[str, Any]:
    """The config.json object: exact types (0.0, never 0), an explicit head_dim, and the rope in both dialects' keys."""
    data: dict[str, Any] = {"architectures": [architecture], "model_type": model_type, "dtype": dtype}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("extra", "dtype", "rope_parameters"):
            continue
        data[field.name] = list(value) if isinstance(value, tuple) else value
    data["head_dim"] = head_dim(config)
    rope = _given(config.rope_parameters)
    data["rope_parameters"] = rope
    data["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        data["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    for key, text in config.extra:
        data.setdefault(key, json.loads(text))
    return data


def _given(rope: RopeParameters) -> dict[str, Any]:
    """The json object of the parameters that are not None."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(rope).items() if v is not None}


def config_problem(error: ConfigError, file: str, doing: str) -> CheckpointError:
    """A `ConfigError` as the error that loading raises."""
    return CheckpointError(
        code="CFG-VALUE",
        doing=doing,
        file=file,
        item=error.key,
        expected=error.expected,
        found=repr(error.found)[:200],
        fix="correct the value, or take the file from the checkpoint's source again",
    )
