"""Processes that save over and over, to be killed by test_killed_saves.py.

For each line on stdin, "FOLDER MUTANT", one is forked off, which is faster than a start. It says on stdout when it
begins a save and where it is in one, so that the killer knows what it has hit.
"""

import concurrent.futures
import itertools
import os
import pathlib
import sys
import time

import jax
import numpy as np

from eqx_moe.checkpoint import Name, replacing, save_leaves

NAMES = (Name("norm", "norm"), Name("experts", "experts.{e}.w"), Name("head", "head"))


def leaves(version: int) -> dict[str, np.ndarray]:
    """A model of which every element is the version."""
    shapes = {"norm": (7,), "experts": (6, 160, 256), "head": (48, 256)}
    return {path: np.full(shape, version, np.float32) for path, shape in shapes.items()}


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def careless(folder: pathlib.Path, name: str, pieces) -> concurrent.futures.Future[str]:
    """What a saver must not do: writes straight into the file."""
    with open(folder / name, "wb") as file:
        for piece in pieces:
            file.write(piece)
            say("writing")
    sha256: concurrent.futures.Future[str] = concurrent.futures.Future()
    sha256.set_result("")
    return sha256


def save_on_and_on(folder: pathlib.Path, mutant: str) -> None:
    jax.device_put(np.zeros(3)).block_until_ready()  # what takes time at first, before the clock of the killer runs
    original = replacing.Replacing.write

    def write(self, name, pieces):
        return original(self, name, announced(pieces))

    def announced(pieces):
        for piece in pieces:
            say("writing")
            yield piece

    def slowly(source, target):
        say("moving")
        time.sleep(0.003)  # as long as a busy disk may take: kills must hit here too
        move(source, target)

    move, os.replace = os.replace, slowly
    replacing.Replacing.write = write
    if mutant == "in-place":
        replacing.Replacing.write = lambda self, name, pieces: careless(self._folder, name, pieces)
        replacing.Replacing.commit = lambda self, stale: None
    if mutant == "no-journal":
        replacing.Replacing.commit = move_one_by_one
    for version in itertools.count(int((folder / "config.json").read_text())):
        say("save", version)
        # Now in one file, now in several: what is stale must go.
        size = "5GB" if version % 3 == 0 else 500_000
        save_leaves(
            folder, leaves(version), NAMES, max_shard_size=size, other_files={"config.json": str(version).encode()}
        )
        say("saved", version)


def move_one_by_one(self, stale) -> None:
    for name in sorted(self._names):
        os.replace(self._path(name), self._folder / name)
    for name in stale:
        (self._folder / name).unlink()


if __name__ == "__main__":
    for line in sys.stdin:
        folder, mutant = line.rstrip("\n").split("\t")
        if not (process := os.fork()):
            save_on_and_on(pathlib.Path(folder), mutant)
        say("process", process)
        os.waitpid(process, 0)
        say("died")
