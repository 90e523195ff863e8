"""The grouped products that CPUs have machine code for, against sums in float64."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eqx_moe
from eqx_moe.kernels import grouped_matmul as module
from eqx_moe.kernels.cpu import calls
from eqx_moe.kernels.cpu.instructions import LANES

pytestmark = pytest.mark.skipif(not calls.available(), reason="this machine has no CPU kernels")

# (rows, groups, in, out). On both sides of what a tile, a panel, a block of features, of rows and of a sum take.
SHAPES = [
    (1, 1, 1, 1),
    (3, 2, 5, 17),
    (9, 3, 8, 6),
    (23, 5, 33, 15),
    (64, 7, 40, 101),
    (129, 4, 257, 31),
    (301, 6, 19, 389),
    (530, 3, 130, 12),
    (700, 2, 29, 800),
    (1040, 1, 260, 9),
    (16, 2, 2100, 24),
    (11, 2, 6, 1600),
    (4, 9, 70, 13),
    (13, 7, 101, 23),
    (41, 3, 7, 1),
    (41, 3, 1, 7),
]


def products(x, weight, dy, sizes):
    """The three contractions, one group after the other, in float64."""
    x, weight, dy = (each.astype(np.float64) for each in (x, weight, dy))
    y, dx, dweight = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(weight.shape)
    ends = np.cumsum(sizes)
    for group, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        y[start:end] = x[start:end] @ weight[group].T
        dx[start:end] = dy[start:end] @ weight[group]
        dweight[group] = dy[start:end].T @ x[start:end]
    return y, dx, dweight


@jax.jit
def by_kernels(x, weight, dy, sizes):
    return (
        calls.product(x, weight, sizes),
        calls.transposed_product(dy, weight, sizes),
        calls.weight_gradient(x, dy, sizes),
    )


def draw(shape, seed: int):
    rows, groups, inner, outer = shape
    random = np.random.default_rng(seed)
    shapes = (rows, inner), (groups, outer, inner), (rows, outer)
    return [random.normal(size=each).astype(np.float32) for each in shapes]


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == jnp.float32
        assert np.abs(ours - theirs).max() <= 2e-6 * max(1.0, np.abs(theirs).max())


@st.composite
def cases(draw):
    rows, groups, *_ = shape = draw(st.sampled_from(SHAPES))
    kind = draw(st.sampled_from(["even", "random", "one", "rest"]))
    sizes = np.full(groups, rows // groups, np.int32)
    if kind == "one":
        sizes = np.zeros(groups, np.int32)
        sizes[draw(st.integers(0, groups - 1))] = rows
    elif kind != "even":
        cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups)))
        if kind == "random":
            cuts[-1] = rows
        sizes = np.diff([0, *cuts]).astype(np.int32)
    return shape, sizes, draw(st.integers(0, 2**31 - 1))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_the_three_contractions(case):
    shape, sizes, seed = case
    x, weight, dy = draw(shape, seed)
    found = by_kernels(x, weight, dy, sizes)
    assert_equal(found, products(x, weight, dy, sizes))
    # Which thread does what changes nothing.
    for first, second in zip(found, by_kernels(x, weight, dy, sizes), strict=True):
        assert np.array_equal(first, second)


def test_what_lies_beside_a_group_does_not_reach_it():
    """Not a number in the rows past all groups, in groups' rows for others, in the matrices of groups without rows."""
    x, weight, dy = draw((90, 4, 21, 37), 0)
    sizes = np.asarray([30, 0, 13, 20], np.int32)
    expected = products(x, weight, dy, sizes)
    x[63:], dy[63:], weight[1] = np.nan, np.nan, np.nan
    assert_equal(by_kernels(x, weight, dy, sizes), expected)
    x[:30], dy[:30] = np.nan, np.nan
    for found, theirs in zip(by_kernels(x, weight, dy, sizes), expected, strict=True):
        own = 1 if len(found) == 4 else 30
        assert np.isnan(found[:own]).all()
        assert_equal([found[own:]], [theirs[own:]])


