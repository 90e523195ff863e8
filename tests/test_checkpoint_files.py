"""Reading and writing safetensors, held against safetensors' own reader and writer."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tqdm

from eqx_moe.checkpoint import Name, checksums, leaf_paths, load_leaves, plan, reader, replacing, save_leaves, writer
from eqx_moe.checkpoint.dtypes import WEIGHT_DTYPES
from eqx_moe.checkpoint.header import read_header
from eqx_moe.checkpoint.reader import aligned_empty
from eqx_moe.checkpoint.replacing import Replacing, finish_replacing
from eqx_moe.checkpoint.writer import plan_shards
from eqx_moe.errors import CheckpointError
from eqx_moe.sizes import parse_size

INDEX = "model.safetensors.index.json"
ORIGINAL = (
    Name("h.{l}.gate", "h.{l}.e.{e}.w1"),
    Name("h.{l}.up", "h.{l}.e.{e}.w3"),
    Name("h.{l}.norm", "h.{l}.norm"),
    Name("router", "router"),
)
PACKED = (Name(("h.{l}.gate", "h.{l}.up"), "h.{l}.gate_up"), *ORIGINAL[2:])
LAYOUTS = {"original": ORIGINAL, "packed": PACKED}


def leaves(dtype="bfloat16", router="float32"):
    """Sizes that are odd in every way, and a router wider than the rest that comes last."""
    keys = iter(jax.random.split(jax.random.key(0), 99))
    layer = lambda: {  # noqa: E731
        "gate": jax.random.normal(next(keys), (5, 3, 7), dtype),
        "up": jax.random.normal(next(keys), (5, 11, 7), dtype),
        "norm": jax.random.normal(next(keys), (7,), dtype),
    }
    return leaf_paths({"h": [layer(), layer()], "router": jax.random.normal(next(keys), (5, 7), router)})


def shapes(tree):
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.items()}


def load(folder, tree, layouts=LAYOUTS, **options):
    return load_leaves(folder, shapes(tree), layouts, skipped={}, **options)


def same(a, b):
    return list(a) == list(b) and all(
        a[path].dtype == b[path].dtype and np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes() for path in a
    )


def stored(folder) -> dict[str, np.ndarray]:
    """Everything in a folder, as safetensors reads it."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.numpy.load_file(path).items():
            assert name not in result
            result[name] = tensor
    return result


