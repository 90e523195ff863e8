"""Uploading: large files one at a time, then one commit (or pull request) that makes all of a model visible at once.

A reader of the repo sees the model before or the model after, whatever fails in between. What was uploaded stays with
the Hub, so that pushing again sends only what is missing. Where hf_xet is installed the client uploads by Xet, and as
plain LFS files only with HF_HUB_DISABLE_XET=1.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from eqx_moe.checkpoint.checksums import CHECKSUMS, checksums_json
from eqx_moe.checkpoint.shards import INDEX, WEIGHTS, changed_while_reading
from eqx_moe.errors import CheckpointError
from eqx_moe.remote.client import (
    TIMEOUT,
    WAITS,
    api,
    explain,
    is_conflict,
    is_repo,
    is_revision,
    is_transient,
    retrying,
    seconds_to_wait,
)

#: Bytes, a file, or a function that gives the bytes of a file that is large.
Content = bytes | pathlib.Path | Callable[[], Iterable[bytes | memoryview]]

CARD = "README.md"
_DOING = "pushing a model"
_TEMPORARY = "eqx_moe-push-"
_SAME_TITLE = 10  # pull requests looked into


def check_push(repo: str, revision: str | None, create_pr: bool) -> None:
    """Refuses arguments that cannot be right before anything is written.

    Raises:
        ValueError: naming the argument.
    """
    if not is_repo(repo):
        raise ValueError(f'`repo_id` must be the name of a repo, "org/name"; got {repo!r}.')
    if revision and (not is_revision(revision) or re.fullmatch("HEAD|[0-9a-f]{40}", revision)):
        raise ValueError(f"`revision` must be what git takes as the name of a branch; got {revision!r}.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"The Hub opens pull requests against main only; got `create_pr` and {revision=}.")


def push(
    repo: str,
    files: Mapping[str, Content],
    *,
    card: str,
    private: bool | None,
    revision: str | None,
    message: str | None,
    create_pr: bool,
    token: str | bool | None,
) -> str:
    """Makes a repo hold these files of a model, in one commit after the one that it has now.

    Weights of an earlier model that are not among the files are removed by the same commit; other files stay. The
    checksums of the weights are written here.

    Args:
        files: the name in the repo -> content. Of those that are written for the purpose, the disk (`TMPDIR`) holds one
            at a time.
        card: becomes README.md if there is none.
        private: whether the repo is private if it has to be made; None is the owner's default.

    Returns:
        The address of the commit or pull request. Where the repo holds all this already, that of what holds it.

    Raises:
        CheckpointError: HUB-* codes; ST-CHANGED if a file is written to meanwhile.
    """
    client, branch = api(token), revision or "main"
    try:
        retrying(lambda: client.create_repo(repo, private=private, exist_ok=True))
        if branch != "main" and not branch.startswith("refs/"):
            retrying(lambda: client.create_branch(repo, branch=branch, exist_ok=True))
        before = _info(client, repo, branch)
        present = {sibling.rfilename for sibling in before.siblings}
        if CARD not in files and CARD not in present:
            files = {**files, CARD: card.encode()}
        states = {path: _state(path) for path in files.values() if isinstance(path, pathlib.Path)}
        with _bars_on_terminals():
            additions = _upload(client, repo, branch, create_pr, files)
        for path, state in states.items():
            if _state(path) != state:
                changed_while_reading(str(path))
        gone = {name for name in present if WEIGHTS.fullmatch(name) and name not in files}
        commit = _Commit(client, repo, branch, create_pr, message or "Upload the model", before.sha, additions, gone)
        return commit.holder(before) or commit.send()
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                code="HUB-DISK",
                doing=_DOING,
                file=repo,
                expected=f"room for the largest file of weights in {tempfile.gettempdir()!r}",
                found="a full disk",
                fix="set TMPDIR to a folder of a larger disk, or choose a smaller `max_shard_size`",
            ) from error
        explain(error, _DOING, repo, revision=revision, token=token)


def _info(client: Any, repo: str, revision: str) -> Any:
    return retrying(lambda: client.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT))


def _upload(client: Any, repo: str, branch: str, create_pr: bool, files: Mapping[str, Content]) -> list[Any]:
    """Brings what is large to the Hub's storage, where nobody sees it yet; gives all operations of the commit."""
    from huggingface_hub import CommitOperationAdd

    def upload(*additions: Any) -> None:
        # No .gitignore of the repo may leave out a file of the model.
        client.preupload_lfs_files(repo, additions, revision=branch, create_pr=create_pr, gitignore_content="")
        for addition in additions:
            if isinstance(addition.path_or_fileobj, str):
                # Not large to this Hub: it goes with the commit.
                addition.path_or_fileobj = pathlib.Path(addition.path_or_fileobj).read_bytes()

    small = [CommitOperationAdd(name, content) for name, content in files.items() if isinstance(content, bytes)]
    sums = {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in small}
    large = []
    with _temporary_folder() as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                continue
            path = content if isinstance(content, pathlib.Path) else _write(folder / name, content())
            large.append(CommitOperationAdd(name, path))
            upload(large[-1])
            # Known from the upload, or read from the file while it is here.
            sums[name] = large[-1].upload_info.sha256.hex()
            if path is not content:
                path.unlink()
    sums = {name: sums[name] for name in files if name.endswith(".safetensors") or name == INDEX}
    small.append(CommitOperationAdd(CHECKSUMS, checksums_json(sums)))
    upload(*small)
    return large + small


