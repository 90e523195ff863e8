"""One of the processes of tests/test_distributed.py: `two_processes.py FOLDER PORT PROCESS FAMILY AXES SHAPE`.

Two processes of two devices each run the same program; what it finds is compared with what one process wrote to FOLDER.
"""

import os
import pathlib
import sys

import equinox as eqx
import jax
import meshes
import numpy as np
import optax

import eqx_moe
from eqx_moe import sharding, train
from eqx_moe.checkpoint import boxes, leaf_paths

REPO = "org/sharded"


def main(
    folder: pathlib.Path, port: str, process: int, family: str, axes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, initialization_timeout=60)
    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    mesh = jax.make_mesh(shape, axes)

    read, preadv = [], os.preadv

    def count(file, views, start):
        read.append(preadv(file, views, start))
        return read[-1]

    # In files as small as these no gap is worth another read, were it not for this.
    boxes._LEAST_LEFT_OUT, os.preadv = 1, count
    model = eqx_moe.from_pretrained(folder / "model", mesh=mesh)
    os.preadv = preadv
    due = sum(held(leaf) for leaf in leaf_paths(model).values())
    assert sum(read) == due < sum(leaf.nbytes for leaf in leaf_paths(model).values()), (sum(read), due)

    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    check(leaf_paths(model), expected, "weight ", 0)
    check(leaf_paths(eqx_moe.init(meshes.FAMILIES[family], key=jax.random.key(3), mesh=mesh)), expected, "weight ", 0)

    batch = sharding.put(meshes.batch(), model.mesh, rows=True)
    (loss, metrics), gradients = value_and_grad(model, batch)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    if "aux_loss" in expected:
        np.testing.assert_allclose(metrics["aux_loss"], expected["aux_loss"], rtol=1e-6)
    check(leaf_paths(gradients), expected, "gradient ", 1e-5 * expected["largest"])

    if "prompts" in expected:
        rows = eqx_moe.generate(model, expected["prompts"], 5, eos_ids=[])
        assert rows == expected["rows"].tolist(), rows

        tuned, history = train.fit(model, iter([meshes.batch()] * 2), steps=2, optimizer=optax.sgd(0.1, momentum=0.9))
        np.testing.assert_allclose([step["loss"] for step in history], expected["losses"], rtol=1e-5)
        check(leaf_paths(tuned), expected, "tuned ", 1e-5)

    eqx_moe.save_pretrained(model, folder / "again", max_shard_size=30_000)
    # When the call returns, the folder is whole for every process.
    check(leaf_paths(eqx_moe.from_pretrained(folder / "again", mesh=mesh)), expected, "weight ", 0)

    address = eqx_moe.push_to_hub(model, REPO, max_shard_size=30_000)
    assert bool(address) == (process == 0), address
    jax.distributed.shutdown()
    print("all equal")


def held(leaf):
    """Bytes of a leaf that the devices of this process hold, each value once."""
    here = np.zeros(leaf.shape, bool)
    for shard in leaf.addressable_shards:
        here[shard.index] = True
    return here.sum() * leaf.dtype.itemsize


@eqx.filter_jit
def value_and_grad(model, batch):
    values, gradients = eqx.filter_value_and_grad(train.loss, has_aux=True)(model, batch)
    return sharding.replicate(values, model.mesh), gradients


def check(leaves, expected, kind, most):
    for path, leaf in leaves.items():
        for shard in leaf.addressable_shards:
            off = np.max(np.abs(np.asarray(shard.data) - expected[kind + path][shard.index]))
            assert off <= most, (kind, path, shard.index, off, most)


if __name__ == "__main__":
    folder, port, process, family, axes, shape = sys.argv[1:]
    main(pathlib.Path(folder), port, int(process), family, tuple(axes.split(",")), tuple(map(int, shape.split(","))))