@pytest.mark.parametrize("size", ["5GB", 500, 1, "0.3KB"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_loading_what_was_saved_gives_the_same_bytes(tmp_path, dtype, layout, size):
    tree = leaves(dtype)
    save_leaves(tmp_path, tree, LAYOUTS[layout], max_shard_size=size)
    assert (size != "5GB") == (tmp_path / INDEX).exists()
    assert same(load(tmp_path, tree), tree)


@pytest.mark.parametrize("size", ["5GB", 500])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_safetensors_reads_what_we_write(tmp_path, layout, size):
    tree = leaves()
    save_leaves(tmp_path, tree, LAYOUTS[layout], max_shard_size=size)
    tensors = stored(tmp_path)
    assert set(tensors) == set(plan(LAYOUTS[layout], tree))
    np.testing.assert_array_equal(tensors["router"], tree["router"])
    if layout == "original":
        np.testing.assert_array_equal(tensors["h.1.e.3.w3"], tree["h.1.up"][3])
    else:
        joined = jnp.concatenate([tree["h.1.gate"], tree["h.1.up"]], axis=-2)
        np.testing.assert_array_equal(tensors["h.1.gate_up"], joined)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_we_read_what_safetensors_writes(tmp_path, layout):
    tree = leaves()
    save_leaves(tmp_path, tree, LAYOUTS[layout], max_shard_size=500)
    tensors = stored(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert same(load(tmp_path, tree), tree)


def test_files_start_their_data_at_64_bytes_and_their_tensors_at_whole_elements(tmp_path):
    tree = leaves()
    save_leaves(tmp_path, tree, ORIGINAL, max_shard_size=700)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file in files:
        raw = file.read_bytes()
        assert (8 + struct.unpack("<Q", raw[:8])[0]) % 64 == 0
        assert json.loads(raw[8:])["__metadata__"] == {"format": "pt"} if raw[8:].endswith(b"}") else True
        with open(file, "rb", buffering=0) as opened:
            for entry in read_header(opened, file.name).values():
                assert entry.start % WEIGHT_DTYPES[entry.dtype].itemsize == 0


def test_the_index_lists_shards_and_totals(tmp_path):
    tree = leaves()
    save_leaves(tmp_path, tree, ORIGINAL, max_shard_size=700)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in tree.values())
    assert index["metadata"]["total_parameters"] == sum(leaf.size for leaf in tree.values())
    for name, shard in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(tmp_path / shard)


def test_a_stack_is_not_torn_apart_by_the_plan():
    tree = leaves()
    tensors = plan(ORIGINAL, tree)
    shards = plan_shards(tensors, {path: np.dtype(leaf.dtype) for path, leaf in tree.items()}, 10**9)
    (names,) = map(list, shards.values())
    firsts = [name for name in names if name.endswith(".e.0.w1")]
    for first in firsts:
        start = names.index(first)
        assert names[start : start + 5] == [first.replace(".e.0.", f".e.{e}.") for e in range(5)]


def test_a_named_dtype_casts_all_but_what_is_kept(tmp_path):
    tree = leaves("bfloat16", router="bfloat16")
    save_leaves(tmp_path, tree, ORIGINAL)
    loaded = load(tmp_path, tree, dtype="float16", keep_fp32=("router", "h.{l}.norm"))
    assert {str(loaded[path].dtype) for path in ("router", "h.0.norm", "h.1.norm")} == {"float32"}
    assert loaded["h.0.gate"].dtype == jnp.float16
    np.testing.assert_array_equal(loaded["h.1.up"], tree["h.1.up"].astype("float16"))
    save_leaves(tmp_path, tree, ORIGINAL, dtype="float32")
    assert {tensor.dtype for tensor in stored(tmp_path).values()} == {np.dtype("float32")}
    save_leaves(tmp_path, loaded, ORIGINAL, dtype="bfloat16", keep_fp32=("router",))
    tensors = stored(tmp_path)
    assert tensors["router"].dtype == np.float32 and tensors["h.0.norm"].dtype == ml_dtypes.bfloat16


def test_saving_a_value_out_of_range_is_refused(tmp_path):
    tree = leaves("float32")
    save_leaves(tmp_path, tree, ORIGINAL)
    before = (tmp_path / "model.safetensors").read_bytes()
    tree["h.1.up"] = tree["h.1.up"].at[2, 1, 1].set(1e5)
    with pytest.raises(CheckpointError, match="ST-RANGE") as caught:
        save_leaves(tmp_path, tree, ORIGINAL, dtype="float16")
    assert caught.value.item == "h.1.e.2.w3"
    assert {path.name for path in tmp_path.iterdir()} == {"eqx_moe.json", "model.safetensors"}
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_infinities_and_nans_pass_any_cast(tmp_path):
    tree = leaves("float32")
    odd = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0, -0.0, 1, 2])
    tree["h.0.gate"] = tree["h.0.gate"].at[3, 1].set(odd)
    save_leaves(tmp_path, tree, ORIGINAL)
    assert same(load(tmp_path, tree), tree)
    np.testing.assert_array_equal(load(tmp_path, tree, dtype="float16")["h.0.gate"][3, 1], odd)


def test_joined_leaves_of_two_dtypes_are_refused(tmp_path):
    tree = leaves()
    tree["h.0.up"] = tree["h.0.up"].astype("float32")
    with pytest.raises(ValueError, match="one dtype"):
        save_leaves(tmp_path / "packed", tree, PACKED)
    assert not (tmp_path / "packed").exists()
    save_leaves(tmp_path / "original", tree, ORIGINAL)
    assert same(load(tmp_path / "original", tree), tree)
    save_leaves(tmp_path / "packed", tree, PACKED, dtype="float32")


