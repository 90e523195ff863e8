"""Loading from a Hub with the real client: what is asked for, what is checked, and what goes wrong."""

import concurrent.futures
import json
import logging
import pathlib
import shutil
import traceback

import huggingface_hub
import jax
import pytest
import tiny
from downloading import CONFIG, GENERATION, HEADER, INDEX, LARGE, REPO, SHARDS, cache, files_of, refused, weights

import eqx_moe
import eqx_moe.remote.download
from eqx_moe.cli import main
from eqx_moe.errors import CheckpointError
from eqx_moe.push import push_folder
from eqx_moe.remote import client, space

# --- What is asked for -----------------------------------------------------------------------------------------------


def test_a_repo_is_loaded_as_a_folder_is(repo, saved, right, tmp_path):
    unwanted = {"pytorch_model.bin": b"\x80pickle", "onnx/model.onnx": bytes(9), "other.safetensors": bytes(8)}
    commit = repo.put(REPO, {**saved, **unwanted})
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    assert repo.count("GET /api/models") == 1
    downloads = {request.split()[1].split("/")[-1] for request in repo.requests if "/resolve/" in request}
    assert downloads == {CONFIG, GENERATION, INDEX, *SHARDS}
    # The branch was asked for once, and then only its commit.
    assert not [request for request in repo.requests if "/resolve/" in request and commit not in request]
    assert eqx_moe.load_config(REPO) == eqx_moe.load_config(cache() / "snapshots" / commit)
    assert eqx_moe.load_tokenizer(REPO).to_str() == tiny.tokenizer().to_str()
    # Everything is there now: nothing but where the branch stands is asked.
    repo.requests.clear()
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    assert repo.requests == [f"GET /api/models/{REPO}/revision/main"]
    # And of a commit not even that.
    assert weights(eqx_moe.from_pretrained(REPO, revision=commit)) == right
    assert len(repo.requests) == 1
    # A folder of that name comes first.
    assert eqx_moe.from_pretrained(REPO, cache_dir=tmp_path / "other").config == eqx_moe.load_config(REPO)
    assert (tmp_path / "other").is_dir()


