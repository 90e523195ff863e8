"""`linear`, which takes another way for a single row; on small whole numbers, whose sums are exact in any order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_moe.kernels.linear import linear, row_in_parts

run = functools.partial(jax.jit, static_argnames="dtype")(linear)


def whole_numbers(*shapes):
    random = np.random.default_rng(3)
    return [jnp.asarray(random.integers(-3, 4, shape), jnp.float32) for shape in shapes]


# (rows, in, out): single rows that are one part of 4032, one and an entry, two and some; and more rows than one.
@pytest.mark.parametrize(("rows", "size", "out"), [((), 7, 5), ((1,), 4033, 3), ((1, 1), 8100, 6), ((2, 3), 4100, 4)])
def test_value_and_gradients(rows, size, out):
    x, weight, dy = whole_numbers((*rows, size), (out, size), (*rows, out))
    y, pull = jax.vjp(run, x, weight)
    np.testing.assert_array_equal(y, np.asarray(x) @ np.asarray(weight).T)
    dx, dweight = pull(dy)
    np.testing.assert_array_equal(dx, np.asarray(dy) @ np.asarray(weight))
    np.testing.assert_array_equal(dweight, np.asarray(dy).reshape(-1, out).T @ np.asarray(x).reshape(-1, size))
    if np.prod(rows) == 1:  # From jax 0.11 on `linear` does not go this way.
        parts = row_in_parts(x.reshape(1, -1), lambda start, size: weight[:, start : start + size])
        np.testing.assert_array_equal(parts, np.asarray(y).reshape(1, -1))


@pytest.mark.parametrize("rows", [(), (3,)])
def test_dtypes(rows):
    """The weight is rounded to the dtype of `x`, the sum to the dtype that is asked for, and nothing between."""
    x, weight = whole_numbers((*rows, 999), (5, 999))
    x = (x + 7).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float32) @ np.asarray(weight).T
    assert (exact.astype(jnp.bfloat16) != exact).any()
    barely_more = weight * (1 + 2.0**-10)  # In bfloat16 the same numbers.
    found = run(x, barely_more, dtype=jnp.float32)
    assert found.dtype == jnp.float32 and run(x, weight).dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact)
    np.testing.assert_array_equal(run(x, weight), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_are_smaller_than_what_is_written_down_first(dtype):
    """16 KiB are the first row that is too large (docs/log.md); together the parts are the row."""
    parts = []

    def columns(start, size):
        parts.append((start, size))
        return jnp.ones((3, size), dtype)

    x = jnp.ones((1, 20000), dtype)
    assert jnp.all(row_in_parts(x, columns) == jnp.asarray(20000, dtype))
    assert all(0 < size * x.dtype.itemsize < 1 << 14 for _, size in parts)
    assert [start for start, _ in parts] == np.cumsum([0, *(size for _, size in parts)])[:-1].tolist()


@pytest.mark.parametrize("where", [0, 4])
def test_a_nan_is_not_lost(where):
    x, weight = whole_numbers((7,), (5, 7))
    assert np.isnan(run(x.at[where].set(jnp.nan), weight)).all()
