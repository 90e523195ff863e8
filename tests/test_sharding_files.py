"""Loading onto a mesh and saving from one: the same bits, and never the whole model twice."""

import gc
import weakref

import jax
import meshes
import numpy as np
import pytest
import quantised
from weights import draw

import eqx_moe
from eqx_moe.checkpoint import leaf_paths, reader, writer
from eqx_moe.models import plan_sharding


@pytest.fixture(scope="module")
def model():
    return draw(meshes.MIXTRAL)


@pytest.fixture(scope="module", params=["original", "packed"])
def folder(model, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    eqx_moe.save_pretrained(model, folder, layout=request.param, max_shard_size=30_000)
    return folder


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (4, 1, 2), (1, 1, 1)], ids=str)
def test_loaded_onto_a_mesh_and_saved_from_it(model, folder, tmp_path, shape):
    mesh = meshes.mesh(shape)
    loaded = eqx_moe.from_pretrained(folder, mesh=mesh)
    assert same(loaded, model)
    plan = plan_sharding(loaded, mesh)
    for path, leaf in leaf_paths(loaded).items():
        assert leaf.sharding == plan[path].sharding
        assert {s.data.nbytes for s in leaf.addressable_shards} == {plan[path].bytes_per_device}
    layout = "packed" if "packed" in folder.name else "original"
    eqx_moe.save_pretrained(loaded, tmp_path, layout=layout, max_shard_size=30_000)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in folder.iterdir()}
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_casting_while_loading(model, folder):
    loaded = eqx_moe.from_pretrained(folder, mesh=meshes.mesh((2, 2, 2)), dtype="bfloat16")
    assert same(loaded, jax.tree.map(lambda x: x.astype("bfloat16"), model))


class Alive:
    """How many bytes of what a function returned are alive."""

    def __init__(self, function):
        self.function, self.sizes, self.most = function, [], 0

    def __call__(self, *args):
        made = self.function(*args)
        size = made.nbytes
        self.sizes.append(size)
        self.most = max(self.most, sum(self.sizes))
        # The memory belongs to the array at the bottom of the views.
        owner = made
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        weakref.finalize(owner, self.sizes.remove, size)
        return made


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_the_host_holds_the_devices_parts_and_one_leaf_while_loading(folder, monkeypatch, shape):
    """A CPU device takes over the buffer that it is given: the parts of all devices stay. Beside them there is one leaf
    at a time, or those that share tensors, and when all is loaded nothing."""
    alive = Alive(reader.aligned_empty)
    monkeypatch.setattr(reader, "aligned_empty", alive)
    loaded = leaf_paths(eqx_moe.from_pretrained(folder, mesh=meshes.mesh(shape)))
    on_devices = sum(shard.data.nbytes for leaf in loaded.values() for shard in leaf.addressable_shards)
    one_leaf = max(leaf.nbytes for leaf in loaded.values()) * (2 if "packed" in folder.name else 1)
    assert one_leaf < alive.most <= on_devices + one_leaf
    gc.collect()
    assert set(alive.sizes) <= {shard.data.nbytes for leaf in loaded.values() for shard in leaf.addressable_shards}


def test_the_host_holds_one_expert_while_saving(model, tmp_path, monkeypatch):
    sizes = []

    def assemble(leaf, index):
        entry = original(leaf, index)
        sizes.append((leaf.nbytes, entry.nbytes, len(index)))
        return entry

    original = writer.assemble
    monkeypatch.setattr(writer, "assemble", assemble)
    spread = eqx_moe.with_options(model, mesh=meshes.mesh((2, 2, 2)))
    eqx_moe.save_pretrained(spread, tmp_path)
    assert len(sizes) == len(leaf_paths(model)) - 3 + 3 * 16
    assert all(entry == leaf // (16 if stacked else 1) for leaf, entry, stacked in sizes)


@pytest.mark.parametrize(
    "write, shape",
    [(quantised.write_gpt_oss, (2, 1, 4)), (quantised.write_deepseek, (2, 2, 2))],
    ids=["mxfp4", "fp8"],
)
def test_quantised_files_are_decoded_part_by_part(write, shape, tmp_path):
    """Experts that interleave and transpose on disk, and blocks with edges: the same weights on a mesh as without."""
    write(tmp_path)
    whole = leaf_paths(eqx_moe.from_pretrained(tmp_path, dtype="auto"))
    split = leaf_paths(eqx_moe.from_pretrained(tmp_path, dtype="auto", mesh=meshes.mesh(shape)))
    for path, leaf in whole.items():
        assert split[path].dtype == leaf.dtype and np.array_equal(split[path], leaf), path
    assert any(not leaf.is_fully_replicated for leaf in split.values())
