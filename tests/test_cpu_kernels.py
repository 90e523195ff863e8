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
    """More rows than there are, or less than none: nothing outside the arrays is read or written."""
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


PROGRAM = """
import logging, sys
sys.path.insert(0, sys.argv[1])
logging.basicConfig(format="%(message)s")
import test_cpu_kernels as tests
import numpy as np
from eqx_moe.kernels.cpu import instructions
for number, shape in enumerate(tests.SHAPES):
    x, weight, dy = tests.draw(shape, number)
    sizes = np.bincount(np.random.default_rng(number).integers(0, shape[1], shape[0]), minlength=shape[1])
    sizes = sizes.astype(np.int32)
    tests.assert_equal(tests.by_kernels(x, weight, dy, sizes), tests.products(x, weight, dy, sizes))
print(instructions.LANES)
"""


def test_vectors_of_the_other_length_and_an_edit_that_reaches_the_cache(tmp_path):
    """Both lengths compute the same on any machine; code of the one is not taken for code of the other."""
    shutil.copytree(
        pathlib.Path(eqx_moe.__file__).parent, tmp_path / "eqx_moe", ignore=shutil.ignore_patterns("__pycache__")
    )
    edited = tmp_path / "eqx_moe" / "kernels" / "cpu" / "instructions.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"}
    for lanes in (8, 16):
        edited.write_text(re.sub("^LANES = .*$", f"LANES = {lanes}", edited.read_text(), flags=re.MULTILINE))
        for announcements in (1, 0):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(pathlib.Path(__file__).parent)],
                capture_output=True,
                text=True,
                env=environment,
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.split() == [str(lanes)]
            assert done.stderr.count("compiling the experts' CPU kernels") == announcements
