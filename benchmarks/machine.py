"""What every comparison here shares: the allocator's settings, and a line that says where figures come from."""

import importlib.metadata
import os
import platform
import sys

#: glibc gives large temporaries back to the kernel after every call and then pays for each of their pages again. With
#: these it keeps them; for torch and XLA alike the difference is up to 3x.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def keep_large_blocks() -> None:
    """Starts this program anew with `MALLOC`, which glibc reads at the start only; what is set already stays."""
    if sys.platform == "linux" and not any(name in os.environ for name in MALLOC):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def description(*packages: str) -> str:
    """Machine, versions and the allocator's settings, for the head of a table."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
        model = ", ".join(sorted(names)) or model
    packages = packages or ("jax", "eqx_moe", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    malloc = " ".join(f"{name}={os.environ[name]}" for name in MALLOC if name in os.environ) or "glibc's defaults"
    return f"{cores()} cores {model}, Python {platform.python_version()}, {versions}; {malloc}"
