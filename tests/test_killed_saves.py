"""SIGKILL at random moments of a save: afterwards the folder is the old model or the new one, whole."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import kill_saves
import numpy as np
import pytest

from eqx_moe.checkpoint import load_leaves, save_leaves
from eqx_moe.checkpoint.replacing import finish_replacing
from eqx_moe.errors import CheckpointError

SHAPES = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in kill_saves.leaves(0).items()}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")


class Broken(AssertionError):
    pass


def version_of(folder: pathlib.Path) -> int:
    """Which version a folder holds, or it is broken."""
    try:
        finish_replacing(folder)
        version = int((folder / "config.json").read_text())
        loaded = load_leaves(folder, SHAPES, {"only": kill_saves.NAMES}, skipped={}, verify=True)
    except (OSError, ValueError, CheckpointError) as error:
        raise Broken(f"the folder cannot be loaded: {error}") from error
    found = {path: np.unique(leaf) for path, leaf in loaded.items()}
    if any(values.tolist() != [version] for values in found.values()):
        raise Broken(f"config.json is of version {version}, the weights of {found}")
    return version


def heard(savers: subprocess.Popen) -> bytes:
    assert savers.stdout is not None
    said = os.read(savers.stdout.fileno(), 1 << 16)
    assert said, "the savers are gone"
    return said


def run_and_kill(savers: subprocess.Popen, order: bytes, rng: random.Random) -> list[str]:
    """Has a saver started and kills it at a random moment; returns what it said."""
    assert savers.stdin is not None
    savers.stdin.write(order)
    said = b""
    while b"process " not in said or b"save " not in said:
        said += heard(savers)
    process = int(said.split(b"process ")[1].split()[0])
    # A save says some 25 lines; how long it takes is up to the disk.
    lines = rng.randrange(40)
    while said.count(b"\n") < lines:
        said += heard(savers)
        assert not said.endswith(b"died\n"), "the saver died of itself"
    time.sleep(rng.uniform(0, 0.004))
    os.kill(process, signal.SIGKILL)
    while not said.endswith(b"died\n"):
        said += heard(savers)
    return [line for line in said.decode().splitlines() if not line.startswith(("process ", "died"))]


def kill_savers(folder: pathlib.Path, kills: int, mutant: str = "") -> int:
    """Starts a saver, kills it at a random moment, and looks what it has left; so many times. Returns how often it was
    hit inside a write."""
    rng = random.Random(0)
    inside = 0
    save_leaves(folder, kill_saves.leaves(0), kill_saves.NAMES, other_files={"config.json": b"0"})
    with subprocess.Popen(
        [sys.executable, kill_saves.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as savers:
        for _ in range(kills):
            before = version_of(folder)
            lines = run_and_kill(savers, f"{folder}\t{mutant}\n".encode(), rng)
            inside += lines[-1] == "writing"
            after = version_of(folder)
            begun = max(int(line.split()[1]) for line in lines if line.startswith("save "))
            done = max([before] + [int(line.split()[1]) for line in lines if line.startswith("saved ")])
            if after not in (done, begun):
                raise Broken(f"version {done} was saved and {begun} begun; the folder has {after}")
        assert savers.stdin is not None
        savers.stdin.close()
    # What the killed ones have left goes with the next save.
    save_leaves(folder, kill_saves.leaves(7), kill_saves.NAMES, other_files={"config.json": b"7"})
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "eqx_moe.json", "model.safetensors"}, names
    return inside


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.full)])
def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path, kills):
    inside = kill_savers(tmp_path, kills)
    assert inside >= kills / 4


@pytest.mark.parametrize("mutant", ["in-place", "no-journal"])
def test_a_careless_saver_is_found_out(tmp_path, mutant):
    with pytest.raises(Broken):
        kill_savers(tmp_path, 40, mutant)
