"""Loading without the Hub, from what its cache holds, whoever filled it."""

import pathlib
import shutil

import huggingface_hub
import pytest
import tiny
from downloading import CONFIG, GENERATION, INDEX, REPO, SHARDS, cache, files_of, refused, weights
from huggingface_hub import constants

import eqx_moe


@pytest.fixture
def unplugged(repo, monkeypatch):
    """Pulls the plug: nothing listens at the client's address any more."""

    def pull() -> None:
        repo.requests.clear()
        repo.connect(monkeypatch.setattr, "http://127.0.0.1:9")

    return pull


def test_offline_from_the_cache(repo, right, unplugged, monkeypatch, caplog):
    eqx_moe.from_pretrained(REPO)
    eqx_moe.load_tokenizer(REPO)
    unplugged()
    assert weights(eqx_moe.from_pretrained(REPO, local_files_only=True)) == right
    assert eqx_moe.load_tokenizer(REPO, local_files_only=True).to_str() == tiny.tokenizer().to_str()
    assert not repo.naps and not caplog.records
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    assert "taken from the cache" in caplog.text and sum(repo.naps) < 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    refused("HUB-OFFLINE", where="org/never-seen")


def test_offline_with_a_part(repo, unplugged, saved):
    refused("HUB-OFFLINE", "'main'", local_files_only=True)
    eqx_moe.load_config(REPO)
    assert eqx_moe.load_config(REPO, local_files_only=True) == eqx_moe.load_config(REPO)
    refused("HUB-OFFLINE", GENERATION, local_files_only=True)
    eqx_moe.from_pretrained(REPO)
    for name in SHARDS[1:3]:
        next(cache().glob(f"snapshots/*/{name}")).unlink()
    unplugged()
    refused("HUB-OFFLINE", SHARDS[1], SHARDS[2], local_files_only=True)
    assert not repo.requests


def test_a_cache_that_others_filled(repo, right, saved, unplugged):
    """Nothing of ours beside it: what lies there is the model, and the names of the blobs are hashes."""
    huggingface_hub.snapshot_download(REPO)
    unplugged()
    assert weights(eqx_moe.from_pretrained(REPO, local_files_only=True)) == right
    shutil.rmtree(cache() / ".eqx_moe")
    blob = next(cache().glob(f"snapshots/*/{SHARDS[0]}")).resolve()
    content = bytearray(blob.read_bytes())
    content[-7] ^= 4
    blob.write_bytes(content)
    refused("HUB-HASH", SHARDS[0], "download it again", local_files_only=True)
    refused("HUB-OFFLINE", SHARDS[0], local_files_only=True)


def test_a_cache_that_cannot_be_written_to(repo, right, monkeypatch):
    """As root no permission stops anybody, so writing is made to fail."""
    huggingface_hub.snapshot_download(REPO)

    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "write_text", refuse)
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    for _ in range(2):
        assert weights(eqx_moe.from_pretrained(REPO)) == right


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("way", ["argument", "variable", "unreachable"])
def test_what_others_filled_is_loaded_without_a_request(hub, saved, right, tmp_path, monkeypatch, shards, way):
    """A model in one file has no index, and not every model has a generation config."""
    files = saved if shards == 4 else files_of(tmp_path / "single", seed=3, max_shard_size="1GB")
    hub.put(REPO, {name: content for name, content in files.items() if name != GENERATION})
    huggingface_hub.snapshot_download(REPO)
    hub.requests.clear()
    if way == "variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif way == "unreachable":
        hub.connect(monkeypatch.setattr, "http://127.0.0.1:9")
    only = way == "argument"
    assert weights(eqx_moe.from_pretrained(REPO, local_files_only=only)) == right
    assert eqx_moe.load_tokenizer(REPO, local_files_only=only).to_str() == tiny.tokenizer().to_str()
    assert not hub.requests and sum(hub.naps) <= 2


def test_what_others_filled_in_part_is_said(repo):
    for patterns, absent in (
        ([CONFIG], f"model.safetensors or {INDEX}"),
        ([CONFIG, SHARDS[0]], f"model.safetensors or {INDEX}"),
        ([CONFIG, INDEX, SHARDS[0]], SHARDS[3]),
        ([INDEX], CONFIG),
    ):
        shutil.rmtree(cache(), ignore_errors=True)
        huggingface_hub.snapshot_download(REPO, allow_patterns=patterns)
        repo.requests.clear()
        refused("HUB-OFFLINE", absent, local_files_only=True)
        assert not repo.requests
    with pytest.raises(eqx_moe.CheckpointError, match="HUB-OFFLINE.*"):
        eqx_moe.load_tokenizer(REPO, local_files_only=True)
    assert not repo.requests


@pytest.mark.parametrize("filled", ["others", "eqx_moe"])
def test_links_to_what_is_gone_are_no_files(repo, right, filled):
    """As who frees room by removing large blobs leaves them."""
    eqx_moe.from_pretrained(REPO) if filled == "eqx_moe" else huggingface_hub.snapshot_download(REPO)
    next(cache().glob(f"snapshots/*/{SHARDS[1]}")).resolve().unlink()
    repo.requests.clear()
    refused("HUB-OFFLINE", SHARDS[1], local_files_only=True)
    assert not repo.requests
    assert weights(eqx_moe.from_pretrained(REPO)) == right