def test_a_folder_comes_before_a_repo(repo, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files_of(tmp_path / REPO, seed=9)
    eqx_moe.from_pretrained(REPO)
    assert not repo.requests
    shutil.rmtree(tmp_path / REPO)
    (tmp_path / REPO).write_text("a file")
    refused("CFG-FOLDER", "something else under that name")
    assert not repo.requests
    refused("CFG-FOLDER", "nothing of that name", where="nothing/of/that/name")
    refused("CFG-FOLDER", 'name "org/name" of a repo', where="gpt2")
    refused("CFG-FOLDER", where=pathlib.Path("org/other"))


def test_one_commit_though_the_branch_moves_on(repo, saved, right, tmp_path):
    newer = files_of(tmp_path / "newer", seed=4)
    repo.fault(LARGE, lambda hub: hub.put(REPO, newer))
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    assert weights(eqx_moe.from_pretrained(REPO)) != right


def test_revisions(repo, saved, right, tmp_path):
    first = repo.repos[REPO].refs["main"]
    second = repo.put(REPO, files_of(tmp_path / "second", seed=4), ref="a-branch")
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    for revision in ("a-branch", second):
        assert weights(eqx_moe.from_pretrained(REPO, revision=revision)) != right
    assert weights(eqx_moe.from_pretrained(REPO, revision=first)) == right
    refused("HUB-REPO", "'v9'", "no folder of that name", revision="v9")
    for revision in ("../x", "/x", "a b", "-x"):
        with pytest.raises(ValueError, match="`revision`"):
            eqx_moe.from_pretrained(REPO, revision=revision)


def test_a_model_that_would_not_load_is_not_downloaded(repo, saved):
    config = json.loads(saved[CONFIG])
    repo.put(REPO, {**saved, CONFIG: json.dumps(config | {"num_local_experts": 6}).encode()})
    assert "6" in str(refused("ST-MISSING", "experts.5"))
    # Only ranges of the weights were asked for: their headers.
    assert repo.count(HEADER) == 2 * len(SHARDS) and not repo.count(LARGE)
    assert not list(cache().glob("snapshots/*/*.safetensors"))


def test_what_is_missing_in_the_repo(repo, saved):
    repo.put(REPO, {name: content for name, content in saved.items() if name != SHARDS[2]})
    refused("HUB-FILE", SHARDS[2], INDEX)
    assert not repo.count(LARGE) and not repo.count(HEADER)
    repo.put(REPO, {CONFIG: saved[CONFIG], "pytorch_model.bin": b"\x80"})
    refused("ST-WEIGHTS", "pytorch_model.bin")
    repo.put(REPO, {"README.md": b"nothing"})
    refused("CFG-MISSING")
    with pytest.raises(CheckpointError, match="TOK-MISSING"):
        eqx_moe.load_tokenizer(REPO)
    repo.put(REPO, {**saved, "model.safetensors": saved[SHARDS[0]]})
    refused("IDX-AMBIGUOUS")
    refused("HUB-REPO", "org/nothing", "no folder of that name", where="org/nothing")


def test_a_quantised_repo_is_planned_and_decoded(hub, tmp_path):
    """What is held against the config before the download is what the containers will be read as."""
    from quantised import quantise

    folder = tmp_path / "folder"
    eqx_moe.save_pretrained(tiny.model(), folder)
    quantise(folder)
    hub.put(REPO, {file.name: file.read_bytes() for file in folder.iterdir()})
    assert weights(eqx_moe.from_pretrained(REPO)) == weights(eqx_moe.from_pretrained(folder))
    push_folder(folder, "org/again")
    assert weights(eqx_moe.from_pretrained("org/again")) == weights(eqx_moe.from_pretrained(folder))


def test_commands_take_one_commit(repo, saved, tmp_path, capsys):
    """Tokenizer and weights of one commit, though the branch moves on between them; `inspect` downloads no weights."""
    assert main(["inspect", REPO]) == 0
    out = capsys.readouterr().out
    for part in ("mixtral", "original", SHARDS[3], f"{len(saved[SHARDS[0]]):,} bytes"):
        assert part in out
    assert not repo.count(LARGE) and repo.count(HEADER) == len(SHARDS)
    repo.requests.clear()
    repo.fault("/resolve/.*tokenizer.json", lambda hub: hub.put(REPO, files_of(tmp_path / "newer", seed=4)))
    assert main(["generate", REPO, "--prompt", "The wren", "--max-new-tokens", "3"]) == 0
    assert repo.count("GET /api/models") == 1
    assert len({request.split("/resolve/")[1][:40] for request in repo.requests if "/resolve/" in request}) == 1


def test_names_in_the_index_lead_nowhere(repo, saved):
    for name in ("../../../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "https://x/y.safetensors"):
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        repo.put(REPO, {**saved, INDEX: json.dumps(index).encode(), name: b"x"})
        refused("IDX-PATH")
        assert not repo.count(LARGE)
    assert not list(cache().rglob("x.safetensors"))


def test_a_commit_is_no_path(repo, monkeypatch):
    """What a hostile server gives as the commit would name a folder."""
    repo.repos[REPO].commits["../../../up"] = repo.repos[REPO].commits[repo.repos[REPO].refs["main"]]
    repo.repos[REPO].refs["main"] = "../../../up"
    refused("HUB-FILE", "../../../up")
    assert not cache().exists()


# --- The plan --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_seen_before(repo, monkeypatch):
    monkeypatch.setattr(space, "free_disk", lambda folder: 30_000)
    refused("HUB-DISK", "30,000 bytes", "cache_dir")
    assert not list(cache().glob("snapshots/*/*.safetensors"))


def test_too_little_memory_is_seen_before(repo, monkeypatch):
    monkeypatch.setattr(space, "host_memory", lambda: (20_000, 30_000))
    refused("HUB-MEMORY", "30,000 bytes in all", "mesh")
    assert not list(cache().glob("snapshots/*/*.safetensors"))
    monkeypatch.setattr(space, "host_memory", lambda: (20_000, 100_000))
    with pytest.warns(UserWarning, match="20,000 bytes are free now"):
        eqx_moe.from_pretrained(REPO)


def test_memory_of_accelerators():
    class Device:
        platform = "gpu"

        def __str__(self):
            return "gpu:0"

        def memory_stats(self):
            return {"bytes_limit": 500, "bytes_in_use": 100}

    needs = space.memory_needs([Device()], 450, 10)
    assert needs["gpu:0"] == (450, 400, 500) and needs.get("this machine", (10,))[0] == 10
    with pytest.warns(UserWarning, match="gpu:0"):
        space.check_memory({"gpu:0": needs["gpu:0"]}, "loading", REPO)
    with pytest.raises(CheckpointError, match="gpu:0"):
        space.check_memory({"gpu:0": (501, 400, 500)}, "loading", REPO)


def test_what_it_becomes_is_said(repo, caplog):
    mesh = jax.make_mesh((2, 1), ("data", "expert"), devices=jax.devices()[:2])
    with caplog.at_level(logging.INFO, "eqx_moe"):
        eqx_moe.from_pretrained(REPO, mesh=mesh, dtype="bfloat16")
    size = sum(len(content) for name, content in repo.repos[REPO].files().items() if name in SHARDS)
    assert f"4 of 4 files of weights to download, {size:,} bytes" in caplog.text
    assert "bytes of bfloat16" in caplog.text and "on each of 2 devices" in caplog.text


def test_one_bar_in_bytes(repo, saved, monkeypatch):
    bars = []

    class Bar(eqx_moe.remote.download.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if options.get("desc", "").startswith("downloading"):
                self.seen = []
                bars.append((self, options))

        def update(self, n=1):
            self.seen.append(n)

    monkeypatch.setattr(eqx_moe.remote.download, "tqdm", Bar)
    repo.fault(LARGE, "cut-reset", times=2, at=500)
    eqx_moe.from_pretrained(REPO)
    sizes = [sum(len(saved[name]) for name in names) for names in ((CONFIG, GENERATION), (INDEX,), SHARDS)]
    assert [options["total"] for _, options in bars if options["total"]] == sizes
    assert [sum(bar.seen) for bar, options in bars if options["total"]] == sizes
    assert all(options["unit"] == "B" and options["disable"] is None for _, options in bars)


# --- What goes wrong -------------------------------------------------------------------------------------------------

STAGES = {
    "listing": "GET /api/models",
    "head": "HEAD .*/resolve/.*config.json",
    "file": "GET .*/resolve/.*config.json",
    "header": HEADER,
    "weights": LARGE,
}
PASSING = [
    ("status", dict(status=503)),
    ("status", dict(times=4)),
    ("status", dict(status=429, headers={"Retry-After": "7"})),
    ("reset", {}),
    ("cut", dict(times=2, at=0)),
    ("cut-reset", dict(times=2, at=200)),
    ("flip", dict(times=2)),
]
MORE_PASSING = [
    *[("status", dict(status=status)) for status in (500, 502, 504, 408, 429)],
    ("reset", dict(times=3)),
    ("cut", {}),
    ("cut", dict(times=4, at=300)),
    ("cut-reset", {}),
    ("flip", {}),
]
# A listing has no hash of its own; nor have headers, but a model is not refused before a second look at them. What
# answers a HEAD has no body.
NOTHING = {("listing", "flip"), ("head", "flip"), ("head", "cut"), ("head", "cut-reset")}


@pytest.mark.parametrize(
    "stage, kind, options",
    [
        pytest.param(stage, kind, options, marks=marks)
        for faults, marks in ((PASSING, ()), (MORE_PASSING, pytest.mark.full))
        for kind, options in faults
        for stage in STAGES
        if (stage, kind) not in NOTHING
    ],
)
def test_faults_that_pass_are_survived(repo, right, stage, kind, options):
    repo.fault(STAGES[stage], kind, **options)
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    assert not repo.faults[0].times
    # The client itself asks once more for a file, at once.
    if "headers" in options and stage != "head":
        assert max(repo.naps) >= 7
    # What was kept is whole.
    shutil.rmtree(cache() / ".eqx_moe")
    repo.requests.clear()
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    assert not repo.count(LARGE)


@pytest.mark.parametrize(
    "stage, kind, code",
    [
        ("listing", "status", "HUB-FAILED"),
        ("listing", "reset", "HUB-OFFLINE"),
        ("listing", "cut", "HUB-OFFLINE"),
        ("head", "status", "HUB-FAILED"),
        ("head", "reset", "HUB-OFFLINE"),
        ("file", "status", "HUB-FAILED"),
        ("file", "reset", "HUB-OFFLINE"),
        ("file", "flip", "HUB-HASH"),
        ("header", "status", "HUB-FAILED"),
        ("header", "reset", "HUB-OFFLINE"),
        ("weights", "status", "HUB-FAILED"),
        ("weights", "reset", "HUB-OFFLINE"),
        ("weights", "flip", "HUB-HASH"),
    ],
)
def test_faults_that_stay_are_said(repo, right, stage, kind, code):
    repo.fault(STAGES[stage], kind, times=10**6, at=50)
    error = refused(code, *(["500"] if code == "HUB-FAILED" else []))
    assert error.fix and error.expected and REPO in error.file
    # Nothing wrong is left behind.
    repo.faults.clear()
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    assert not list(cache().rglob("*.incomplete"))


def test_a_byte_flipped_on_the_way_is_found_whoever_downloaded(repo, right, saved):
    """The client takes a wrong byte for granted; so does a run that was killed before it looked."""
    repo.fault(LARGE, "flip")
    file = pathlib.Path(huggingface_hub.hf_hub_download(REPO, SHARDS[1]))
    assert file.read_bytes() != saved[SHARDS[1]]
    assert weights(eqx_moe.from_pretrained(REPO)) == right
    assert file.read_bytes() == saved[SHARDS[1]]


@pytest.mark.parametrize("kind", ["", "flip", "cut-reset"])
def test_several_at_once_into_one_cache(repo, right, kind):
    if kind:
        repo.fault(LARGE, kind, times=3)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: weights(eqx_moe.from_pretrained(REPO)), range(4)))
    assert loaded == [right] * 4


def test_refusals(repo):
    for status, headers, code in (
        (401, {}, "HUB-ACCESS"),
        (403, {}, "HUB-ACCESS"),
        (403, {"X-Error-Code": "GatedRepo"}, "HUB-ACCESS"),
        (404, {"X-Error-Code": "RepoNotFound"}, "HUB-REPO"),
        (413, {}, "HUB-FAILED"),
    ):
        repo.requests.clear()
        repo.fault("GET /api/models", "status", status=status, headers=headers)
        refused(code)
        assert len(repo.requests) == 1, "what will not pass is not asked twice"


# --- Secrets ---------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "PlantedToken0123456789abcdefghij"[:34]


@pytest.mark.parametrize("given", [True, False], ids=["argument", "environment"])
@pytest.mark.parametrize("kind", ["", "status", "reset", "cut", "flip", "echo"])
def test_a_token_shows_nowhere(repo, kind, given, caplog, capfd, monkeypatch, right):
    repo.token, repo.repos[REPO].private = TOKEN, True
    if not given:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    shown = []
    logging.getLogger("huggingface_hub").propagate = True
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "huggingface_hub"):
        for stage in STAGES.values():
            repo.faults.clear()
            shutil.rmtree(cache(), ignore_errors=True)
            if kind:
                repo.fault(stage, kind, times=10**6)
            try:
                assert weights(eqx_moe.from_pretrained(REPO, token=TOKEN if given else None)) == right
            except CheckpointError as error:
                shown += [repr(error), *traceback.format_exception(error)]
            else:
                assert not kind or (kind in ("cut", "flip") and stage not in (STAGES["file"], STAGES["weights"]))
    shown += [caplog.text, *capfd.readouterr(), *(sent.decode(errors="replace") for sent in repo.sent)]
    assert TOKEN not in "".join(shown)
    assert repo.count("GET /api/models")
    written = [file for file in cache().parent.rglob("*") if file.is_file()]
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]


def test_a_private_repo_needs_the_token(repo, right):
    repo.token, repo.repos[REPO].private = TOKEN, True
    refused("HUB-REPO", "hf auth login")
    refused("HUB-REPO", token="hf_wrong0123456789")
    assert weights(eqx_moe.from_pretrained(REPO, token=TOKEN)) == right


def test_redaction():
    text = f"Bearer {TOKEN} and hf_OtherToken123456 at https://me:secret@host/x?X-Amz-Signature=abc&y=1 ?blobs=1"
    cleaned = client.redact(text.replace("PlantedToken", "Planted.Token"), "hf_Planted.Token0123456789abcdefghij")
    for secret in ("Planted", "Other", "secret", "abc"):
        assert secret not in cleaned
    assert "?blobs=1" in cleaned and "https://...@host/x?..." in cleaned
