"""Programs of several processes: two of two devices each, over loopback, do what one device does."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import loopback_hub
import meshes
import numpy as np
import optax
import pytest
import two_processes

import eqx_moe
from eqx_moe import train
from eqx_moe.checkpoint import leaf_paths

# A process that waits for the other in vain must not hold up the tests.
_SECONDS = 110


def expect(folder: pathlib.Path, family: str, more: bool) -> None:
    """Writes a checkpoint, and what one device makes of it; with `more` what it generates and learns too."""
    model = eqx_moe.init(meshes.FAMILIES[family], key=jax.random.key(3))
    eqx_moe.save_pretrained(model, folder / "model", max_shard_size=30_000)
    value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(train.loss, has_aux=True))
    (loss, metrics), gradients = value_and_grad(model, meshes.batch())
    trees = {"weight": model, "gradient": gradients}
    values = {
        "loss": loss,
        "largest": max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients)),
    }
    if family == "mixtral":
        values["aux_loss"] = metrics["aux_loss"]
    if more:
        values["prompts"] = np.asarray([[3, 1, 4], [1, 5, 9], [2, 6, 5], [35, 8, 9]])
        values["rows"] = np.asarray(eqx_moe.generate(model, values["prompts"], 5, eos_ids=[]))
        batches = iter([meshes.batch()] * 2)
        trees["tuned"], history = train.fit(model, batches, steps=2, optimizer=optax.sgd(0.1, momentum=0.9))
        values["losses"] = np.asarray([step["loss"] for step in history])
    for kind, tree in trees.items():
        values |= {f"{kind} {path}": leaf for path, leaf in leaf_paths(tree).items()}
    np.savez(folder / "expected.npz", **values)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    "family,axes,more",
    [
        ("mixtral", "expert,data", False),
        ("llama", "tensor,data", False),
        pytest.param("mixtral", "data,expert", True, marks=pytest.mark.full),
        pytest.param("mixtral", "tensor,expert", True, marks=pytest.mark.full),
        pytest.param("mixtral", "expert,tensor", True, marks=pytest.mark.full),
        pytest.param("llama", "data,tensor", True, marks=pytest.mark.full),
    ],
)
def test_two_processes_are_one_device(tmp_path, root, family, axes, more):
    """The first axis lies across the processes."""
    expect(tmp_path, family, more)
    here = pathlib.Path(__file__).parent
    paths = [str(root), str(here), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with loopback_hub.serve() as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        outputs = run(tmp_path, family, axes, environment)
    assert all(output.endswith("all equal\n") for output in outputs), "\n\n".join(outputs)
    saved = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    for name, content in saved.items():
        assert (tmp_path / "again" / name).read_bytes() == content, name
    pushed = hub.repos[two_processes.REPO].files()
    assert {name: pushed[name] for name in pushed.keys() - {"README.md", ".gitattributes"}} == saved
    assert hub.commits == 1


def run(folder: pathlib.Path, family: str, axes: str, environment: dict[str, str]) -> list[str]:
    """What the two processes write."""
    port, logs = free_port(), [folder / f"{process}.log" for process in range(2)]
    program, processes = [sys.executable, two_processes.__file__, str(folder), str(port)], []
    for process, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [*program, str(process), family, axes, "2,2"],
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [log.read_text()[-4000:] for log in logs]


def wait(processes: list[subprocess.Popen]) -> None:
    """Until all have ended, or one has failed (the others would wait for it in vain), or it takes too long."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.1)
