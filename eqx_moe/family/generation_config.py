"""generation_config.json: the ids that end a row, and whatever else it holds, kept and written back."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from eqx_moe.family.config import ConfigError, check_token_ids, config_problem, typed

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Special ids under their json names. `extra` keeps sampling settings, which `generate` takes from its call."""

    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    extra: tuple[tuple[str, str], ...] = ()


def parse_generation_config(data: Mapping[str, Any], file: str, config: Any) -> GenerationConfig:
    """From the json object; ids are checked against the model's vocabulary."""
    values: dict[str, Any] = {}
    try:
        for key in _IDS:
            value = typed(key, data.get(key), int | tuple[int, ...] | None if key == "eos_token_id" else int | None)
            check_token_ids(key, value, config.vocab_size)
            values[key] = value
        for key, low in (("temperature", 0.0), ("top_p", 0.0), ("top_k", 0)):
            value = typed(key, data.get(key), float | None)
            if value is not None and (value < low or (key == "top_p" and value > 1)):
                raise ConfigError(key, "in [0, 1]" if key == "top_p" else f"at least {low}", value)
    except ConfigError as error:
        raise config_problem(error, file, "reading generation_config.json") from error
    eos = values["eos_token_id"]
    values["eos_token_id"] = () if eos is None else eos if isinstance(eos, tuple) else (eos,)
    extra = tuple((k, json.dumps(v)) for k, v in data.items() if k not in _IDS)
    return GenerationConfig(**values, extra=extra)


def default_generation_config(config: Any) -> GenerationConfig:
    """For a checkpoint without the file: the ids of its config."""
    eos = config.eos_token_id
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=() if eos is None else eos if isinstance(eos, tuple) else (eos,),
        pad_token_id=config.pad_token_id,
    )


def generation_config_to_json(config: GenerationConfig) -> dict[str, Any]:
    """The json object; one eos id is written as a number, several as a list."""
    eos = config.eos_token_id
    data: dict[str, Any] = {key: json.loads(text) for key, text in config.extra}
    data |= {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    data["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    return {key: value for key, value in data.items() if value is not None}
