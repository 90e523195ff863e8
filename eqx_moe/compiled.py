"""Machine code of Numba's: compiled once for a machine, without the interpreter lock, and announced."""

import contextlib
import functools
import hashlib
import inspect
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from numba import njit
from numba.core import event, sigutils
from numba.core.ccallback import CFunc

_log = logging.getLogger("eqx_moe")


def kernel(function: Callable[..., Any]) -> Any:
    """`numba.njit` without the interpreter lock, kept in Numba's cache.

    Numba keeps the machine code beside the source, in the user's cache, or in NUMBA_CACHE_DIR; if none of these can
    be written to, each process compiles.

    Numba takes code from its cache as long as the file that a kernel stands in is the same, whatever becomes of the
    kernels that it calls and that are compiled into it. Here the cache is that of all files of the folder.
    """
    try:
        compiled: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # "no locator available"
        return njit(nogil=True)(function)
    compiled._cache._cache_file._source_stamp = _stamp(function)
    return compiled


def c_function(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """`numba.cfunc`, kept in the cache as `kernel` does; compiled or loaded when it is defined."""

    def decorate(function):
        compiled: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options={"nopython": True})
        # No "no locator available": each process compiles.
        with contextlib.suppress(RuntimeError):
            compiled.enable_caching()
            compiled._cache._cache_file._source_stamp = _stamp(function)
        compiled.compile()
        return compiled

    return decorate


@functools.cache
def _digest(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stamp(function) -> str:
    return _digest(pathlib.Path(inspect.getfile(function)).parent)


@functools.cache
def _say(what: str):
    _log.warning(what)


class _Announcer(event.Listener):
    """Says so when Numba compiles, which it does not if it finds a kernel in its cache."""

    def __init__(self, what: str):
        self._what = what

    def on_start(self, event):
        _say(self._what)

    def on_end(self, event):
        pass


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Says `what` in the log, once in a process, if kernels are compiled meanwhile."""
    announcer = _Announcer(what)
    event.register("numba:compile", announcer)
    try:
        yield
    finally:
        event.unregister("numba:compile", announcer)