def test_leaves_that_are_no_floats_are_refused(tmp_path):
    tree = leaves() | {"router": jnp.zeros((5, 7), jnp.int32)}
    with pytest.raises(ValueError, match="'router' is int32"):
        save_leaves(tmp_path, tree, ORIGINAL)


def test_views_are_written_in_their_own_order(tmp_path):
    """safetensors 0.8 itself writes wrong bytes for arrays that are not contiguous."""
    base = np.arange(5 * 3 * 7, dtype="float32")
    tree = {
        "a": base.reshape(7, 3, 5).T,
        "b": np.broadcast_to(np.float32(3), (4, 2)),
        "c": base[::-2],
        "d": np.asfortranarray(base.reshape(15, 7)),
    }
    save_leaves(tmp_path, tree, tuple(Name(name, name) for name in tree))
    for name, tensor in stored(tmp_path).items():
        np.testing.assert_array_equal(tensor, tree[name])


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_leaves(tmp_path, leaves(), ORIGINAL, max_shard_size=700, other_files={"config.json": b"{}"})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_saving_again_leaves_nothing_of_the_earlier_save(tmp_path):
    tree = leaves()
    (tmp_path / "README.md").write_text("mine")
    for size in (700, 300, "5GB", 500):
        save_leaves(tmp_path, tree, PACKED, max_shard_size=size, other_files={"config.json": b"{}"})
        assert same(load(tmp_path, tree), tree)
        names = {path.name for path in tmp_path.iterdir()}
        listed = {"model.safetensors"}
        if size != "5GB":
            listed = {INDEX, *json.loads((tmp_path / INDEX).read_text())["weight_map"].values()}
        assert names == listed | {"README.md", "config.json", "eqx_moe.json"}


def test_saving_over_the_folder_that_was_loaded(tmp_path):
    tree = leaves()
    save_leaves(tmp_path, tree, ORIGINAL, max_shard_size=700)
    loaded = load(tmp_path, tree)
    save_leaves(tmp_path, loaded, PACKED, max_shard_size=900)
    assert same(loaded, tree) and same(load(tmp_path, tree), tree)


