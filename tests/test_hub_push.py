"""Pushing to a Hub with the real client: one commit, old or new and never a mixture, whatever goes wrong."""

import contextlib
import json
import logging
import os
import pathlib
import subprocess
import tempfile
import traceback

import jax
import numpy as np
import pytest
import tiny
import yaml

import eqx_moe
from eqx_moe.checkpoint import leaf_paths
from eqx_moe.cli import main
from eqx_moe.errors import CheckpointError
from eqx_moe.push import push_folder
from eqx_moe.remote.card import model_card
from eqx_moe.remote.client import is_repo, is_revision

REPO = "org/tiny-model"
TOKEN = "hf_PlantedToken0123456789abcdefghij"
SMALL = {"config.json", "generation_config.json", "eqx_moe.json", "README.md", ".gitattributes"}
SHARDS = {f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)} | {"model.safetensors.index.json"}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where shards are written on their way: of this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def models():
    return tiny.model(seed=3), tiny.model(seed=4)


def push(model, **options) -> str:
    return eqx_moe.push_to_hub(model, REPO, **{"max_shard_size": 10_000} | options)


def saved(model, folder: pathlib.Path, **options) -> dict[str, bytes]:
    eqx_moe.save_pretrained(model, folder, **{"max_shard_size": 10_000} | options)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same(a, b) -> bool:
    a, b = leaf_paths(a), leaf_paths(b)
    return list(a) == list(b) and all(np.array_equal(np.asarray(a[path]), np.asarray(b[path])) for path in a)


# --- What becomes of a repo ------------------------------------------------------------------------------------------


def test_pushed_is_what_is_saved(hub, models, tmp_path):
    address = push(models[0])
    files = hub.repos[REPO].files()
    assert address == f"{hub.url}/{REPO}/commit/{hub.repos[REPO].refs['main']}"
    assert {name: content for name, content in files.items() if name not in ("README.md", ".gitattributes")} == saved(
        models[0], tmp_path / "saved"
    )
    assert hub.commits == 1 and set(files) == SMALL | SHARDS and not hub.repos[REPO].private
    assert same(eqx_moe.from_pretrained(REPO), models[0])
    # Again: nothing is sent, nothing is committed.
    hub.requests.clear()
    assert push(models[0]) == address
    assert hub.commits == 1 and not hub.count("PUT|/commit/")


def test_another_model_takes_the_place_of_the_first(hub, models):
    push(models[0])
    repo = hub.repos[REPO]
    hub.put(REPO, repo.files() | {"README.md": b"my own", "notes.txt": b"mine", "pytorch_model.bin": b"x"})
    push(models[1], layout="packed", max_shard_size="5GB", dtype="bfloat16", commit_message="Tuned")
    assert set(repo.files()) == SMALL | {"model.safetensors", "notes.txt", "pytorch_model.bin"}
    assert repo.files()["README.md"] == b"my own"
    assert hub.commits == 2
    half = jax.tree.map(lambda x: x.astype("bfloat16"), models[1])
    assert same(eqx_moe.from_pretrained(REPO, dtype="auto"), half)
    push(models[0])
    assert set(repo.files()) == SMALL | SHARDS | {"notes.txt", "pytorch_model.bin"}


def test_the_disk_holds_one_shard_at_a_time(hub, models, temporary):
    held = []
    look = lambda hub: held.append([file.name for file in temporary.glob("*/*")])  # noqa: E731
    hub.fault("PUT", look, times=10**6)
    push(models[0])
    assert len(held) == 4 and {len(names) for names in held} == {1}


def test_folders_of_killed_processes_are_removed(hub, models, temporary):
    (temporary / f"eqx_moe-push-{2**22 + 1}-abc").mkdir()
    (temporary / f"eqx_moe-push-{os.getpid()}-abc").mkdir()
    push(models[0])
    (left,) = temporary.iterdir()
    assert left.name == f"eqx_moe-push-{os.getpid()}-abc"
    left.rmdir()


