"""The sha256 of every file of weights, kept beside them in eqx_moe.json: they tell damage that no header shows."""

import concurrent.futures
import hashlib
import io
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Mapping
from typing import NoReturn

import numpy as np

from eqx_moe.checkpoint.files import exists, open_plain
from eqx_moe.checkpoint.jsonfile import read_json
from eqx_moe.checkpoint.progress import progress
from eqx_moe.checkpoint.shards import INDEX, Stored, read_into, threads
from eqx_moe.errors import CheckpointError, quote

CHECKSUMS = "eqx_moe.json"
_DOING = "verifying weights"
_BLOCK = 1 << 22  # bytes read at a time
_SAVE_AGAIN = "load without `verify`; saving the model with eqx_moe writes its checksums"


def checksums_json(sums: Mapping[str, str]) -> bytes:
    """The content of eqx_moe.json: file -> sha256 in hexadecimal."""
    return json.dumps({"sha256": dict(sums)}, indent=2).encode() + b"\n"


def verify_checksums(folder: pathlib.Path, stored: Mapping[str, Stored]) -> None:
    """Reads all files of weights, the open ones and the index, and holds them against eqx_moe.json.

    Raises:
        CheckpointError: SUM-* codes, see `eqx_moe.errors`.
    """
    sums = _read_checksums(folder)
    files = {each.path: each.file for each in stored.values()}
    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        if exists(folder / INDEX):
            with open_plain(folder / INDEX, code="IDX-FILE", doing=_DOING) as index:
                _check(folder / INDEX, _sha256(index, str(folder / INDEX)), sums)
        with progress("verifying", sum(os.fstat(file.fileno()).st_size for file in files.values())) as bar:
            read, stopped = dict.fromkeys(files, 0), threading.Event()

            def tell(path: str, count: int) -> bool:
                read[path] += count
                return not stopped.is_set()

            running = {path: pool.submit(_sha256, file, path, tell) for path, file in files.items()}
            try:
                for path, found in running.items():
                    while concurrent.futures.wait([found], timeout=0.2).not_done:
                        bar.update(sum(read.values()) - bar.n)
                    _check(pathlib.Path(path), found.result(), sums)
                bar.update(sum(read.values()) - bar.n)
            finally:  # After an error, or Ctrl-C, nobody waits for the rest.
                stopped.set()
                pool.shutdown(cancel_futures=True)


def _read_checksums(folder: pathlib.Path) -> dict[str, str]:
    file = folder / CHECKSUMS

    def refuse(code: str, expected: str, found: str, item: str = "") -> NoReturn:
        raise CheckpointError(
            code=code, doing=_DOING, file=str(file), item=item, expected=expected, found=found, fix=_SAVE_AGAIN
        )

    if not exists(file):
        refuse("SUM-MISSING", f"a folder with {CHECKSUMS}, as `save_pretrained` writes it", "no file of that name")
    sums = read_json(file, "checksums", doing=_DOING).get("sha256")
    if not isinstance(sums, dict):
        refuse("SUM-LIST", "an object that maps files to their sha256", quote(sums), "sha256")
    for name, digest in sums.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            refuse("SUM-LIST", "64 hexadecimal digits", quote(digest), name)
    return sums


def _sha256(file: io.FileIO, path: str, tell: Callable[[str, int], bool] = lambda path, count: True) -> str:
    """`tell` is told of the bytes as they are read, and says whether to go on."""
    sha256, size = hashlib.sha256(), os.fstat(file.fileno()).st_size
    block = np.empty(_BLOCK, np.uint8)
    for start in range(0, size, _BLOCK):
        here = block[: size - start]
        read_into(file, path, start, here)
        sha256.update(here.data)
        if not tell(path, len(here)):
            break
    return sha256.hexdigest()


def _check(path: pathlib.Path, found: str, sums: Mapping[str, str]) -> None:
    if sums.get(path.name) != found:
        raise CheckpointError(
            code="SUM-DIFFERS",
            doing=_DOING,
            file=str(path),
            expected=f"the sha256 {sums[path.name]} of {CHECKSUMS}" if path.name in sums else f"a file in {CHECKSUMS}",
            found=f"the sha256 {found}" if path.name in sums else "a file that it does not list",
            fix=f"copy or download the file again; if another program has written it since, remove {CHECKSUMS}",
        )
