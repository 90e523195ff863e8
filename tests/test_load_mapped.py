"""Weights that are used from where they lie in their files, and those that are read."""

import pathlib
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from eqx_moe.checkpoint import Name, Skipped, load_leaves, open_weights, read_array, reader, save_leaves
from eqx_moe.checkpoint.dtypes import DTYPES
from eqx_moe.checkpoint.header import DTYPE_BITS, write_header
from eqx_moe.checkpoint.mapping import may_be_mapped
from eqx_moe.errors import CheckpointError

ORIGINAL = (
    Name("norm", "norm"),
    Name("gate", "e.{e}.w1"),
    Name("up", "e.{e}.w3"),
    Name("head", "head"),
)
PACKED = (Name("norm", "norm"), Name(("gate", "up"), "gate_up"), Name("head", "head"))
LAYOUTS = {"original": ORIGINAL, "packed": PACKED}
LARGE = ("gate", "up", "head")

if sys.platform != "linux":
    pytest.skip("files are mapped under Linux only", allow_module_level=True)


def leaves() -> dict[str, np.ndarray]:
    """An odd norm in front, and stacks of more than a MiB whose single tensors are no multiples of 64 bytes."""
    shapes = {"norm": (7,), "gate": (16, 129, 131), "up": (16, 137, 131), "head": (1028, 257)}
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype("float32") for path, shape in shapes.items()}


def load(folder, tree, **options):
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.items()}
    return load_leaves(folder, shapes, LAYOUTS, skipped={}, **options)


def mapped(array: jax.Array) -> bool:
    """Whether the array lies in a map of a file of weights."""
    address = array.unsafe_buffer_pointer()
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        if ".safetensors" in line:
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
            if start <= address < stop:
                return True
    return False


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


@pytest.fixture
def local(monkeypatch):
    """As if on a local disk, wherever the tests run."""
    monkeypatch.setattr(reader, "may_be_mapped", lambda path: True)


@pytest.mark.parametrize("size", ["5GB", "1.2MB"])
def test_whole_stacks_are_mapped_in_the_original_layout(tmp_path, local, size):
    tree = leaves()
    save_leaves(tmp_path, tree, ORIGINAL, max_shard_size=size)
    loaded = load(tmp_path, tree)
    assert same(loaded, tree)
    assert [path for path in tree if mapped(loaded[path])] == list(LARGE)
    assert same(load(tmp_path, tree, verify=True), tree)


def test_what_cannot_be_mapped_is_read(tmp_path, local, monkeypatch):
    tree = leaves()
    save_leaves(tmp_path, tree, PACKED)
    loaded = load(tmp_path, tree)
    assert same(loaded, tree)
    assert [path for path in tree if mapped(loaded[path])] == ["head"]  # gate and up take turns in the file
    halves = load(tmp_path, tree, dtype="bfloat16")
    assert not any(map(mapped, halves.values()))
    assert same(halves, {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in tree.items()})
    # As safetensors writes it: by name within a dtype, and aligned to eight bytes at the most.
    save_leaves(tmp_path, tree, ORIGINAL)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(dict(reversed(tensors.items())), path)
    assert same(load(tmp_path, tree), tree)
    save_leaves(tmp_path, tree, ORIGINAL)
    monkeypatch.setattr(reader, "may_be_mapped", lambda path: False)
    loaded = load(tmp_path, tree)
    assert same(loaded, tree) and not any(map(mapped, loaded.values()))