@pytest.mark.parametrize("sizes", [[50, 60], [-5, 9], [2**31 - 1, 2**31 - 1], [0, 0]])
def test_sizes_that_cannot_be(sizes):
    """Of more rows than there are, those that are; of less than none, none."""
    shape = (70, 2, 24, 16)
    x, weight, dy = draw(shape, 1)
    first = max(0, min(sizes[0], 70))
    clipped = np.asarray([first, max(0, min(sizes[1], 70 - first))])
    assert_equal(by_kernels(x, weight, dy, np.asarray(sizes, np.int32)), products(x, weight, dy, clipped))


def test_many_programs_at_once():
    """Each from a thread of its own; all share XLA's threads."""
    shape, sizes = (530, 3, 130, 12), np.asarray([400, 30, 100], np.int32)
    inputs = [draw(shape, seed) for seed in range(6)]
    found = {}

    def work(number):
        for _ in range(20):
            found[number] = by_kernels(*inputs[number], sizes)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, arguments in enumerate(inputs):
        assert_equal(found[number], products(*arguments, sizes))


def test_batches_go_one_after_the_other():
    x, weight, dy = draw((24, 3, 5, 7), 2)
    sizes = np.asarray([[4, 10, 10], [0, 20, 1]], np.int32)
    found = jax.vmap(lambda x, sizes: by_kernels(x, weight, dy, sizes))(np.stack([x, 2 * x]), sizes)
    for row, scale in ((0, 1), (1, 2)):
        assert_equal([each[row] for each in found], products(scale * x, weight, dy, sizes[row]))


@pytest.mark.parametrize(("dtype", "used"), [("float32", 1), ("bfloat16", 0)])
def test_which_products_take_the_kernels(dtype, used):
    text = (
        jax.jit(module.grouped_matmul)
        .trace(jnp.ones((9, 5), dtype), jnp.ones((2, 7, 5), dtype), jnp.asarray([4, 5]))
        .lower()
        .as_text()
    )
    assert text.count("stablehlo.custom_call @eqx_moe_grouped_matmul") == used


def test_a_program_goes_to_another_process(tmp_path):
    """Exported, it names the kernels; the other process loads them."""
    x, weight, _ = draw((9, 2, 5, 7), 3)
    sizes = np.asarray([4, 5], np.int32)
    check = jax.export.DisabledSafetyCheck.custom_call(calls.TARGET)
    exported = jax.export.export(jax.jit(module.grouped_matmul), disabled_checks=[check])(x, weight, sizes)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "arrays.npz", x, weight, sizes)
    code = """
import jax, numpy
from eqx_moe.kernels.cpu import calls
calls.load()
program = jax.export.deserialize(bytearray(open("program", "rb").read()))
numpy.save("result.npy", program.call(*numpy.load("arrays.npz").values()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = module.grouped_matmul(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(sizes))
    assert np.array_equal(np.load(tmp_path / "result.npy"), expected)


GUARDED = """
import ctypes, mmap, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import test_cpu_kernels as tests
from eqx_moe.kernels.cpu import handler

libc = ctypes.CDLL(None, use_errno=True)
keep = []

def guarded(array, at_end):
    # A copy between two pages that cannot be touched, at the end of what lies between them or at its start.
    length = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    place = mmap.mmap(-1, length + 2 * mmap.PAGESIZE)
    keep.append(place)
    base = ctypes.addressof(ctypes.c_char.from_buffer(place))
    for page in (base, base + mmap.PAGESIZE + length):
        assert libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
    start = base + mmap.PAGESIZE + (length - array.nbytes if at_end else 0)
    ctypes.memmove(start, array.ctypes.data, array.nbytes)
    return start