def test_the_tokenizer_goes_along_and_its_config_is_kept(hub, models):
    push(models[0], tokenizer=tiny.tokenizer())
    config = json.loads(hub.repos[REPO].files()["tokenizer_config.json"])
    hub.put(
        REPO,
        hub.repos[REPO].files()
        | {"tokenizer_config.json": json.dumps(config | {"chat_template": "{{ messages }}"}).encode()},
    )
    push(models[1], tokenizer=tiny.tokenizer(), revision="tuned")
    kept = json.loads(hub.repos[REPO].files("tuned")["tokenizer_config.json"])
    assert kept == config | {"chat_template": "{{ messages }}"}
    assert eqx_moe.load_tokenizer(REPO).to_str() == tiny.tokenizer().to_str()


def test_private_branches_and_pull_requests(hub, models):
    push(models[0], private=True)
    repo = hub.repos[REPO]
    assert repo.private
    before = repo.files()
    push(models[1], revision="a-branch")
    address = push(models[1], create_pr=True, commit_message="Better")
    assert address == f"{hub.url}/{REPO}/discussions/1" and repo.pull_requests == ["Better"]
    assert repo.files() == before
    assert repo.files("a-branch") == repo.files("refs/pr/1") != before
    for revision in ("a-branch", "refs/pr/1"):
        assert same(eqx_moe.from_pretrained(REPO, revision=revision), models[1])
    # It is there already.
    assert push(models[1], create_pr=True, commit_message="Better") == address and repo.pull_requests == ["Better"]
    # A pull request is a branch of its own.
    push(models[0], revision="refs/pr/1")
    assert same(eqx_moe.from_pretrained(REPO, revision="refs/pr/1"), models[0])


def test_odd_repos_get_the_whole_model_all_the_same(hub, models):
    """A .gitignore that leaves weights out, and a Hub that does not count a shard as large."""
    hub.put(REPO, {".gitattributes": b"", ".gitignore": b"*.safetensors"})
    hub.gitignore = set(SHARDS) | SMALL
    hub.regular = {"model-00002-of-00004.safetensors"}
    push(models[0])
    assert same(eqx_moe.from_pretrained(REPO), models[0])
    assert push(models[0]).endswith(hub.repos[REPO].refs["main"]) and hub.commits == 1


def test_a_sharded_model_is_pushed_from_its_devices(hub, models, tmp_path):
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    push(eqx_moe.with_options(models[0], mesh=mesh))
    files = hub.repos[REPO].files()
    assert {name: files[name] for name in SHARDS} == {
        name: content for name, content in saved(models[0], tmp_path / "saved").items() if name in SHARDS
    }


def test_only_the_first_process_uploads(hub, models, monkeypatch):
    """What another process does: its part in gathering each shard, and waiting for the first."""
    from eqx_moe import push as module

    gathered, synced = [], []
    files = module.weight_files

    def counted(*args, **options):
        contents, size = files(*args, **options)
        return {
            name: lambda name=name, content=content: (gathered.append(name), *content())[1:]
            for name, content in contents.items()
        }, size

    monkeypatch.setattr(module, "weight_files", counted)
    monkeypatch.setattr(module, "is_of_one_process", lambda leaves: False)
    monkeypatch.setattr(module.multihost_utils, "sync_global_devices", synced.append)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert push(models[0]) == "" and set(gathered) == SHARDS and len(synced) == 1
    assert not hub.requests
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert push(models[0]) and len(synced) == 2 and hub.commits == 1


NO_BRANCHES = ["a b", "a/../c", "/a", "a/", "a//b", "-a", ".a", "a/.b", "a.lock", "a.lock/b", "a.", "@", "a@{1}"]
NO_BRANCHES += ["a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a\x7f", "a\nb", "a\ud800", "HEAD", "0123456789" * 4]


