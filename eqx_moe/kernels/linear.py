"""`x @ weight.T`, at the speed of memory when there is one row."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# XLA's CPU back end multiplies one row from where the matrix lies only if the row is smaller than this; else it first
# writes the matrix down transposed. Measured on jax 0.10.2, one row of 4096 float32: 2.3 GB/s whole, 17 GB/s in parts.
_ROW_BYTES = 1 << 14

# From jax 0.11 on one row runs on one core (6 GB/s), and two rows do not (15 to 25 GB/s).
_ONE_ROW_IS_SLOW = jax.__version_info__ >= (0, 11)


def linear(
    x: Float[Array, "*rows in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*rows out"]:
    """`x @ weight.T`, where `weight` is first cast to the dtype of `x`; accumulated in float32.

    The result has the dtype of `x`, or `dtype` without having been rounded to that of `x`.
    """
    weight = weight.astype(x.dtype)
    dtype = x.dtype if dtype is None else dtype

    def whole(x, weight):
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)

    if x.size != x.shape[-1] or x.dtype != jnp.float32:
        return whole(x, weight)
    y = lax.platform_dependent(x.reshape(1, -1), weight, cpu=_one_row, default=whole)
    return y.reshape(*x.shape[:-1], -1)


def _one_row(x: Float[Array, "1 in"], weight: Float[Array, "out in"]) -> Float[Array, "1 out"]:
    if _ONE_ROW_IS_SLOW:
        return (jnp.concatenate([x, x]) @ weight.T)[:1]
    return row_in_parts(x, lambda start, size: lax.slice_in_dim(weight, start, start + size, axis=1))


def _written_down(row: Float[Array, "1 in"]) -> Float[Array, "1 in"]:
    """The same row, computed before the product that reads it.

    XLA's CPU back end would fuse a norm, say, into the product and compute it anew for every entry of the result, which
    costs a third of the speed. It fuses nothing into a conditional; an optimization barrier does not help. A row whose
    first entry is NaN has no other product. Elsewhere a conditional would wait for the host.
    """

    def apart(row):
        return lax.cond(jnp.isnan(row[0, 0]), lambda row: jnp.full_like(row, jnp.nan), lambda row: row, row)

    return lax.platform_dependent(row, cpu=apart, default=lambda row: row)


def row_in_parts(x: Float[Array, "1 in"], columns) -> Float[Array, "1 out"]:
    """`x @ weight.T` a part of the contraction at a time; `columns(start, size)` are those columns of the weight.

    Each part is a product that XLA's CPU back end can run from where the columns lie, also within a stack of matrices.
    Parts are added in float32.
    """
    x = _written_down(x)
    size = (_ROW_BYTES - 1) // x.dtype.itemsize // 64 * 64
    total = None
    for start in range(0, x.shape[1], size):
        part = lax.slice_in_dim(x, start, min(start + size, x.shape[1]), axis=1)
        # The barrier keeps XLA from making one product of them again.
        product = jnp.matmul(part, columns(start, part.shape[1]).T, preferred_element_type=jnp.float32)
        product = lax.optimization_barrier(product)
        total = product if total is None else total + product
    assert total is not None
    return total.astype(x.dtype)
