"""One process of several: what it reads of its files is what its devices hold, byte by byte."""

import itertools
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantised
import test_checkpoint_strided as strided
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Sharding

from eqx_moe.checkpoint import Name, boxes, filling, plan, reader, save_leaves, shards
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.reader import load_leaves
from eqx_moe.checkpoint.shards import open_weights

SINGLE = "model.safetensors"
#: Where a device's part starts and stops along each axis, in quarters of it; the axes that are left out are whole. Each
#: is what the devices of one process have: a span, one on each of two devices, parts that do not touch.
HELD = {
    "first": [[(2, 3)]],
    "inner": [[(0, 4), (1, 3)]],
    "last": [[(0, 4), (0, 4), (2, 4)], [(0, 4), (0, 4), (2, 4)]],
    "several": [[(0, 2), (2, 3), (0, 2)], [(0, 2), (2, 3), (2, 4)], [(2, 4), (2, 3), (0, 4)]],
    "apart": [[(0, 1), (0, 1)], [(0, 1), (3, 4)], [(3, 4), (1, 2)]],
    "nothing": [],
}


class Held(Sharding):
    """The sharding of one process of several, whose devices have these parts of every leaf."""

    def __init__(self, parts):
        self.parts = parts

    def __reduce__(self):
        return Held, (self.parts,)

    def indices(self, shape):
        for part in self.parts:
            ends = itertools.islice(itertools.chain(part, itertools.repeat((0, 4))), len(shape))
            yield tuple(slice(a * n // 4, -(-b * n // 4)) for (a, b), n in zip(ends, shape, strict=True))

    def addressable_devices_indices_map(self, shape):
        return dict(enumerate(self.indices(shape)))


@pytest.fixture
def loaded(monkeypatch):
    """Loads so: path -> the boxes that are held, and the buffers."""

    def put(boxes, buffers, shape, sharding):
        found.append((boxes, [np.array(buffer) for buffer in buffers]))
        return jnp.zeros(())

    def load(folder, shapes, names, held, **options):
        found.clear()
        shardings = dict.fromkeys(shapes, Held(held))
        load_leaves(folder, shapes, {"own": names}, skipped={}, shardings=shardings, **options)
        order = dict.fromkeys(part.leaf for tensor in plan(names, shapes).values() for part in tensor.parts)
        return dict(zip(order, found, strict=True))

    found = []
    monkeypatch.setattr(reader, "_put", put)
    return load


@pytest.fixture
def reads(monkeypatch):
    """How often each byte of the one file has been read."""

    def preadv(number, views, start):
        count = original(number, views, start)
        times[start : start + count] += 1
        return count

    times, original = np.zeros(1 << 21, np.int64), os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    return times


def close_gaps(needed: np.ndarray, limit: int) -> np.ndarray:
    """The bytes that are needed and those of shorter gaps, found byte by byte."""
    result, last = needed.copy(), None
    for at in np.flatnonzero(needed):
        if last is not None and at - last - 1 < limit:
            result[last:at] = True
        last = at
    return result


def mask(shape, sharding) -> np.ndarray:
    result = np.zeros(shape, bool)
    for index in sharding.indices(shape):
        result[index] = True
    return result


@pytest.mark.parametrize("limit", [1, 30, 1 << 17])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("table", strided.TABLES)
def test_what_is_read_is_what_is_held(tmp_path, monkeypatch, loaded, reads, table, held, limit):
    """Over stacks of tensors, packed, interleaved and transposed ones; the short gaps that are read too are as a loop
    over bytes finds them."""
    monkeypatch.setattr(boxes, "_LEAST_LEFT_OUT", limit)
    monkeypatch.setattr(shards, "_SCRATCH", 44)
    monkeypatch.setattr(filling, "PIECE", 100)
    strided.save(tmp_path, table)
    names, leaves, sharding = strided.TABLES[table], strided.leaves(), Held(HELD[held])
    needed, closed = np.zeros_like(reads, bool), np.zeros_like(reads, bool)
    with open_weights(tmp_path) as stored:
        start = min(tensor.entry.start for tensor in stored.values())
        for tensor in plan(names, leaves).values():
            parts = [mask(leaves[part.leaf].shape, sharding)[part.index] for part in tensor.parts]
            here = np.repeat(strided.joined_by_loops(tensor.row, parts).reshape(-1), 4)
            entry = stored[tensor.name].entry
            needed[entry.start : entry.stop] = here
            closed[entry.start : entry.stop] = close_gaps(here, limit)
    found = loaded(tmp_path, strided.shapes(), names, HELD[held])
    for path, (held_boxes, buffers) in found.items():
        covered = np.zeros(leaves[path].shape, int)
        for box, buffer in zip(held_boxes, buffers, strict=True):
            index = tuple(slice(along.start, along.stop) for along in box)
            np.testing.assert_array_equal(buffer, leaves[path][index])
            covered[index] += 1
        np.testing.assert_array_equal(covered, mask(leaves[path].shape, sharding))  # no value twice
    read = reads[start:]
    assert np.all(read[needed[start:]]) and not np.any(read[~closed[start:]])
    assert read.max() <= 1


def test_how_much_is_read_of_half_of_each_row(tmp_path, loaded, reads, monkeypatch):
    """Of long rows the half, of short ones all: a gap of theirs is not worth another read."""
    tree = {"w": np.arange(6 << 16, dtype="float32").reshape(6, 1 << 16), "v": np.ones((6, 5), "float32")}
    names = (Name("w", "w"), Name("v", "v"))
    save_leaves(tmp_path, tree, names)
    monkeypatch.setattr(reader, "may_be_mapped", lambda path: False)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.items()}
    found = loaded(tmp_path, shapes, names, HELD["inner"])
    np.testing.assert_array_equal(found["w"][1][0], tree["w"][:, 1 << 14 : 3 << 14])
    with open_weights(tmp_path) as stored:
        entry = stored["w"].entry
        assert reads[entry.start : entry.stop].sum() == tree["w"].nbytes // 2
        # Of the short rows all from the first value that is needed to the last, and once.
        small = reads[stored["v"].entry.start : stored["v"].entry.stop]
    assert small.max() == 1 and 4 * 3 * 6 < small.sum() <= 4 * 5 * 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("held", HELD)
def test_of_quantised_containers_codes_and_scales_of_what_is_held(tmp_path, monkeypatch, loaded, reads, held, dtype):
    monkeypatch.setattr(boxes, "_LEAST_LEFT_OUT", 1)
    rng, shape, packed = np.random.default_rng(5), (3, 300, 264), (5, 14, 64)
    codes, scales = quantised.random_fp8(rng, *shape)
    blocks, powers = (
        rng.integers(0, 256, (*packed[:2], 2, 16), np.uint8),
        rng.integers(100, 150, (*packed[:2], 2), "u1"),
    )
    tensors = {"w": codes, "w_scale_inv": scales, "x_blocks": blocks, "x_scales": powers}
    quantised.write(tmp_path / SINGLE, tensors)
    # As gpt-oss's releases have them: gate and up take turns, and the tensor is the transpose of a transpose.
    names = (Name("w", "w"), Name(("gate", "up"), "x_blocks", interleaved=True))
    shapes = {"w": shape, "gate": (5, 7, 64), "up": (5, 7, 64)}
    shapes = {path: jax.ShapeDtypeStruct(size, "float32") for path, size in shapes.items()}
    with open_weights(tmp_path) as stored:
        entries = {name: tensor.entry for name, tensor in stored.items()}
        whole = {}
        for name, tensor in decoded(stored).items():
            whole[name] = np.empty(tensor.entry.shape, quantised.BF16)
            tensor.read(boxes.whole(tensor.entry.shape), whole[name])
    expected = {"w": whole["w"], "gate": whole["x_blocks"][:, ::2], "up": whole["x_blocks"][:, 1::2]}
    reads[:] = 0
    found = loaded(tmp_path, shapes, names, HELD[held], dtype=dtype)
    needed = {name: np.zeros(tensor.shape, bool) for name, tensor in tensors.items()}
    for path, leaf in expected.items():
        for box, buffer in zip(*found[path], strict=True):
            np.testing.assert_array_equal(buffer, leaf[tuple(slice(r.start, r.stop) for r in box)].astype(dtype))
    there = np.argwhere(mask(shape, Held(HELD[held])))
    needed["w"][tuple(there.T)] = True
    needed["w_scale_inv"][tuple((there // [1, 128, 128]).T)] = True
    for turn in range(2):
        there = np.argwhere(mask((5, 7, 64), Held(HELD[held]))) * [1, 2, 1] + [0, turn, 0]
        needed["x_blocks"][tuple((there // [1, 1, 32]).T)] = True
        needed["x_scales"][tuple((there // [1, 1, 32]).T)] = True
    for name, tensor in tensors.items():
        due = np.repeat(needed[name].reshape(-1), tensor.itemsize)
        read = reads[entries[name].start : entries[name].stop]
        if name == "w" or held in ("inner", "last", "nothing"):
            np.testing.assert_array_equal(read > 0, due, err_msg=name)
        assert np.all(read[due]) and (due.all() or not read.all()), name


@pytest.mark.skipif(sys.platform != "linux", reason="files are mapped under Linux only")
@pytest.mark.parametrize("held", ["first", "inner", "several", "apart"])
def test_of_a_mapped_leaf_what_is_held_stays_in_the_file(tmp_path, monkeypatch, reads, held):
    """Nothing is read, and what devices are given are views of the file's map: no page is touched but by them."""
    monkeypatch.setattr(reader, "may_be_mapped", lambda path: True)
    tree = {"w": np.arange(1 << 19, dtype="float32").reshape(8, 4, 1 << 14)}
    names, looked_at = (Name("w", "w"),), []
    save_leaves(tmp_path, tree, names)
    with open_weights(tmp_path) as stored:
        start = stored["w"].entry.start

    def put(boxes, buffers, shape, sharding):
        for box, buffer in zip(boxes, buffers, strict=True):
            address = buffer.__array_interface__["data"][0]
            first = 4 * np.ravel_multi_index([along.start for along in box], tree["w"].shape)
            assert map_of(tmp_path / SINGLE, address) == address - start - first
            assert buffer.strides == tree["w"].strides
            np.testing.assert_array_equal(buffer, tree["w"][tuple(slice(r.start, r.stop) for r in box)])
            looked_at.append(buffer.size)
        return jnp.zeros(())

    monkeypatch.setattr(reader, "_put", put)
    shapes, sharding = {"w": jax.ShapeDtypeStruct(tree["w"].shape, "float32")}, Held(HELD[held])
    load_leaves(tmp_path, shapes, {"own": names}, skipped={}, shardings={"w": sharding})
    assert sum(looked_at) == mask(tree["w"].shape, sharding).sum() and not reads[start:].any()


def map_of(path: pathlib.Path, address: int) -> int | None:
    """Where the map of a file begins that has an address in it."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split(" ")[0].split("-"))
        if start <= address < stop and line.endswith(str(path)):
            return start
    return None


def drawn_box(draw, shape):
    return tuple(range(*sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))) for n in shape)


@st.composite
def box_in_shape(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    return shape, [drawn_box(draw, shape) for _ in range(draw(st.integers(1, 4)))]


def places(box, shape) -> list[int]:
    return [int(np.ravel_multi_index(index, shape)) for index in itertools.product(*box)]


@given(box_in_shape(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_boxes_by_loops_over_their_elements(drawn, most):
    shape, several = drawn
    one = several[0]
    cut = list(boxes.pieces(one, shape, most))
    assert [place for piece in cut for place in places(piece, shape)] == places(one, shape)
    for piece in cut:
        assert boxes.extent(piece, shape) == places(piece, shape)[-1] - places(piece, shape)[0] + 1 <= most
    together = set().union(*(places(box, shape) for box in several))
    made = boxes.united(several, boxes.make_one)
    assert set().union(*(places(box, shape) for box in made)) == together and len(made) <= len(several)
    for box in made:
        assert not set(places(box, shape)) - together


def test_parts_that_make_up_one_box():
    """As 8 devices have a leaf of three axes, in any order."""
    rng = np.random.default_rng(3)
    parts = [tuple(range(2 * i, 2 * i + 2) for i in at) for at in np.ndindex(2, 2, 2)]
    for _ in range(50):
        rng.shuffle(order := list(range(8)))
        assert boxes.united((parts[i] for i in order), boxes.make_one) == [(range(4),) * 3]


@given(st.integers(0, 9), st.integers(0, 30), st.integers(1, 4), st.integers(0, 20), st.integers(0, 30))
def test_a_range_with_steps_meets_one_without(start, stop, step, first, last):
    along, within = range(start, stop, step), range(first, last)
    assert list(along[boxes.meeting(along, within)]) == [place for place in along if place in within]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_error_no_more_is_read(tmp_path, monkeypatch, error):
    """What is being read ends; what waits for a thread does not begin."""
    save_leaves(tmp_path, {"w": np.ones((97, 8, 3), np.float32)}, (Name("w", "w.{e}"),))
    read, really = [], filling.read_values

    def slowly(*args):
        read.append(args)
        if len(read) == 2:
            raise error
        time.sleep(0.01)
        really(*args)

    monkeypatch.setattr(filling, "read_values", slowly)
    monkeypatch.setattr(reader, "_LEAST_SHARED_OUT", 1)
    with pytest.raises(error):
        load_leaves(
            tmp_path, {"w": jax.ShapeDtypeStruct((97, 8, 3), np.float32)}, {"one": (Name("w", "w.{e}"),)}, skipped=()
        )
    assert len(read) < 40
