"""What tests of loading from the Hub share."""

import pathlib

import numpy as np
import pytest
import tiny
from huggingface_hub import constants

import eqx_moe
from eqx_moe.checkpoint import leaf_paths
from eqx_moe.errors import CheckpointError

REPO = "org/tiny-model"
INDEX, CONFIG, GENERATION = "model.safetensors.index.json", "config.json", "generation_config.json"
SHARDS = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
# The paths of the storage are hashes. A range from 0 is for a header, another goes on with a download.
LARGE = r"GET /[0-9a-f]{64}( bytes=[1-9]\d*-)?$"
HEADER = "GET /[0-9a-f]{64} bytes=0-"


def files_of(folder: pathlib.Path, seed: int, **options) -> dict[str, bytes]:
    eqx_moe.save_pretrained(
        tiny.model(seed=seed), folder, **{"tokenizer": tiny.tokenizer(), "max_shard_size": 10_000} | options
    )
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights(model) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaf_paths(model).values())


def refused(code: str, *parts: str, where: str | pathlib.Path = REPO, **options) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        eqx_moe.from_pretrained(where, **options)
    assert caught.value.code == code, caught.value
    for part in parts:
        assert part in str(caught.value), caught.value
    return caught.value


def cache() -> pathlib.Path:
    return pathlib.Path(constants.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}"