class _Commit:
    """One commit that is made at most once, though its answer may be lost."""

    def __init__(
        self,
        client: Any,
        repo: str,
        branch: str,
        create_pr: bool,
        message: str,
        parent: str | None,
        additions: list[Any],
        gone: set[str],
    ):
        self.client = client
        self.repo = repo
        self.branch = branch
        self.create_pr = create_pr
        self.message = message
        self.parent = parent
        self.additions = additions
        self.gone = gone
        self.hashes = {addition.path_in_repo: _hashes(addition) for addition in additions}

    def send(self) -> str:
        """Commits; gives the address."""
        from huggingface_hub import CommitOperationDelete

        operations = [*self.additions, *(CommitOperationDelete(name) for name in sorted(self.gone))]
        for wait in (*WAITS, None):
            try:
                made = self.client.create_commit(
                    self.repo,
                    operations,
                    commit_message=self.message,
                    revision=self.branch,
                    create_pr=self.create_pr,
                    parent_commit=self.parent,
                )
                return made.pr_url or made.commit_url
            except Exception as error:
                if not (is_transient(error) or is_conflict(error)):
                    raise
                # The commit may be there although its answer did not arrive; a second one is then refused.
                if holder := self.holder(_info(self.client, self.repo, self.branch)):
                    return holder
                if is_conflict(error) or wait is None:
                    raise
                pause = seconds_to_wait(error, wait)
            time.sleep(pause)
        raise AssertionError

    def holder(self, info: Any) -> str | None:
        """The address of what holds all this already: the branch at `info`, or a pull request."""
        if self._is_in(info):
            return f"{self.client.endpoint}/{self.repo}/commit/{info.sha}"
        if not self.create_pr:
            return None
        listed = retrying(lambda: list(self.client.get_repo_discussions(self.repo, discussion_type="pull_request")))
        same = [request for request in listed if request.title == self.message and request.status in ("open", "draft")]
        for request in same[:_SAME_TITLE]:
            if self._is_in(_info(self.client, self.repo, f"refs/pr/{request.num}")):
                return f"{self.client.endpoint}/{self.repo}/discussions/{request.num}"
        return None

    def _is_in(self, info: Any) -> bool:
        stored = {
            sibling.rfilename: sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
            for sibling in info.siblings
        }
        return not self.gone & stored.keys() and all(stored.get(name) in both for name, both in self.hashes.items())


def _hashes(addition: Any) -> set[str]:
    """How the Hub names the content: SHA-256 if it counts as large, else git's SHA-1."""
    content = addition.path_or_fileobj
    if not content:  # Uploaded, and no longer here.
        return {addition.upload_info.sha256.hex()}
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return {hashlib.sha256(content).hexdigest(), git.hexdigest()}


def _write(path: pathlib.Path, content: Iterable[bytes | memoryview]) -> pathlib.Path:
    with open(path, "xb") as file:
        for piece in content:
            file.write(piece)
    return path


def _state(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """The client's progress bars, but none where stderr is no terminal, unless the user says otherwise."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    said = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    if said or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _temporary_folder() -> Iterator[pathlib.Path]:
    """A folder for files on their way; folders that killed processes left behind are removed first."""
    root = pathlib.Path(tempfile.gettempdir())
    for old in root.glob(f"{_TEMPORARY}*"):
        found = re.fullmatch(rf"{_TEMPORARY}(\d+)-.*", old.name)
        if found and not _runs(int(found[1])):
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_TEMPORARY}{os.getpid()}-") as folder:
        yield pathlib.Path(folder)


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # Signal 0 would end it.
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # Another user's.
    return True
