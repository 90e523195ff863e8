"""Downloading: one commit, planned before it is fetched, only the files that are needed, each held against its hash.

Files lie in the cache of `huggingface_hub`, as that lays it out. Beside them, in a folder `.eqx_moe` of each repo, are
listings of commits, so that what is needed is known without the Hub, and marks of the files that were checked.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import pathlib
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from tqdm import tqdm

from eqx_moe.checkpoint.files import plain_name
from eqx_moe.checkpoint.header import Entry, read_header
from eqx_moe.checkpoint.jsonfile import read_json
from eqx_moe.checkpoint.shards import INDEX, SINGLE, Stored, check_index
from eqx_moe.errors import CheckpointError, quote
from eqx_moe.remote.client import TIMEOUT, WAITS, api, explain, is_revision, is_transient, is_unreachable, retrying
from eqx_moe.remote.headers import remote_header
from eqx_moe.remote.space import check_disk, free_disk, gigabytes

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_THREADS = 4
_TRIES = 3  # of a file that comes with wrong bytes
_OURS = ".eqx_moe"

_log = logging.getLogger("eqx_moe")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit: its bytes, and their SHA-256, or for a small file git's SHA-1 of them."""

    size: int
    hash: str


class _Cancelled(Exception):
    """Another file failed, or the user has had enough."""


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repo, and the folder of the cache in which its files lie.

    `files` is None where nothing but the cache is at hand and that does not say which files the commit has.
    """

    repo: str
    commit: str
    folder: pathlib.Path
    files: Mapping[str, RemoteFile] | None
    online: bool
    doing: str
    client: Any = field(repr=False)

    def fetch(self, *names: str, optional: tuple[str, ...] = ()) -> pathlib.Path:
        """The folder, with those of the named files in it that the commit has, whole and checked.

        Args:
            optional: where nothing says which files the commit has, those of these that the cache lacks are taken for
                none of it.

        Raises:
            CheckpointError: HUB-* codes.
        """
        names += optional
        if self.files is not None:
            names = tuple(name for name in names if name in self.files)
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
        else:
            names = tuple(name for name in names if name not in optional or (self.folder / name).exists())
        absent = [name for name in names if not (self.folder / name).exists()]
        if absent:
            if self.files is None or not self.online:
                self._refuse_offline(absent)
            size = sum(self.files[name].size for name in absent)
            fix = "free some, or name another disk's folder as `cache_dir`"
            check_disk(self.folder, size, self.doing, self.repo, fix)
        self._each(names, sum(self.files[name].size for name in absent) if self.files is not None else 0)
        return self.folder

    def fetch_weights(self, check: Callable[[dict[str, Stored]], str]) -> pathlib.Path:
        """The folder, with the weights in it.

        Args:
            check: gets all tensors by name, read from the headers of files that are not downloaded yet, refuses what
                will not load, and says what they will become. It is not asked if nothing has to be downloaded.

        Raises:
            CheckpointError: HUB-* codes; ST-* and IDX-* codes for what is wrong before anything is downloaded.
        """
        self.fetch(optional=(INDEX,))
        shards = self._shards()
        absent = [name for name in shards if not (self.folder / name).exists()]
        if absent and self.files is None:
            self._refuse_offline(absent)
        if absent and self.files is not None and self.online:
            try:
                becomes = check(self._headers(shards))
            except CheckpointError as error:
                if not error.code.startswith(("ST-", "IDX-")):
                    raise
                # Headers come without a hash: look twice before a model is refused.
                becomes = check(self._headers(shards))
            size = sum(self.files[name].size for name in absent)
            _log.info(
                f"{self.repo} at {self.commit[:8]}: {len(absent)} of {len(shards)} files of weights to download, "
                f"{gigabytes(size)}, where {gigabytes(free_disk(self.folder))} of disk are free; it becomes {becomes}."
            )
        return self.fetch(*shards)

    def headers(self) -> dict[str, Stored]:
        """All tensors by name, of which nothing can be read; no weights are downloaded.

        Raises:
            CheckpointError: HUB-*, ST-* and IDX-* codes, as for `fetch_weights`.
        """
        self.fetch(optional=(INDEX,))
        shards = self._shards()
        if not self.online and (absent := [shard for shard in shards if not (self.folder / shard).exists()]):
            self._refuse_offline(absent)
        return self._headers(shards)

    def _shards(self) -> list[str]:
        """The files of weights: those in the index, or the single one."""
        listed = self.files if self.files is not None else [SINGLE] * (self.folder / SINGLE).exists()
        if not (self.folder / INDEX).exists():
            if SINGLE in listed:
                return [SINGLE]
            if self.files is None:
                self._refuse_offline([f"{SINGLE} or {INDEX}"])
            names = sorted(name for name in listed if plain_name(name))
            self._refuse("ST-WEIGHTS", f"{SINGLE}, or {INDEX} and its shards", _some(names), "name another repo")
        weight_map = self._weight_map()
        if weight_map is None:
            return []  # The reader refuses the index, and says why.
        shards = sorted(set(weight_map.values()))
        if self.files is not None and (lacking := [shard for shard in shards if shard not in self.files]):
            fix = "name another repo or revision: this one is not whole"
            self._refuse("HUB-FILE", "every shard that the index lists", f"none of these: {_some(lacking)}", fix, INDEX)
        if SINGLE in listed and SINGLE not in shards:
            fix = f"ask the repo's owner to remove {SINGLE} if the shards are the model, else {INDEX}"
            self._refuse("IDX-AMBIGUOUS", "one model in the repo", "shards with an index, and a single file", fix)
        return shards

    def _weight_map(self) -> dict[str, str] | None:
        """Which shard each tensor lies in; None without an index that says so."""
        if not (self.folder / INDEX).exists():
            return None
        weight_map = read_json(self.folder / INDEX, "index").get("weight_map")
        if not isinstance(weight_map, dict):
            return None
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            return None
        shards = set(weight_map.values())
        return weight_map if all(plain_name(s) and s.endswith(".safetensors") for s in shards) else None

    def _headers(self, shards: list[str]) -> dict[str, Stored]:
        """All tensors of the shards, which the index must list: a range of each file, not the file."""

        def place(shard: str) -> str:
            return f"{self.repo}@{self.commit[:8]}/{shard}"

        def read(shard: str) -> dict[str, Entry]:
            if (self.folder / shard).exists():
                with io.FileIO(self.folder / shard) as file:
                    return read_header(file, place(shard))
            assert self.files is not None
            return remote_header(self.client, self.repo, self.commit, shard, self.files[shard].size, place(shard))

        try:
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                found = dict(zip(shards, pool.map(read, shards), strict=True))
        except Exception as error:
            explain(error, self.doing, self.repo, token=self.client.token)
        if shards and (weight_map := self._weight_map()) is not None:
            check_index(weight_map, found, place(INDEX))
        # Nothing is read from what is not here.
        nothing = io.FileIO(os.devnull)
        nothing.close()
        return {
            name: Stored(nothing, place(shard), entry)
            for shard, entries in found.items()
            for name, entry in entries.items()
        }

    def _each(self, names: tuple[str, ...], size: int) -> None:
        """Downloads what is absent and checks what has not been, a few files at a time, under one bar in bytes."""
        stop, lock = threading.Event(), threading.Lock()
        pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"downloading {self.repo}", disable=None, delay=1)

        def advance(count: int) -> None:
            if stop.is_set():
                raise _Cancelled
            with lock:
                bar.update(count)

        try:
            with bar:
                for future in concurrent.futures.as_completed([pool.submit(self._one, n, advance) for n in names]):
                    future.result()
        except Exception as error:
            stop.set()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                fix = "free some, or name another disk's folder as `cache_dir`"
                self._refuse("HUB-DISK", "room for the file", "a full disk", fix)
            explain(error, self.doing, self.repo, token=self.client.token)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _one(self, name: str, advance: Callable[[int], None]) -> None:
        expected, path = self._expected(name), self.folder / name
        wrong = 0
        while wrong < _TRIES:
            came = 0 if path.exists() else self._download(name, advance)
            if expected is None:
                return
            try:
                if self._is_marked(name, expected):
                    return
                looked_at = path.stat()
                if _hash(path, len(expected)) == expected:
                    _write_if_possible(*self._mark_of(name, expected))
                    return
                # Not what the Hub says that it has: out of the cache, where others would take it for whole. Unless
                # another process has done so, and brought the right one.
                if os.path.samestat(path.stat(), looked_at):
                    for file in {path.resolve(), path}:
                        file.unlink(missing_ok=True)
                wrong += 1
            except FileNotFoundError:
                pass  # Another process found it wrong, and has removed it.
            advance(-came)
            if not self.online:
                break
        self._refuse(
            "HUB-HASH",
            f"bytes with the hash {expected}, as the Hub says",
            f"others, {_TRIES} times" if self.online else "others in the cache; the file is removed from it",
            "try another connection" if self.online else "download it again, online",
            name,
        )

    def _download(self, name: str, advance: Callable[[int], None]) -> int:
        """Brings a file into the cache; returns the bytes of it that came, for the bar."""
        came = 0

        def count(size: int) -> None:
            nonlocal came
            came += size
            advance(size)

        def download() -> None:
            count(-came)  # What an earlier try brought is gone.
            self.client.hf_hub_download(
                self.repo, name, revision=self.commit, cache_dir=self.folder.parents[2], tqdm_class=_part(count)
            )

        retrying(download)
        return came

    def _expected(self, name: str) -> str | None:
        """The hash of a file: listed, or else the name under which the cache keeps its bytes."""
        if self.files is not None:
            return self.files[name].hash
        blob = (self.folder / name).resolve()
        known = _SHA256.fullmatch(blob.name) or _COMMIT.fullmatch(blob.name)
        return blob.name if known and blob.parent.name == "blobs" else None

    def _mark_of(self, name: str, expected: str) -> tuple[pathlib.Path, str]:
        status = (self.folder / name).stat()
        return self.folder.parents[1] / _OURS / "checked" / expected, f"{status.st_size} {status.st_mtime_ns}"

    def _is_marked(self, name: str, expected: str) -> bool:
        mark, state = self._mark_of(name, expected)
        try:
            return mark.read_text() == state
        except OSError:
            return False

    def _refuse(self, code: str, expected: str, found: str, fix: str, item: str = "") -> NoReturn:
        raise CheckpointError(
            code=code,
            doing=self.doing,
            file=f"{self.repo}@{self.commit[:8]}",
            item=item,
            expected=expected,
            found=found,
            fix=fix,
        )

    def _refuse_offline(self, absent: list[str]) -> NoReturn:
        fix = "load it once with a connection, without `local_files_only` and HF_HUB_OFFLINE"
        found = f"none of these in {str(self.folder)!r}: {_some(absent)}"
        self._refuse("HUB-OFFLINE", "all files in the cache, because the Hub was not asked", found, fix, absent[0])


def open_snapshot(
    repo: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    local_files_only: bool,
    doing: str,
) -> Snapshot:
    """The commit that a revision (a branch, a tag, a commit, by default the branch main) stands for now.

    The Hub is asked once. Where it cannot be reached or fails, what the cache remembers of the revision is taken.

    Raises:
        CheckpointError: HUB-* codes.
        ValueError: `revision` cannot be one.
    """
    from huggingface_hub import constants

    named = revision or "main"
    if not is_revision(named):
        raise ValueError(f"`revision` must be the name of a branch or tag, or a commit; got {revision!r}.")
    client = api(token)
    root = pathlib.Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"
    commit = named if _COMMIT.fullmatch(named) else _remembered(root, named)
    known = None if commit is None else _read_listing(root, commit)

    def snapshot(commit: str, files: Mapping[str, RemoteFile] | None, online: bool) -> Snapshot:
        return Snapshot(repo, commit, root / "snapshots" / commit, files, online, doing, client)

    if commit == named and known is not None:
        return snapshot(named, known, online=not local_files_only)
    if not local_files_only:
        try:
            info = retrying(
                lambda: client.model_info(repo, revision=named, files_metadata=True, timeout=TIMEOUT),
                WAITS if commit is None else WAITS[:1],
            )
            return _listed(snapshot, root, named, info, doing, repo)
        except Exception as error:
            if commit is None or not (is_transient(error) or is_unreachable(error)):
                explain(error, doing, repo, revision=revision, token=token)
            _log.warning(f"The Hub does not answer; {repo} is taken from the cache, at {commit[:8]}.")
    if commit is None:
        raise CheckpointError(
            code="HUB-OFFLINE",
            doing=doing,
            file=repo,
            item=named,
            expected=f"a commit of that revision in the cache, {str(root.parent)!r}: `local_files_only` is set",
            found="none",
            fix="load it once without `local_files_only`",
        )
    return snapshot(commit, known, online=False)


def _listed(snapshot: Callable[..., Snapshot], root: pathlib.Path, named: str, info: Any, doing: str, repo: str):
    """The snapshot of what the Hub says, which is remembered."""
    files = {}
    for sibling in info.siblings or ():
        large = sibling.lfs
        found = sibling.blob_id if large is None else large.sha256
        size = sibling.size if large is None else large.size
        pattern = _COMMIT if large is None else _SHA256
        if isinstance(found, str) and pattern.fullmatch(found) and type(size) is int and size >= 0:
            files[sibling.rfilename] = RemoteFile(size, found)
    # The name of a folder is made of it.
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha) or not files:
        raise CheckpointError(
            code="HUB-FILE",
            doing=doing,
            file=repo,
            expected="a commit, and files with their sizes and hashes",
            found=f"the commit {quote(info.sha)} and {len(info.siblings or ())} files",
            fix="check HF_ENDPOINT: this is no answer of a Hub",
        )
    listing = json.dumps({name: asdict(file) for name, file in files.items()}, indent=0)
    _write_if_possible(root / _OURS / f"{info.sha}.json", listing)
    if info.sha != named:
        _write_if_possible(root / "refs" / named, info.sha)
    return snapshot(info.sha, files, online=True)


def _remembered(root: pathlib.Path, revision: str) -> str | None:
    """The commit that the cache has for a branch or tag."""
    try:
        commit = (root / "refs" / revision).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _read_listing(root: pathlib.Path, commit: str) -> dict[str, RemoteFile] | None:
    try:
        listing = json.loads((root / _OURS / f"{commit}.json").read_text())
        return {name: RemoteFile(**file) for name, file in listing.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _write_if_possible(path: pathlib.Path, text: str) -> None:
    """Replaces a small file at one stroke; a cache that cannot be written to stays as it is."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _hash(path: pathlib.Path, length: int) -> str:
    """The SHA-256 of a file, or where 40 digits are asked for, git's SHA-1 of it."""
    with open(path, "rb") as file:
        if length == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _part(advance: Callable[[int], None]) -> type[tqdm]:
    """A progress bar for the client, which passes on what it is told and shows nothing itself."""

    class Part(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: int | float | None = 1) -> None:
            advance(int(n or 0))

        def update_transfer(self, n: int) -> None:
            """Bytes on the wire, which are not those of the file."""

        def set_transfer_postfix_str(self, *args: Any, **options: Any) -> None:
            """Nothing to show."""

    return Part


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(quote, names[:8])) + more
