"""Programs of several processes: two of two devices each, over loopback, do what one device does."""

import os
import pathlib
import socket
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

import eqx_moe
from eqx_moe import train
from eqx_moe.checkpoint import leaf_paths

# A process that waits for the other in vain must not hold up the tests.
_SECONDS = 110


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and what one device makes of it."""
    folder = tmp_path_factory.mktemp("distributed")
    model = eqx_moe.init(meshes.MIXTRAL, key=jax.random.key(3))
    eqx_moe.save_pretrained(model, folder / "model", max_shard_size=30_000)
    values_and_grads = eqx.filter_jit(eqx.filter_value_and_grad(train.loss, has_aux=True))
    (loss, metrics), gradients = values_and_grads(model, meshes.batch())
    tuned, history = train.fit(model, iter([meshes.batch()] * 2), steps=2, optimizer=train.adamw(1e-2, 2))
    prompts = np.asarray([[3, 1, 4], [1, 5, 9], [2, 6, 5], [35, 8, 9]])
    np.savez(
        folder / "expected.npz",
        loss=loss,
        aux_loss=metrics["aux_loss"],
        largest=max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients)),
        losses=[step["loss"] for step in history],
        prompts=prompts,
        rows=eqx_moe.generate(model, prompts, 5, eos_ids=[]),
        **{
            f"{kind} {path}": leaf
            for kind, tree in (("weight", model), ("gradient", gradients), ("tuned", tuned))
            for path, leaf in leaf_paths(tree).items()
        },
    )
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    "axes,shape",
    [
        ("expert,data", "2,2"),
        pytest.param("data,expert", "2,2", marks=pytest.mark.full),
        pytest.param("tensor,expert", "2,2", marks=pytest.mark.full),
    ],
)
def test_two_processes_are_one_device(folder, root, axes, shape):
    """The first axis lies across the processes."""
    here = pathlib.Path(__file__).parent
    paths = [str(root), str(here), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(here / "two_processes.py"), str(folder), str(port), str(process), axes, shape],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and output.endswith("all equal\n"), output[-4000:]
    for file in (folder / "model").iterdir():
        assert (folder / "again" / file.name).read_bytes() == file.read_bytes(), file.name
