"""Checkpoints with weights from NumPy, for the tests of `convert/`: nothing is compiled to make one."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import tiny

import eqx_moe
from eqx_moe.checkpoint.names import leaf_paths
from eqx_moe.checkpoint.writer import save_leaves
from eqx_moe.models import config_to_json, family_of, skeleton

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
#: Not one layer, as `tiny.CONFIG` has it: what is mixed up between layers should show.
CONFIG = dataclasses.replace(tiny.CONFIG, num_hidden_layers=2)
DENSE = eqx_moe.MistralConfig(
    **{
        field.name: getattr(CONFIG, field.name)
        for field in dataclasses.fields(eqx_moe.MistralConfig)
        if hasattr(CONFIG, field.name)
    }
)


def values(config: object, dtype: str = "float32", seed: int = 5) -> dict[str, np.ndarray]:
    """The leaves of a model with random weights."""
    rng = np.random.default_rng(seed)
    shapes = {path: leaf.shape for path, leaf in leaf_paths(skeleton(config)).items()}
    return {path: rng.normal(0, 0.2, shape).astype(DTYPES[dtype]) for path, shape in shapes.items()}


def write(
    folder: pathlib.Path,
    config: object = CONFIG,
    dtype: str = "float32",
    layout: str = "original",
    max_shard_size: int | str = "5GB",
    tokenizer: bool = False,
) -> dict[str, np.ndarray]:
    """A checkpoint folder; returns its leaves."""
    files = {
        "config.json": json.dumps(config_to_json(config, dtype)).encode(),
        "generation_config.json": b'{"bos_token_id": 0, "eos_token_id": 0, "temperature": 0.7}',
        "chat_template.jinja": b"{{ messages }}",
    }
    if tokenizer:
        files["tokenizer.json"] = tiny.tokenizer().to_str().encode()
    leaves = values(config, dtype)
    names = family_of(config).names(config)[layout]
    save_leaves(folder, leaves, names, max_shard_size=max_shard_size, other_files=files)
    return leaves