@pytest.mark.parametrize("change", ["order", "gap", "file", "shift"])
def test_a_stack_that_does_not_lie_as_the_model_has_it_is_read(tmp_path, local, change):
    """The same tensors, not one after another from a multiple of 64 on."""
    tree = {"gate": leaves()["gate"]}
    names = (Name("gate", "e.{e}.w1"),)
    tensors = {f"e.{e}.w1": tree["gate"][e] for e in range(16)}
    order = list(tensors)
    if change == "order":
        order[3], order[4] = order[4], order[3]
    if change == "gap":
        tensors["other"] = np.zeros(16, "float32")
        order.insert(5, "other")
    if change == "shift":
        tensors["other"] = np.zeros(1, "float32")
        order.insert(0, "other")
    parts = [order[:9], order[9:]] if change == "file" else [order]
    for i, part in enumerate(parts):
        content = write_header({name: ("F32", tensors[name].shape) for name in part})
        content += b"".join(tensors[name].tobytes() for name in part)
        (tmp_path / f"{i}.safetensors").write_bytes(content)
    index = {name: f"{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    shapes = {"gate": jax.ShapeDtypeStruct(tree["gate"].shape, "float32")}
    loaded = load_leaves(tmp_path, shapes, {"only": names}, skipped=[Skipped("other", "a filler")])
    assert same(loaded, tree) and not mapped(loaded["gate"])


def test_donating_a_mapped_array_leaves_the_file_alone(tmp_path, local):
    """The map is read-only: to write into it would kill the process. jax copies such a buffer before it reuses it."""
    tree = leaves()
    save_leaves(tmp_path, tree, ORIGINAL)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = load(tmp_path, tree)
    assert mapped(loaded["head"])
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    stepped = step(step(loaded))
    assert loaded["head"].is_deleted()
    assert same(stepped, {path: leaf + 1 + 1 for path, leaf in tree.items()})
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_mapped_arrays_outlive_what_happens_to_the_files_names(tmp_path, local):
    tree = leaves()
    save_leaves(tmp_path, tree, ORIGINAL)
    loaded = load(tmp_path, tree)
    save_leaves(tmp_path, {path: leaf + 1 for path, leaf in tree.items()}, PACKED)
    assert same(loaded, tree)
    save_leaves(tmp_path, loaded, ORIGINAL)
    for path in tmp_path.iterdir():
        path.unlink()
    assert same(loaded, tree)


def test_which_file_systems_are_local(tmp_path):
    mounts = tmp_path / "mountinfo"
    here, below, odd = tmp_path / "here", tmp_path / "here" / "below", tmp_path / "a b"
    for folder in (here, below, odd):
        folder.mkdir()

    def table(*rows):
        lines = [f"1 0 8:1 / {str(at).replace(' ', chr(92) + '040')} rw shared:1 - {kind} dev rw" for at, kind in rows]
        mounts.write_text("\n".join(lines) + "\n")

    table(("/", "ext4"), (here, "nfs4"), (below, "xfs"), (odd, "fuse.sshfs"))
    found = [may_be_mapped(folder / "x", str(mounts)) for folder in (tmp_path, here, below, odd)]
    assert found == [True, False, True, False]
    table(("/", "nfs"), (here, "ext4"), (here, "lustre"))
    assert not may_be_mapped(here / "x", str(mounts))
    (here / "link").symlink_to(below / "x")
    table(("/", "ext4"), (below, "9p"))
    assert not may_be_mapped(here / "link", str(mounts))
    assert not may_be_mapped(here, str(tmp_path / "absent"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_format_is_read(tmp_path, dtype):
    bits, rng = DTYPE_BITS[dtype], np.random.default_rng(0)
    raw = rng.integers(0, 2 if dtype == "BOOL" else 256, 24 * bits // 8, dtype=np.uint8).tobytes()
    (tmp_path / "model.safetensors").write_bytes(write_header({"x": (dtype, (4, 6))}) + raw)
    with open_weights(tmp_path) as stored:
        array = read_array(stored["x"], "x")
    assert array.shape == (4, 6) and array.dtype == DTYPES[dtype]
    # Bit by bit, from the lowest of the first byte on.
    number = int.from_bytes(raw, "little")
    codes = [number >> i * bits & (1 << bits) - 1 for i in range(24)]
    assert [int.from_bytes(element.tobytes(), "little") for element in array.reshape(-1)] == codes
    if dtype in ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"):
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file

        theirs = load_file(tmp_path / "model.safetensors")["x"].to(torch.float64).numpy()
        np.testing.assert_array_equal(array.astype(np.float64), theirs)


def test_a_boolean_that_is_none(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(write_header({"x": ("BOOL", (3,))}) + b"\0\2\1")
    with open_weights(tmp_path) as stored, pytest.raises(CheckpointError, match="ST-VALUE"):
        read_array(stored["x"], "x")
