"""From the `rope_parameters` of a config to the records of `eqx_moe.nn.rope`."""

import math
from typing import Any

import numpy as np

from eqx_moe.family.config import ConfigError, RopeParameters, head_dim
from eqx_moe.nn.rope import AbstractRope, DefaultRope, DynamicRope, LinearRope, Llama3Rope, LongRope, YarnRope

# What each kind reads besides rope_theta; the second tuple may be absent.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("factor",)),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}

# Frequencies and angles are computed in float32. Divided by the smallest, one times any position is finite in it.
_SMALLEST, _LARGEST = 2.0**-96, float(np.finfo(np.float32).max)
_IN_FLOAT32 = f"at most {_LARGEST:.3g}, as float32 is"


def rope(config: Any) -> AbstractRope:
    """The rotary embedding that a config asks for."""
    p: RopeParameters = config.rope_parameters
    dim = head_dim(config)
    _check(p, dim)
    theta, positions = p.rope_theta, config.max_position_embeddings
    factor, original = p.factor or 1.0, p.original_max_position_embeddings or positions
    match p.rope_type:
        case "linear":
            return LinearRope(dim, theta, factor)
        case "dynamic":
            return DynamicRope(dim, theta, factor, positions)
        case "llama3":
            assert p.low_freq_factor is not None and p.high_freq_factor is not None
            return Llama3Rope(dim, theta, factor, p.low_freq_factor, p.high_freq_factor, original)
        case "yarn":
            factor = p.factor or positions / original
            truncate = True if p.truncate is None else p.truncate
            return YarnRope(
                dim, theta, factor, original, p.beta_fast or 32.0, p.beta_slow or 1.0, truncate, _yarn_scale(p, factor)
            )
        case "longrope":
            assert p.short_factor is not None and p.long_factor is not None
            factor = p.factor or positions / original
            scale = p.attention_factor
            if scale is None:
                scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return LongRope(dim, theta, p.short_factor, p.long_factor, original, scale)
        case _:
            return DefaultRope(dim, theta)


def position_limit(config: Any) -> int:
    """How many tokens a row may have: max_position_embeddings, times the factor where the rope grows with the row."""
    p: RopeParameters = config.rope_parameters
    limit = config.max_position_embeddings
    return math.floor(limit * p.factor) if p.rope_type == "dynamic" and p.factor else limit


def _yarn_scale(p: RopeParameters, factor: float) -> float:
    """The attention factor: as given, else YaRN section 3.4, with DeepSeek's two mscales where both are given."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if p.attention_factor is not None:
        return p.attention_factor
    if p.mscale and p.mscale_all_dim:
        return mscale(p.mscale) / mscale(p.mscale_all_dim)
    return mscale(1.0)


def _check(p: RopeParameters, dim: int) -> None:
    if p.rope_type not in _KEYS:
        raise ConfigError("rope_parameters.rope_type", f"one of {sorted(_KEYS)}", p.rope_type)
    if not 1 < p.rope_theta <= _LARGEST:
        raise ConfigError("rope_parameters.rope_theta", f"above 1 and {_IN_FLOAT32}", p.rope_theta)
    needed, optional = _KEYS[p.rope_type]
    for key in needed:
        if getattr(p, key) is None:
            raise ConfigError(f"rope_parameters.{key}", f"given for rope_type {p.rope_type!r}", None)
    for key in (*needed, *optional):
        value = getattr(p, key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not _SMALLEST <= value <= _LARGEST:
            raise ConfigError(f"rope_parameters.{key}", f"above 0 and {_IN_FLOAT32}", value)
    if p.rope_type == "llama3" and not (p.high_freq_factor or 0) > (p.low_freq_factor or 0):
        raise ConfigError(
            "rope_parameters.high_freq_factor", f"above low_freq_factor ({p.low_freq_factor})", p.high_freq_factor
        )
    if p.rope_type == "dynamic" and dim <= 2:
        raise ConfigError("head_dim", "above 2 for dynamic rope", dim)
    if p.rope_type == "dynamic" and (p.factor or 1) < 1:
        raise ConfigError("rope_parameters.factor", "at least 1 for dynamic rope", p.factor)
    for key in ("short_factor", "long_factor"):
        value = getattr(p, key)
        if p.rope_type == "longrope":
            if len(value) != dim // 2 or not _SMALLEST <= min(value) <= max(value) <= _LARGEST:
                expected = f"{dim // 2} positive numbers (head_dim / 2), {_IN_FLOAT32}"
                raise ConfigError(f"rope_parameters.{key}", expected, value)
    # The reference warns of a factor below 1 and computes with it, so that it is no error here either. But a frequency
    # that is 0 in float32 is as if there were no positions.
    factors = {"factor": (p.factor or 1,), "short_factor": p.short_factor or (1,), "long_factor": p.long_factor or (1,)}
    for key, values in factors.items():
        if p.rope_theta * max(values) > _LARGEST:
            expected = f"{_IN_FLOAT32}, also when multiplied by rope_theta"
            raise ConfigError(f"rope_parameters.{key}", expected, max(values))
    # A key that the kind does not read would be ignored in silence, and so would what its author meant by it.
    unread = [
        key
        for key in RopeParameters.__dataclass_fields__
        if key not in ("rope_theta", "rope_type", *needed, *optional) and getattr(p, key) is not None
    ]
    if unread and not (
        p.rope_type in ("default", "dynamic", "linear") and unread == ["original_max_position_embeddings"]
    ):
        raise ConfigError("rope_parameters", f"without keys that rope_type {p.rope_type!r} does not read", unread)