def test_branches_are_what_git_says():
    # Two names stand for what is there, which may be loaded; and no process is given half a surrogate pair.
    special = {"@", "HEAD", "a\ud800"}
    for name in {"a", "a/b", "v1.0#2", "main@x", "über", "a-b_c.d", "refs/pr/1", *NO_BRANCHES} - special:
        check = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True)
        assert (check.returncode == 0) == is_revision(name), name
    assert [name for name in special if is_revision(name)] == ["HEAD"]


def test_wrong_arguments_come_before_any_request(hub, models):
    for repo in (
        "tiny",
        "org/a/b",
        "org/..",
        "org/x--y",
        "/x",
        "org/",
        "org/na me",
        "org/x.git",
        "a" * 60 + "/" + "b" * 60,
    ):
        assert not is_repo(repo)
        with pytest.raises(ValueError, match="`repo_id`"):
            eqx_moe.push_to_hub(models[0], repo)
    for options, match in (
        (dict(create_pr=True, revision="a-branch"), "create_pr"),
        *((dict(revision=name), "`revision`") for name in NO_BRANCHES),
        (dict(layout="flat"), "`layout`"),
        (dict(dtype="int8"), "`dtype`"),
        (dict(max_shard_size="big"), "max_shard_size"),
        (dict(base_model="<b>x</b>"), "`base_model`"),
    ):
        with pytest.raises(ValueError, match=match):
            push(models[0], **options)
    assert not hub.requests


# --- Model cards -----------------------------------------------------------------------------------------------------


def test_the_card(hub, models):
    push(models[0], base_model="mistralai/Mixtral-8x7B-v0.1")
    text = hub.repos[REPO].files()["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "eqx_moe",
        "pipeline_tag": "text-generation",
        "base_model": "mistralai/Mixtral-8x7B-v0.1",
        "tags": ["mixtral", "moe", "mixture-of-experts", "jax", "equinox"],
    }
    assert f'eqx_moe.from_pretrained("{REPO}")' in body and f'AutoModelForCausalLM.from_pretrained("{REPO}"' in body
    assert "10,332 parameters, of which a token uses 8,496, in float32" in body
    for block in body.split("```python")[1:]:
        compile(block.split("```")[0], "card", "exec")


@pytest.mark.parametrize("name", ["no", "1.0", "null", "2026-01-01", "a_b.c-d"])
def test_names_stay_texts_in_the_card(name):
    card = model_card(
        f"org/{name}", architecture="A", model_type="m", parameters=(5, 5), dtype="float32", base_model=f"org/{name}"
    )
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == f"org/{name}" and head["tags"] == ["m", "jax", "equinox"]
    assert f"# {name}\n" in card


# --- What goes wrong -------------------------------------------------------------------------------------------------

STAGES = {
    "create": "POST /api/repos/create",
    "listing": "GET /api/models/.*/revision",
    "preupload": "POST .*/preupload",
    "batch": "POST .*/batch",
    "upload": "PUT",
    "card": "POST /api/validate-yaml",
    "commit": "POST .*/commit/",
}
KINDS = ["status", "reset", "lost", "cut"]


def old_or_new(hub, before: dict[str, bytes], after: dict[str, bytes]) -> str:
    files = hub.repos[REPO].files()
    assert files in (before, after), "a mixture"
    return "old" if files == before else "new"


@pytest.fixture(scope="module")
def after(models, tmp_path_factory):
    return saved(models[1], tmp_path_factory.mktemp("after"))


@pytest.fixture
def before(hub, models):
    push(models[0])
    # Without a card, so that all stages come again.
    files = {name: content for name, content in hub.repos[REPO].files().items() if name != "README.md"}
    hub.put(REPO, files)
    return files


