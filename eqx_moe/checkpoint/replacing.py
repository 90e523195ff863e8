"""Exchanging files of a folder for new ones all at once: killed at any moment, it has the old ones or the new ones.

The new files are written under temporary names and synced. Then one rename puts a journal in place that says which of
them belong where; from that moment on the folder is the new one. What remains is to move the files, and whoever next
loads from the folder or saves to it does that where the process was killed in between (`finish_replacing`). A program
that knows no journal finds config.json absent meanwhile, and refuses: it goes first and comes last.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import pathlib
import queue
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from typing import NoReturn

from eqx_moe.checkpoint.files import exists, open_plain, plain_name
from eqx_moe.checkpoint.jsonfile import JSONProblem, parse_object
from eqx_moe.checkpoint.shards import JOURNAL, WEIGHTS, threads
from eqx_moe.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what a killed process has left stays.
    fcntl = None

_LAST, _ALIVE = "config.json", "alive"
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{16})\.tmp")
_MAX_JOURNAL = 8_000_000  # bytes
_END = 0  # what ends a queue of how many bytes more are written
_AT_ONCE = 1 << 20  # bytes that a sum is taken of at a time; they stay in a core's own cache
_DOING = "finishing a save that was killed"
_FIX = "load from the folder once where it may be written to; or take the model from elsewhere and save it again"


class Replacing:
    """New files for a folder, written one after another and then put in place together.

        with Replacing(folder) as new:
            new.write("model.safetensors", pieces)
            new.commit(stale=["model-00001-of-00002.safetensors"])

    Leaving the block before `commit` removes what was written. An error in `commit` itself leaves the old files or the
    new ones, of which some may have to be moved yet.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._token = secrets.token_hex(8)
        self._names: list[str] = []
        self._committed = False
        # The disk writes one file while the next is handed to the system. Sums follow behind, of several files at once:
        # a core takes longer for them than for the writing.
        self._disk, self._sums = (concurrent.futures.ThreadPoolExecutor(count) for count in (1, threads()))
        self._files: list[io.BufferedWriter] = []
        self._written: list[queue.SimpleQueue[int]] = []
        self._pending: list[concurrent.futures.Future] = []
        self._stopped = threading.Event()

    def __enter__(self) -> "Replacing":
        with _locked(self._folder):
            _finish(self._folder)
            _sweep(self._folder)
            # Locked as long as this process lives: so others know that what bears this token is in use.
            self._alive = os.open(self._path(_ALIVE), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            _try_lock(self._alive)
        return self

    def __exit__(self, *error) -> None:
        # After an error, or Ctrl-C, nobody waits for what nobody needs.
        self._stopped.set()
        for written in self._written:
            written.put(_END)
        for pool in (self._disk, self._sums):
            pool.shutdown(cancel_futures=True)
        for file in self._files:
            with contextlib.suppress(OSError):  # what it has yet to write does not fit
                file.close()
        # Once there is a journal, what still has a temporary name belongs to the folder.
        for name in [] if self._committed else self._names:
            self._path(name).unlink(missing_ok=True)
        self._path(_ALIVE).unlink(missing_ok=True)
        os.close(self._alive)

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> concurrent.futures.Future[str]:
        """Writes a file under a temporary name, on the disk by the time of `commit`; gives its sha256, once known.

        The sum is of what the system gives back of the file.
        """
        self._names.append(name)
        # 0o666: the mode is the umask's to decide, as for any file that a program writes.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = open(os.open(self._path(name), flags, 0o666), "wb")  # closed once it is on the disk
        self._files.append(file)
        self._written.append(written := queue.SimpleQueue())
        self._pending.append(sha256 := self._sums.submit(_sha256, self._path(name), written, self._stopped))
        for piece in pieces:
            file.write(piece)
            file.flush()
            if len(piece):
                written.put(len(piece))
        written.put(_END)
        self._pending.append(self._disk.submit(_sync_and_close, file))
        return sha256

    def commit(self, stale: Iterable[str]) -> None:
        """Puts all that was written in place, and removes the files of weights `stale`.

        Raises:
            CheckpointError: ST-SAVE if a folder has the name of one of the files; nothing is changed then.
        """
        for name in self._names:
            if (self._folder / name).is_dir() and not (self._folder / name).is_symlink():
                raise CheckpointError(
                    code="ST-SAVE",
                    doing="saving a model",
                    file=str(self._folder),
                    item=name,
                    expected="a file, or a name that is free",
                    found="a folder of that name",
                    fix="remove it, or save somewhere else",
                )
        journal = {"token": self._token, "files": list(self._names), "stale": list(stale)}
        self.write(JOURNAL, (json.dumps(journal).encode(),))
        for pending in self._pending:
            pending.result()
        _sync(self._folder)
        with _locked(self._folder):
            _finish(self._folder)  # another process may have been killed meanwhile
            os.replace(self._path(JOURNAL), self._folder / JOURNAL)
            self._committed = True
            _sync(self._folder)
            _finish(self._folder)

    def _path(self, name: str) -> pathlib.Path:
        return _temporary(self._folder, name, self._token)


def finish_replacing(folder: pathlib.Path) -> None:
    """Puts files in place that a killed process had committed, but not moved yet.

    Raises:
        CheckpointError: ST-SAVE if there are such files and they cannot be moved, or the journal is none.
    """
    if not exists(folder / JOURNAL):
        return
    try:
        with _locked(folder):
            _finish(folder)
    except OSError as error:
        _refuse(folder, "a folder that can be written to", error.strerror or type(error).__name__, "", error)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """No other process puts files in place while this is open (on this machine, where the file system knows locks)."""
    handle = None
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _finish(folder: pathlib.Path) -> None:
    """Does what the journal says. Each step may have been done before, by the process that was killed."""
    if not exists(folder / JOURNAL):
        return
    token, names, stale = _read_journal(folder)
    if _LAST in names and not exists(_temporary(folder, _LAST, token)):
        # All is done but this, and the folder may be one that cannot be written to.
        with contextlib.suppress(OSError):
            (folder / JOURNAL).unlink(missing_ok=True)
        return
    last = [name for name in names if name == _LAST]
    for name in last:
        (folder / name).unlink(missing_ok=True)
    _sync(folder)
    for name in names:
        if name not in last:
            _move(_temporary(folder, name, token), folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    _sync(folder)
    for name in last:
        _move(_temporary(folder, name, token), folder / name)
    _sync(folder)
    (folder / JOURNAL).unlink(missing_ok=True)


def _read_journal(folder: pathlib.Path) -> tuple[str, list[str], list[str]]:
    try:
        with open_plain(folder / JOURNAL, code="ST-SAVE", doing=_DOING) as file:
            journal = parse_object(file.read(_MAX_JOURNAL))
    except JSONProblem as error:
        _refuse(folder, "a journal of this library", str(error), JOURNAL, error)
    token, names, stale = (journal.get(key) for key in ("token", "files", "stale"))
    if (
        not isinstance(token, str)
        or not re.fullmatch("[0-9a-f]{16}", token)
        or not isinstance(names, list)
        or not isinstance(stale, list)
        or not all(isinstance(name, str) and plain_name(name) for name in names)
        or not all(isinstance(name, str) and WEIGHTS.fullmatch(name) for name in stale)
    ):
        _refuse(folder, "a journal of this library", "an object with other content", JOURNAL)
    return token, names, stale


def _refuse(folder: pathlib.Path, expected: str, found: str, item: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(
        code="ST-SAVE", doing=_DOING, file=str(folder), item=item, expected=expected, found=found, fix=_FIX
    ) from cause


def _sweep(folder: pathlib.Path) -> None:
    """Removes what killed processes have left behind."""
    remnants: dict[str, list[pathlib.Path]] = {}
    for entry in folder.iterdir():
        if found := _TEMPORARY.fullmatch(entry.name):
            remnants.setdefault(found[1], []).append(entry)
    for token, paths in remnants.items():
        if _is_dead(_temporary(folder, _ALIVE, token)):
            for path in paths:
                path.unlink(missing_ok=True)


def _is_dead(alive: pathlib.Path) -> bool:
    try:
        handle = os.open(alive, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return _try_lock(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # Another process holds it, or there are no locks here.
        return False
    return True


def _temporary(folder: pathlib.Path, name: str, token: str) -> pathlib.Path:
    return folder / f".{name}.{token}.tmp"


def _sha256(path: pathlib.Path, written: queue.SimpleQueue[int], stopped: threading.Event) -> str:
    """The sha256 of a file that is being written, of as many bytes more at a time as `written` says.

    They are read back, out of the system's cache, so that what waits to be summed takes no memory of this process.
    """
    sha256, buffer = hashlib.sha256(), memoryview(bytearray(_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while left := written.get():
            while left and not stopped.is_set():
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise OSError(f"{path} has become shorter while it was written")
                sha256.update(buffer[:count])
                left -= count
    return sha256.hexdigest()


def _sync_and_close(file: io.BufferedWriter) -> None:
    with file:
        os.fsync(file.fileno())


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.replace(source, target)


def _sync(folder: pathlib.Path) -> None:
    """Makes renames in a folder last, where folders can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
