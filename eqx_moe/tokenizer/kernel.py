"""The decorator of this folder's kernels: `numba.njit` without the interpreter lock, compiled once for a machine."""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Any:
    """Numba keeps the machine code beside the source, in the user's cache, or in NUMBA_CACHE_DIR; if none of these can
    be written to, each process compiles.

    Numba takes code from its cache as long as the file that a kernel stands in is the same, whatever becomes of the
    kernels that it calls and that are compiled into it. Here the cache is that of all files of the folder.
    """
    try:
        compiled: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # "no locator available"
        return njit(nogil=True)(function)
    compiled._cache._cache_file._source_stamp = _stamp()
    return compiled


@functools.cache
def _stamp() -> str:
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