def expected(hub, before, after) -> dict[str, bytes]:
    return before | after | {"README.md": hub.repos[REPO].files().get("README.md", b"")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "kind, times",
    [
        ("status", 4),
        ("wait", 1),
        ("reset", 1),
        ("lost", 1),
        pytest.param("status", 1, marks=pytest.mark.full),
        pytest.param("cut", 1, marks=pytest.mark.full),
    ],
)
def test_faults_that_pass_are_survived(hub, models, before, after, stage, kind, times):
    hub.requests.clear()
    options = dict(status=429, headers={"Retry-After": "6"}) if kind == "wait" else dict(status=503)
    hub.fault(STAGES[stage], "status" if kind == "wait" else kind, times=times, at=10, **options)
    address = push(models[1])
    assert not hub.faults[0].times
    assert old_or_new(hub, before, expected(hub, before, after)) == "new"
    assert address.endswith(hub.repos[REPO].refs["main"])
    assert hub.commits == 2, "one commit more than before"
    assert hub.count("PUT") <= 4 + times, "what is whole is not sent twice"
    if kind == "wait":
        assert max(hub.naps) >= 6


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_faults_that_stay_are_said_and_do_no_harm(hub, models, before, after, stage, kind):
    hub.fault(STAGES[stage], kind, times=10**6, at=10)
    code = ""
    try:
        push(models[1])
    except CheckpointError as error:
        code = error.code
        assert error.fix and REPO in str(error)
    hub.faults.clear()
    # What is committed is committed, and an upload's answer has no body to be cut.
    if (stage, kind) in (("commit", "lost"), ("commit", "cut"), ("upload", "cut")):
        assert not code and old_or_new(hub, before, expected(hub, before, after)) == "new"
    else:
        assert code == ("HUB-FAILED" if kind == "status" else "HUB-OFFLINE")
        assert old_or_new(hub, before, expected(hub, before, after)) == "old"
    push(models[1])
    assert old_or_new(hub, before, expected(hub, before, after)) == "new" and hub.commits == 2


def test_a_lost_answer_makes_no_second_pull_request(hub, models, before):
    hub.fault("POST .*/commit/", "lost")
    address = push(models[1], create_pr=True)
    assert hub.repos[REPO].pull_requests == ["Upload the model"] and address.endswith("discussions/1")
    assert hub.repos[REPO].files() == before


@pytest.mark.parametrize("stage, code", [("commit", "HUB-CONFLICT"), ("upload", "HUB-FAILED")])
def test_a_conflict_is_one_of_commits(hub, models, before, stage, code):
    hub.fault(STAGES[stage], "status", times=10**6, status=409)
    with pytest.raises(CheckpointError, match=code):
        push(models[1])
    assert hub.repos[REPO].files() == before


def test_somebody_else_commits_meanwhile(hub, models, before, after):
    theirs = before | {"notes.txt": b"theirs"}
    hub.fault("POST .*/commit/", lambda hub: hub.put(REPO, theirs))
    with pytest.raises(CheckpointError, match="HUB-CONFLICT") as caught:
        push(models[1])
    assert "push again" in caught.value.fix
    assert hub.repos[REPO].files() == theirs
    push(models[1])
    assert old_or_new(hub, theirs, expected(hub, theirs, after)) == "new"


@pytest.mark.parametrize(
    "status, code, fix",
    [
        (401, "HUB-ACCESS", "log in"),
        (403, "HUB-ACCESS", "log in"),
        (400, "HUB-FAILED", "what the Hub says"),
        (404, "HUB-FAILED", "still there"),
        (410, "HUB-FAILED", "still there"),
        (413, "HUB-FAILED", "max_shard_size"),
        (422, "HUB-FAILED", "what the Hub says"),
        (507, "HUB-FAILED", "make room"),
    ],
)
@pytest.mark.parametrize("stage", ["preupload", "commit"])
def test_refusals_are_not_tried_again(hub, models, before, stage, status, code, fix):
    hub.fault(STAGES[stage], "status", times=10**6, status=status)
    hub.requests.clear()
    with pytest.raises(CheckpointError, match=code) as caught:
        push(models[1])
    assert str(status) in caught.value.found and fix in caught.value.fix
    assert hub.count(STAGES[stage]) == 1 and hub.repos[REPO].files() == before


