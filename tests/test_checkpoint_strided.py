"""Tables whose tensors interleave and transpose what they hold: against a loop over single values."""

import itertools

import jax
import jax.numpy as jnp
import meshes
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from eqx_moe.checkpoint import Name, plan
from eqx_moe.checkpoint.names import Composition, Tensor
from eqx_moe.checkpoint.reader import load_leaves
from eqx_moe.checkpoint.streaming import open_leaves
from eqx_moe.checkpoint.writer import save_leaves

EXPERTS, FFN, HIDDEN = 8, 3, 5
SHAPES = {
    **{f"{part}": (EXPERTS, FFN, HIDDEN) for part in ("gate", "up")},
    **{f"{part}_bias": (EXPERTS, FFN) for part in ("gate", "up")},
    "down": (EXPERTS, HIDDEN, FFN),
    "square": (7, 4),
}
#: Other ways to lay the same leaves out. The last two have no leading axis of their own in a tensor, or none at all.
TABLES = {
    "gpt_oss": (
        Name(("gate", "up"), "gate_up", interleaved=True, transposed=True),
        Name(("gate_bias", "up_bias"), "gate_up_bias", axis=-1, interleaved=True),
        Name("down", "down", transposed=True),
        Name("square", "square"),
    ),
    "interleaved": (
        Name(("gate", "up"), "gate_up", interleaved=True),
        Name(("gate_bias", "up_bias"), "gate_up_bias", axis=-1),
        Name("down", "down"),
        Name("square", "square", transposed=True),
    ),
    "transposed": (
        Name(("gate", "up"), "gate_up", transposed=True),
        Name(("up_bias", "gate_bias"), "up_gate_bias", interleaved=True),
        Name("down", "down", transposed=True),
        Name("square", "square", transposed=True),
    ),
    "last axis": (
        Name(("gate", "up"), "gate_up", axis=-1),
        Name(("gate_bias", "up_bias"), "gate_up_bias", axis=-2),
        Name("down", "down"),
        Name("square", "square"),
    ),
    "an expert each": (
        Name(("gate", "up"), "e.{e}.gate_up", interleaved=True, transposed=True),
        Name(("gate_bias", "up_bias"), "e.{e}.gate_up_bias", axis=-1, interleaved=True),
        Name("down", "e.{e}.down", transposed=True),
        Name("square", "{i}.square"),
    ),
}


def leaves(dtype="float32") -> dict[str, np.ndarray]:
    """Different numbers all over."""
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    starts = itertools.accumulate(sizes, initial=0)
    return {
        path: (start + np.arange(size)).reshape(shape).astype(dtype)
        for (path, shape), start, size in zip(SHAPES.items(), starts, sizes, strict=False)
    }


def joined_by_loops(row: Name, parts: list[np.ndarray]) -> np.ndarray:
    axis = parts[0].ndim + row.axis if len(parts) > 1 else 0
    values, starts = {}, list(itertools.accumulate((part.shape[axis] for part in parts), initial=0))
    for number, part in enumerate(parts):
        for index in np.ndindex(part.shape):
            place = list(index)
            if len(parts) > 1:
                at = index[axis]
                place[axis] = at * len(parts) + number if row.interleaved else starts[number] + at
            if row.transposed:
                place[-1], place[-2] = place[-2], place[-1]
            values[tuple(place)] = part[index]
    shape = [1 + max(place[i] for place in values) for i in range(parts[0].ndim)]
    return np.asarray([values[place] for place in np.ndindex(*shape)], parts[0].dtype).reshape(shape)


@st.composite
def joinable(draw):
    """The options of a row and the shapes of parts that it can join."""
    count, interleaved, transposed = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.booleans())
    axis = draw(st.sampled_from([-1, -2, -3]))
    ndim = draw(st.integers(max(2 if transposed else 1, -axis if count > 1 else 1), 4))
    shape = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    shapes = [list(shape) for _ in range(count)]
    if count > 1 and not interleaved:
        for each in shapes:
            each[axis] = draw(st.integers(1, 4))
    # Not a `Name` yet: what checks its types draws random numbers, which a strategy must not.
    return dict(axis=axis, interleaved=interleaved and count > 1, transposed=transposed), shapes


