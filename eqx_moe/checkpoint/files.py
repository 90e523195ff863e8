"""Opening the files of a checkpoint folder: plain files that lie in it, and nothing else."""

import io
import os
import pathlib
import stat

from eqx_moe.errors import CheckpointError, quote


def plain_name(name: str) -> bool:
    """Whether `name` is the name of a file in the folder itself, on every system: no path, drive, home, URL or NUL, and
    text that can be encoded."""
    marks = any(mark in name for mark in "/\\:\0") or any("\ud800" <= letter <= "\udfff" for letter in name)
    return bool(name) and not name.startswith(("~", ".")) and not marks


def exists(path: pathlib.Path) -> bool:
    """Whether something has that name, even a dangling link."""
    return os.path.lexists(path)


def listing(folder: pathlib.Path) -> str:
    """What is in the folder, for messages."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(quote(name) for name in names[:12]) + more


def open_plain(path: pathlib.Path, *, code: str, doing: str) -> io.FileIO:
    """Opens a regular file of a checkpoint folder for reading, unbuffered.

    Links are followed inside the folder, and into `../../blobs`, as the Hugging Face cache lays out a snapshot.

    Raises:
        CheckpointError: (with `code`) it is absent, not readable, not a regular file, or a link that leads elsewhere.
            A pipe is refused, not waited for.
    """

    def refuse(found: str, fix: str, cause: OSError | None = None):
        raise CheckpointError(
            code=code, doing=doing, file=str(path), expected="a plain readable file", found=found, fix=fix
        ) from cause

    try:
        real, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
        inside = real.is_relative_to(folder) or real.parent == folder.parent.parent / "blobs"
        mode = os.stat(real).st_mode
    except RuntimeError as error:  # How Python before 3.13 reports a loop of links.
        refuse("a loop of symbolic links", "put the file itself in its place", OSError(str(error)))
    except OSError as error:
        refuse(error.strerror or type(error).__name__, "download or copy the file again", error)
    if not inside:
        refuse(f"a link that leads out of the folder, to {quote(str(real))}", "put the file itself into the folder")
    if not stat.S_ISREG(mode):
        refuse(_kind(mode), "put a plain file in its place")
    try:
        # Non-blocking, and looked at again once open: the file may have been exchanged for a pipe since.
        file = io.FileIO(os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)))
    except OSError as error:
        refuse(error.strerror or type(error).__name__, "check the file's permissions", error)
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        refuse(_kind(mode), "put a plain file in its place")
    return file


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something that is no regular file")