def test_a_full_disk_is_said(hub, models, monkeypatch):
    from eqx_moe.remote import upload

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(upload, "_write", full)
    with pytest.raises(CheckpointError, match="HUB-DISK.*") as caught:
        push(models[0])
    assert "TMPDIR" in caught.value.fix


@pytest.mark.parametrize("stage", [*STAGES, ""])
@pytest.mark.parametrize("kind", ["status", "reset", "echo"])
def test_a_token_shows_nowhere(hub, models, kind, stage, caplog, capfd, temporary):
    hub.token = TOKEN
    shown = []
    logging.getLogger("huggingface_hub").propagate = True
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "huggingface_hub"):
        hub.fault(STAGES.get(stage, "nothing"), kind, times=10**6)
        with contextlib.suppress(CheckpointError) if stage else contextlib.nullcontext():
            try:
                push(models[0], token=TOKEN)
            except Exception as error:
                shown += [repr(error), *traceback.format_exception(error)]
                raise
        assert bool(shown) == bool(stage)
    shown += [caplog.text, *capfd.readouterr(), *(sent.decode(errors="replace") for sent in hub.sent)]
    assert TOKEN not in "".join(shown)


# --- Folders, and the programs ---------------------------------------------------------------------------------------


def test_a_folder(hub, models, tmp_path):
    files = saved(models[0], tmp_path / "folder", tokenizer=tiny.tokenizer())
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    (tmp_path / "folder" / "optimizer.bin").write_text("not this")
    (tmp_path / "folder" / ".env").write_text(f"HF_TOKEN={TOKEN}")
    address, left_out = push_folder(tmp_path / "folder", REPO)
    pushed = hub.repos[REPO].files()
    assert left_out == [".env", "optimizer.bin"] and address.endswith(hub.repos[REPO].refs["main"])
    assert set(pushed) == {*files, "README.md", ".gitattributes"} and hub.commits == 1
    assert {name: pushed[name] for name in files} == files and b"mine" in pushed["README.md"]
    assert push_folder(tmp_path / "folder", REPO)[0] == address and hub.commits == 1


def test_a_folder_that_changes_meanwhile(hub, models, tmp_path):
    folder = tmp_path / "folder"
    saved(models[0], folder)
    hub.fault("PUT", lambda hub: eqx_moe.save_pretrained(models[1], folder, max_shard_size=10_000))
    with pytest.raises(CheckpointError):
        push_folder(folder, REPO)
    assert set(hub.repos[REPO].files()) == {".gitattributes"}


def test_a_folder_that_would_not_load_is_not_pushed(hub, models, tmp_path):
    folder = tmp_path / "folder"
    saved(models[0], folder)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="IDX-SHARD"):
        push_folder(folder, REPO)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="CFG-MISSING"):
        push_folder(folder, REPO)
    with pytest.raises(CheckpointError, match="CFG-FOLDER"):
        push_folder("org/name", REPO)
    assert not hub.requests


def test_the_command(hub, models, tmp_path, capsys):
    saved(models[0], tmp_path / "folder", tokenizer=tiny.tokenizer())
    (tmp_path / "folder" / "loss.png").write_text("x")
    assert main(["push", str(tmp_path / "folder"), REPO, "--private"]) == 0
    out, err = capsys.readouterr()
    address = f"{hub.url}/{REPO}/commit/{hub.repos[REPO].refs['main']}"
    assert out == f"pushed to {address}\nnot part of a model, and left out: loss.png\n"
    assert not err and hub.repos[REPO].private
    assert main(["push", str(tmp_path / "folder"), "no-repo"]) == 1
    assert "`repo_id`" in capsys.readouterr().err
    hub.token = TOKEN
    assert main(["push", str(tmp_path / "folder"), REPO]) == 1
    err = capsys.readouterr().err
    assert "HUB-ACCESS" in err and "hf auth login" in err and "Traceback" not in err
    # What was pushed can be used by its name.
    hub.token = None
    hub.repos[REPO].private = False
    assert main(["generate", REPO, "--prompt", "The", "--max-new-tokens", "2"]) == 0