@pytest.mark.parametrize("calls", range(1, 60, 3))
def test_a_save_that_fails_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, calls):
    """Every system call that matters fails in its turn."""
    old, new = leaves(), {path: leaf + 1 for path, leaf in leaves().items()}
    save_leaves(tmp_path, old, ORIGINAL, max_shard_size=700, other_files={"config.json": b"old"})
    left = [calls]

    def failing(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call

    for name in ("open", "fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    with contextlib.suppress(OSError, CheckpointError):
        save_leaves(tmp_path, new, ORIGINAL, max_shard_size=700, other_files={"config.json": b"new"})
    monkeypatch.undo()
    finish_replacing(tmp_path)
    assert not [path for path in tmp_path.glob(".*") if ".alive." not in path.name]
    whole = {b"old": old, b"new": new}[(tmp_path / "config.json").read_bytes()]
    assert same(load(tmp_path, old, verify=True), whole)
    save_leaves(tmp_path, old, ORIGINAL, max_shard_size=700, other_files={"config.json": b"old"})
    assert not list(tmp_path.glob(".*"))


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="CFG-FOLDER"):
            save_leaves(folder, leaves(), ORIGINAL)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    tree = leaves()
    save_leaves(tmp_path, tree, ORIGINAL)
    device_put = jax.device_put

    def shrink(buffer):
        os.truncate(tmp_path / "model.safetensors", 2000)
        return device_put(buffer)

    monkeypatch.setattr(jax, "device_put", shrink)
    with pytest.raises(CheckpointError, match="ST-CHANGED"):
        load(tmp_path, tree)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """What was opened and checked is what is read."""
    tree = leaves()
    save_leaves(tmp_path, tree, ORIGINAL)
    device_put = jax.device_put

    def replace(buffer):
        if not (tmp_path / "old").exists():
            os.replace(tmp_path / "model.safetensors", tmp_path / "old")
            (tmp_path / "model.safetensors").write_bytes(bytes(5000))
        return device_put(buffer)

    monkeypatch.setattr(jax, "device_put", replace)
    assert same(load(tmp_path, tree), tree)


@pytest.mark.parametrize("size", [0, -1, True, "", "5", "GB", "5 parsecs", "-1GB", "0GB", "5GB GB", "nanGB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(size, "max_shard_size")


def test_sizes():
    sizes = [parse_size(s, "max_shard_size") for s in (7, "7B", "5GB", "5gb", "2GiB", " 1.5 MB ", "3KiB", "1TB")]
    assert sizes == [7, 7, 5 * 10**9, 5 * 10**9, 2**31, 1_500_000, 3072, 10**12]


def test_buffers_are_aligned():
    for size in (1, 7, 4097):
        array = aligned_empty((size, 3), np.dtype("float32"))
        assert array.shape == (size, 3) and array.ctypes.data % 64 == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_loading_takes_the_buffers_over_without_a_copy(tmp_path):
    """Measured in address space, in a process of its own: 64 MiB of weights in 16 leaves must not be held twice."""
    program = """
import resource, sys, jax, numpy as np
from eqx_moe.checkpoint import Name, load_leaves, save_leaves
leaves = {str(i): jax.ShapeDtypeStruct((1024, 1024), "float32") for i in range(16)}
names = tuple(Name(path, path) for path in leaves)
if sys.argv[2] == "save":
    save_leaves(sys.argv[1], {path: np.ones(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}, names)
else:
    jax.device_put(np.zeros(3)).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = jax.block_until_ready(load_leaves(sys.argv[1], leaves, {"only": names}, skipped={}))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""

    def run(what):
        return subprocess.run(
            [sys.executable, "-c", program, tmp_path, what], stdout=subprocess.PIPE, check=True
        ).stdout

    run("save")
    assert int(run("load")) < 1.25 * 64 * 2**20


def test_mutated_files_are_refused_or_read_as_safetensors_reads_them(tmp_path):
    """What we accept, safetensors accepts with the same content; what we refuse, we refuse as a CheckpointError."""
    tensors = {
        "a": np.arange(6, dtype="f4").reshape(2, 3),
        "b.é": np.arange(3, dtype="f2"),
        "c": np.zeros((0, 2), "f2"),
    }
    good = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    length = 8 + struct.unpack("<Q", good[:8])[0]
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(1000):
        raw = bytearray(good)
        for _ in range(rng.integers(1, 3)):
            place = int(rng.integers(8 if rng.random() < 0.9 else 0, length))
            kind = rng.integers(5)
            if kind == 0:
                raw[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                raw[place] = rng.choice(list(b'0123456789"{}[],:.-eE\\ntu \x00\xff'))
            elif kind == 2:
                del raw[place]
            elif kind == 3:
                other = int(rng.integers(8, length))
                raw[place : place + 4] = raw[other : other + 4]
            else:
                raw.insert(place, raw[place])
        if rng.random() < 0.8:  # Half of the changes would only break the length otherwise.
            raw[:8] = struct.pack("<Q", length - 8 + len(raw) - len(good))
        path = tmp_path / "x.safetensors"
        path.write_bytes(raw)
        with open(path, "rb", buffering=0) as file:
            try:
                entries = read_header(file, "x.safetensors")
            except CheckpointError:
                continue
        accepted += 1
        theirs = safetensors.deserialize(bytes(raw))
        assert {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in theirs} == {
            name: (entry.dtype, entry.shape, bytes(raw[entry.start : entry.stop])) for name, entry in entries.items()
        }
    assert accepted > 20


class Bar(tqdm.tqdm):
    """Counts, and shows nothing; tqdm's own does neither if it is switched off."""

    def __init__(self, doing: str, total: int):
        super().__init__(total=total, disable=True)
        self.doing, self.n = doing, 0

    def update(self, n: int) -> None:
        self.n += n


@pytest.fixture
def bars(monkeypatch):
    """Puts `Bar` in the place of a module's; gives those that were made."""
    made: list[Bar] = []

    def watch(module) -> list[Bar]:
        monkeypatch.setattr(module, "progress", lambda *given: made.append(Bar(*given)) or made[-1])
        return made

    return watch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module, doing", [(writer, "saving"), (reader, "loading")])
def test_the_bar_counts_every_byte_once(tmp_path, bars, layout, module, doing):
    made, tree = bars(module), leaves()
    save_leaves(tmp_path, tree, LAYOUTS[layout], max_shard_size=500)
    load(tmp_path, tree)
    (bar,) = made
    size = sum(leaf.nbytes for leaf in tree.values())
    if doing == "saving":  # headers and index too
        size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors*"))
    assert (bar.doing, bar.total) == (doing, size)
    assert bar.n == size


def interrupted_save(folder, monkeypatch, at: int):
    """A save that Ctrl-C hits as it submits its `at`-th task to a thread: after the thread knows of it."""
    submit, left = concurrent.futures.ThreadPoolExecutor.submit, [at]

    def interrupted(self, *task):
        future = submit(self, *task)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return future

    with monkeypatch.context() as patch:
        patch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", interrupted)
        save_leaves(folder, leaves(), ORIGINAL, max_shard_size=500, other_files={"config.json": b"new"})


@pytest.mark.parametrize("at", range(1, 12))
def test_ctrl_c_ends_a_save(tmp_path, monkeypatch, at):
    """No thread waits for what does not come any more."""
    old = {path: leaf + 1 for path, leaf in leaves().items()}
    save_leaves(tmp_path, old, ORIGINAL, other_files={"config.json": b"old"})
    with pytest.raises(KeyboardInterrupt):
        interrupted_save(tmp_path, monkeypatch, at)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert same(load(tmp_path, old, verify=True), old)


def test_after_an_error_no_sum_is_waited_for(tmp_path, monkeypatch):
    class Slow:
        def update(self, data):
            time.sleep(0.2)

    monkeypatch.setattr(hashlib, "sha256", Slow)

    def pieces():
        yield from [bytes(8)] * 40
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Replacing(tmp_path) as new:
        new.write("a", pieces())
    assert time.monotonic() - start < 2
    assert not list(tmp_path.iterdir())


def test_a_sum_that_fails_fails_the_save(tmp_path, monkeypatch):
    def failing(*task):
        raise OSError(5, "Input/output error")

    old = leaves()
    save_leaves(tmp_path, old, ORIGINAL, other_files={"config.json": b"old"})
    with monkeypatch.context() as patch:
        patch.setattr(replacing, "_sha256", failing)
        with pytest.raises(OSError, match="Input/output"):
            save_leaves(tmp_path, {path: leaf + 1 for path, leaf in old.items()}, ORIGINAL, other_files={})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert same(load(tmp_path, old, verify=True), old)


def test_verifying_tells_its_progress_and_stops(tmp_path, monkeypatch, bars):
    save_leaves(tmp_path, leaves(), ORIGINAL, max_shard_size=500)
    files = sorted(tmp_path.glob("*.safetensors"))
    made = bars(checksums)
    load(tmp_path, leaves(), verify=True)
    assert made[0].n == made[0].total == sum(file.stat().st_size for file in files)
    # The first file is wrong, and reading is slow: the others are not read to their ends.
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"\x77")
    read_into, read = checksums.read_into, []
    monkeypatch.setattr(checksums, "_BLOCK", 64)
    monkeypatch.setattr(checksums, "threads", lambda: 2)

    def slowly(file, path, start, here):
        time.sleep(0.01)
        read.append(len(here) if path.endswith("safetensors") else 0)
        read_into(file, path, start, here)

    monkeypatch.setattr(checksums, "read_into", slowly)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, leaves(), verify=True)
    assert caught.value.code == "SUM-DIFFERS" and caught.value.file == str(files[0])
    assert sum(read) < 0.8 * sum(file.stat().st_size for file in files)