def job(kind, x, other, sizes, out, rows, outer, inner, items):
    # Freed by the one that lets go of it last, which is never the test.
    words = dict(HOLDERS=2, NEXT=0, DONE=0, ITEMS=items, KIND=kind, X=x, OTHER=other, SIZES=sizes, OUT=out, ROWS=rows)
    words |= dict(OUTER=outer, INNER=inner, SHARE=max(1, rows // 8))
    memory = (ctypes.c_int64 * (handler._JOB_BYTES // 8))()
    for name, value in words.items():
        memory[getattr(handler, "_" + name) // 8] = value
    return memory

# One who comes late: all is done, and the arrays are gone.
handler.help_out.ctypes(ctypes.addressof(late := job(0, 8, 8, 8, 8, 5, 5, 5, 0)))
assert late[handler._HOLDERS // 8] == 1

for number, shape in enumerate(tests.SHAPES):
    rows, groups, inner, outer = shape
    x, weight, dy = tests.draw(shape, number)
    sizes = np.bincount(np.random.default_rng(number).integers(0, groups, rows), minlength=groups)
    sizes = sizes.astype(np.int32)
    expected = tests.products(x, weight, dy, sizes)
    for at_end in (True, False):
        for kind, (left, right) in enumerate([(x, weight), (dy, weight), (x, dy)]):
            want = expected[kind].astype(np.float32)
            arrays = [guarded(each, at_end) for each in (left, right, sizes, np.full_like(want, np.nan))]
            work = job(kind, *arrays, rows, outer, inner, 0)
            # As many items as there are; `handler` counts them so.
            for group in range(groups):
                row_blocks, blocks, _ = handler._cut(ctypes.addressof(work), int(sizes[group]))
                work[handler._ITEMS // 8] += row_blocks * blocks
            handler.help_out.ctypes(ctypes.addressof(work))
            assert work[handler._DONE // 8] == work[handler._ITEMS // 8]
            found = np.frombuffer(ctypes.string_at(arrays[3], want.nbytes), np.float32).reshape(want.shape)
            tests.assert_equal([found], [want])
print("in bounds")
"""


def test_nothing_outside_the_arrays_is_touched():
    """Each array lies between pages that cannot be read or written, once at their end and once at their start."""
    folder = str(pathlib.Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", GUARDED, folder], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "in bounds\n"), done.stderr


PROGRAM = """
import logging, sys
sys.path.insert(0, sys.argv[1])
logging.basicConfig(format="%(message)s")
import test_cpu_kernels as tests
import numpy as np
from eqx_moe.kernels.cpu import instructions
for number, shape in enumerate(tests.SHAPES[: int(sys.argv[2])]):
    x, weight, dy = tests.draw(shape, number)
    sizes = np.bincount(np.random.default_rng(number).integers(0, shape[1], shape[0]), minlength=shape[1])
    sizes = sizes.astype(np.int32)
    tests.assert_equal(tests.by_kernels(x, weight, dy, sizes), tests.products(x, weight, dy, sizes))
print(instructions.LANES)
"""


def test_vectors_of_the_other_length_and_an_edit_that_reaches_the_cache(tmp_path):
    """Either length computes the same on any machine; code of the one is not taken for code of the other."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(pathlib.Path(eqx_moe.__file__).parent, tmp_path / "eqx_moe", ignore=ignored)
    edited = tmp_path / "eqx_moe" / "kernels" / "cpu" / "instructions.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"}
    other = 24 - LANES
    for lanes, shapes, compiled in ((LANES, 1, 1), (other, len(SHAPES), 1), (other, 1, 0)):
        edited.write_text(re.sub("^LANES = .*$", f"LANES = {lanes}", edited.read_text(), flags=re.MULTILINE))
        command = [sys.executable, "-c", PROGRAM, str(pathlib.Path(__file__).parent), str(shapes)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(lanes)]
        assert done.stderr.count("compiling the experts' CPU kernels") == compiled
