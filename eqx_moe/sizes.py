"""Sizes as people write them, and that of this machine."""

import math
import os
import re

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str, argument: str) -> int:
    """Bytes of 5_000_000_000, "5GB" or "5GiB"; `argument` is what the error calls it."""
    if isinstance(size, str):
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?i?B)", size.strip(), re.IGNORECASE)
        number = float(found[1]) * _UNITS.get(found[2].upper(), math.nan) if found else math.nan
    else:
        number = size if type(size) is int else math.nan
    if not number >= 1:
        raise ValueError(f'`{argument}` must be bytes, at least 1, or a text such as "5GB" or "2GiB"; got {size!r}.')
    return int(number)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
