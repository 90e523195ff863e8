"""Whether a model will fit, before hours are spent on downloading it."""

import os
import pathlib
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

from eqx_moe.errors import CheckpointError


def check_disk(folder: pathlib.Path, size: int, doing: str, repo: str, fix: str) -> None:
    """Refuses if `size` bytes more do not fit on the disk of `folder`, which need not be there yet.

    Raises:
        CheckpointError: HUB-DISK.
    """
    free = free_disk(folder)
    if size > free:
        raise CheckpointError(
            code="HUB-DISK",
            doing=doing,
            file=repo,
            expected=f"{gigabytes(size)} free on the disk of {str(folder)!r}",
            found=gigabytes(free),
            fix=fix,
        )


def check_memory(needs: dict[str, tuple[int, int, int]], doing: str, repo: str) -> None:
    """Refuses a model that no free memory could hold, and warns of one that does not fit beside what runs now.

    Args:
        needs: where ("this machine", a device) -> the bytes needed, free now, and there in all.

    Raises:
        CheckpointError: HUB-MEMORY.
    """
    for place, (size, free, total) in needs.items():
        fix = 'load fewer bytes (dtype="auto" keeps 16-bit weights), or spread them over a mesh of more devices'
        if size > total:
            raise CheckpointError(
                code="HUB-MEMORY",
                doing=doing,
                file=repo,
                expected=f"{gigabytes(size)} of memory on {place}",
                found=f"{gigabytes(total)} in all",
                fix=fix,
            )
        if size > free:
            warnings.warn(
                f"{repo} needs {gigabytes(size)} of memory on {place}, where {gigabytes(free)} are free now: {fix}.",
                stacklevel=2,
            )


def memory_needs(devices: Sequence[Any], each: int, largest: int) -> dict[str, tuple[int, int, int]]:
    """What `check_memory` takes, where it is known: `each` bytes on every device, read by way of this machine's memory,
    `largest` bytes at a time."""
    on_host = largest + (each * len(devices) if devices[0].platform == "cpu" else 0)
    memory = host_memory()
    needs = {} if memory is None else {"this machine": (on_host, *memory)}
    for device in devices:
        state = (None if device.platform == "cpu" else device.memory_stats()) or {}
        if total := state.get("bytes_limit"):
            needs[str(device)] = (each, total - state.get("bytes_in_use", 0), total)
    return needs


def free_disk(folder: pathlib.Path) -> int:
    """Bytes that can still be written on the disk where `folder` is or would be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def host_memory() -> tuple[int, int] | None:
    """Bytes of this machine's memory that are free now and that there are in all; None where it does not say.

    A container's limit counts as all there is.
    """
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
        rows = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in text.splitlines()}
        free, total = rows["MemAvailable"], rows["MemTotal"]
    except (OSError, LookupError, ValueError):
        return None
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    if os.access(limit, os.R_OK) and (text := limit.read_text().strip()).isdigit():
        free, total = min(free, int(text)), min(total, int(text))
    return free, total


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size:,} bytes"