@given(joinable())
@settings(max_examples=150, deadline=None)
def test_joining_is_a_loop_and_views_are_its_inverse(drawn):
    options, shapes = drawn
    row = Name("a", "b", **options)
    starts = itertools.accumulate((int(np.prod(shape)) for shape in shapes), initial=0)
    parts = [
        start + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]
    expected = joined_by_loops(row, parts)
    tensor = Tensor("b", (), Composition(("a",) * len(shapes), tuple(map(tuple, shapes)), expected.shape, row))
    joined = tensor.joined(parts)
    np.testing.assert_array_equal(joined, expected)
    for number, (view, part) in enumerate(zip(tensor.views(joined), parts, strict=True)):
        np.testing.assert_array_equal(view, part)
        assert np.shares_memory(view, joined)
        # Any box of a part lies in a box of the tensor.
        box = tuple(range(size // 2, size) for size in part.shape)
        there = joined[tuple(slice(r.start, r.stop, r.step) for r in tensor.box_of(number, box))]
        np.testing.assert_array_equal(there, tensor.turned(part[tuple(slice(r.start, r.stop) for r in box)]))
    # An entry has all parts' values of its own, which is what a reader and a writer go by.
    for entry in np.ndindex(*expected.shape[: tensor.lead]):
        np.testing.assert_array_equal(tensor.joined([part[entry] for part in parts]), expected[entry])


def save(folder, table, tree=None, **options):
    save_leaves(folder, leaves() if tree is None else tree, TABLES[table], **options)


def shapes():
    return {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in SHAPES.items()}


def load(folder, table, **options):
    return load_leaves(folder, shapes(), {"own": TABLES[table]}, skipped={}, **options)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("size", ["5GB", 700])
def test_files_are_as_the_table_says_and_come_back(tmp_path, table, size):
    save(tmp_path, table, max_shard_size=size)
    expected = {}
    for tensor in plan(TABLES[table], leaves()).values():
        parts = [leaves()[part.leaf][part.index] for part in tensor.parts]
        expected[tensor.name] = joined_by_loops(tensor.row, parts)
        assert tensor.shape == expected[tensor.name].shape
    files = [safetensors.numpy.load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert (len(files) > 1) == (size == 700)
    assert_same({name: values for file in files for name, values in file.items()}, expected)
    assert_same(load(tmp_path, table), leaves())


@pytest.mark.parametrize("table", TABLES)
def test_leaves_in_files_are_read_at_every_depth_and_written_anew(tmp_path, table):
    save(tmp_path / "a", table)
    with open_leaves(tmp_path / "a", shapes(), {"own": TABLES[table]}, skipped={}) as unread:
        for path, leaf in leaves().items():
            for depth in range(leaf.ndim + 1):
                for index in itertools.islice(np.ndindex(*leaf.shape[:depth]), 0, None, 1 + 7 * (depth == 3)):
                    np.testing.assert_array_equal(unread[path].read(index), leaf[index])
        for other in TABLES:
            save(tmp_path / other, other, unread)
            save(tmp_path / f"{other} at once", other)
            name = "model.safetensors"
            assert (tmp_path / other / name).read_bytes() == (tmp_path / f"{other} at once" / name).read_bytes()


@pytest.mark.parametrize("table", TABLES)
def test_casting_on_the_way_in_and_out(tmp_path, table):
    save(tmp_path, table, dtype="bfloat16")
    half = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in leaves().items()}
    for dtype, due in (("auto", "bfloat16"), ("float32", "float32")):
        loaded = load(tmp_path, table, dtype=dtype)
        assert all(leaf.dtype == due for leaf in loaded.values())
        assert_same(loaded, half)


@pytest.mark.parametrize("table", TABLES)
def test_leaves_that_are_spread_over_devices(tmp_path, table):
    mesh = meshes.mesh((4, 2), ("expert", "tensor"))
    specs = {"square": (None, "tensor"), "down": ("expert", None, None)}
    shardings = {path: NamedSharding(mesh, PartitionSpec(*specs.get(path, ("expert", None)))) for path in SHAPES}
    spread = {path: jax.device_put(jnp.asarray(leaf), shardings[path]) for path, leaf in leaves().items()}
    save(tmp_path / "spread", table, spread)
    save(tmp_path / "host", table)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("spread", "host")]
    assert written[0] == written[1]
    loaded = load(tmp_path / "host", table, shardings=shardings)
    assert_same(loaded, leaves())
    assert all(leaf.sharding == shardings[path] for path, leaf in loaded.items())


WRONG = {
    "unequal widths take no turns": (Name(("a", "b"), "t", interleaved=True), {"a": (4, 3, 5), "b": (4, 2, 5)}),
    "a vector has no transpose": (Name("a", "t", transposed=True), {"a": (4,)}),
    "vectors have no axis -2": (Name(("a", "b"), "t"), {"a": (4,), "b": (4,)}),
    "entries are vectors": (Name(("a", "b"), "t.{e}", interleaved=True), {"a": (4, 3), "b": (4, 3)}),
    "other axes differ": (Name(("a", "b"), "t", axis=-1), {"a": (4, 3), "b": (5, 3)}),
    "stacks differ": (Name(("a", "b"), "t.{e}", axis=-1), {"a": (4, 3), "b": (5, 3)}),
    "another rank": (Name(("a", "b"), "t", axis=-1), {"a": (4, 3), "b": (3,)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_tables_that_cannot_be(name):
    row, sizes = WRONG[name]
    with pytest.raises(ValueError, match="cannot join leaves of the shapes"):
        plan((row,), {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in sizes.items()})
