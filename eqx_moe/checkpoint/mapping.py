"""Whether a file may be mapped into memory, so that weights are used from where they lie on the disk.

A map is the file: should another program cut the file short, reading the part that is gone kills the process (SIGBUS),
and should one write into it, the weights change. No writer of checkpoints does that: ours, transformers and the Hub's
client write a new file and rename it, which leaves an old map as it was. On a network file system it takes less, a
connection that is lost, and reading page by page is slow besides (huggingface/safetensors#562). So a file is mapped
only where Linux says that the file system is a local one, and read elsewhere.
"""

import os
import pathlib
import re

_LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}


def may_be_mapped(path: str | os.PathLike, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether the file lies on a file system that is known to be local."""
    try:
        lines = pathlib.Path(mounts).read_text(errors="replace").splitlines()
    except OSError:  # Not Linux.
        return False
    real = pathlib.Path(path).resolve()
    best, kind = -1, ""
    for line in lines:
        # ID PARENT DEVICE ROOT MOUNTPOINT OPTIONS ... - TYPE SOURCE OPTIONS; see proc_pid_mountinfo(5).
        fields, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields.split(" ")[4])
        # Of two mounts at one place the later one is on top.
        if len(point) >= best and real.is_relative_to(point):
            best, kind = len(point), rest.split(" ")[0]
    return kind in _LOCAL
