"""Pushing folders that others wrote: what arrives can be verified and loads, or nothing is sent."""

import json
import pathlib

import pytest
import tiny

import eqx_moe
from eqx_moe.errors import CheckpointError
from eqx_moe.push import push_folder

REPO = "org/tiny-model"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    eqx_moe.save_pretrained(tiny.model(), tmp_path / "folder", tiny.tokenizer(), max_shard_size=10_000)
    return tmp_path / "folder"


def renamed(folder: pathlib.Path, old: str, new: str) -> None:
    """Other names for the shards, in the folder and in its index."""
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(old, new))
    for file in folder.glob(f"*{old}*"):
        file.rename(folder / file.name.replace(old, new))


@pytest.mark.parametrize("sums", ["none", "stale", "garbage", "right"])
@pytest.mark.parametrize("names", ["model-", "part."])
def test_checksums_are_of_what_was_pushed(hub, folder, sums, names):
    """Transformers writes none, and leaves old ones as they are."""
    renamed(folder, "model-", names)
    file = folder / "eqx_moe.json"
    stale = dict.fromkeys(json.loads(file.read_text())["sha256"], "0" * 64)
    if sums == "none":
        file.unlink()
    elif sums != "right":
        file.write_text(json.dumps({"sha256": stale}) if sums == "stale" else "{")
    _, left_out = push_folder(folder, REPO)
    assert not left_out and hub.commits == 1
    eqx_moe.from_pretrained(REPO, verify=True)
    listed = json.loads(hub.repos[REPO].files()["eqx_moe.json"])["sha256"]
    assert set(listed) == {name for name in hub.repos[REPO].files() if "safetensors" in name}


@pytest.mark.parametrize(
    "file, content, code",
    [
        ("generation_config.json", "{", "CFG-JSON"),
        ("generation_config.json", '{"eos_token_id": "none"}', "CFG-VALUE"),
        ("tokenizer.json", "{", "TOK-JSON"),
        ("tokenizer.json", '{"model": {}}', "TOK-LOAD"),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "TOK-JSON"),
        ("special_tokens_map.json", "[]", "TOK-JSON"),
    ],
)
def test_what_would_not_load_is_not_pushed(hub, folder, file, content, code):
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=code):
        push_folder(folder, REPO)
    assert not hub.requests
    (folder / file).unlink()
    push_folder(folder, REPO)
    eqx_moe.from_pretrained(REPO)


def test_another_model_takes_the_place_of_shards_with_six_digits(hub, folder):
    """As in `model-00001-of-000163.safetensors`, which is how DeepSeek-V3's are named."""
    renamed(folder, "-of-00004", "-of-000004")
    push_folder(folder, REPO)
    assert len([name for name in hub.repos[REPO].files() if "-of-000004.safetensors" in name]) == 4
    eqx_moe.push_to_hub(tiny.model(seed=4), REPO)
    assert [name for name in hub.repos[REPO].files() if "safetensors" in name] == ["model.safetensors"]
    eqx_moe.from_pretrained(REPO, verify=True)
