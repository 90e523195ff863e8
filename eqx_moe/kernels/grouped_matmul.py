"""Rows sorted by group, each multiplied with the matrix of its group.

`grouped_matmul` visits the pairs (tile of rows, group) that really meet, so that the work grows with the rows and not
with the number of groups. It has one custom VJP for its three contractions, because differentiating through the loop
would keep a copy of every matrix that the loop visited.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Rows of one tile at most: enough to use the matrix units, few enough that partly filled tiles cost little.
_MAX_TILE = 256


def grouped_matmul_oracle(
    x: Float[Array, "rows in"], weight: Float[Array, "groups out in"], sizes: Int[Array, " groups"]
) -> Float[Array, "rows out"]:
    """What `grouped_matmul` computes, every row times every matrix. Slow; the definition to test against."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]
    mine = (row >= ends - sizes) & (row < ends)
    return jnp.einsum("ri,goi,rg->ro", x, weight, mine.astype(x.dtype))


def grouped_matmul(
    x: Float[Array, "rows in"], weight: Float[Array, "groups out in"], sizes: Int[Array, " groups"]
) -> Float[Array, "rows out"]:
    """`y[r] = weight[g] @ x[r]`, g being the group that row r lies in.

    The first `sizes[0]` rows belong to group 0, the next `sizes[1]` to group 1, and so on; rows past `sizes.sum()`
    give zero and receive no gradient. Products are accumulated in float32; the result has the dtype of `x`.
    Reverse-mode differentiable.
    """
    return _grouped(x, weight, sizes)


@jax.custom_vjp
def _grouped(x, weight, sizes):
    return _forward(x, weight, sizes, transpose=False)


def _grouped_fwd(x, weight, sizes):
    return _grouped(x, weight, sizes), (x, weight, sizes)


def _grouped_bwd(residuals, dy):
    x, weight, sizes = residuals
    dx = _forward(dy, weight, sizes, transpose=True).astype(x.dtype)
    dweight = _weight_gradient(x, dy, sizes).astype(weight.dtype)
    return dx, dweight, np.zeros(sizes.shape, jax.dtypes.float0)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _tile_rows(rows: int, groups: int) -> int:
    """A power of two, about a quarter of the mean group: few tiles are then shared by two groups."""
    mean = max(1, rows // (4 * groups))
    return min(_MAX_TILE, 1 << (mean.bit_length() - 1))


def _visits(sizes: Int[Array, " groups"], rows: int, tile: int):
    """The pairs (tile, group) that meet, in order and padded to their largest possible number; and how many."""
    groups = sizes.shape[0]
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    tiles_of = jnp.where(sizes > 0, (ends - 1) // tile - starts // tile + 1, 0)
    last = jnp.cumsum(tiles_of)
    visit = jnp.arange(-(-rows // tile) + groups)
    group = jnp.minimum(jnp.searchsorted(last, visit, side="right"), groups - 1)
    position = visit - (last - tiles_of)[group]
    return (starts // tile)[group] + position, group, last[-1], starts, ends


def _rows_of(tile_index, tile: int, start, end) -> Bool[Array, "tile 1"]:
    row = tile_index * tile + jnp.arange(tile)[:, None]
    return (row >= start) & (row < end)


def _pad_rows(x, tile: int):
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


@functools.partial(jax.jit, static_argnames="transpose")
def _forward(x, weight, sizes, *, transpose: bool):
    """Rows times their group's matrix, or (for the input gradient) times its transpose."""
    rows = x.shape[0]
    tile = _tile_rows(rows, weight.shape[0])
    tile_of, group_of, visits, starts, ends = _visits(sizes, rows, tile)
    x = _pad_rows(x, tile)
    contract = 0 if transpose else 1
    # `zeros_like`: inside `shard_map`, zeros must differ by device as what they are replaced with does.
    shape = (x.shape[0], weight.shape[2 if transpose else 1])
    out = jnp.zeros_like(x, shape=shape, dtype=jnp.result_type(x, weight))

    def visit(i, out):
        at, group = tile_of[i], group_of[i]
        block = lax.dynamic_slice_in_dim(x, at * tile, tile)
        matrix = lax.dynamic_index_in_dim(weight, group, keepdims=False)
        product = lax.dot_general(
            block, matrix, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32
        ).astype(out.dtype)
        before = lax.dynamic_slice_in_dim(out, at * tile, tile)
        mine = _rows_of(at, tile, starts[group], ends[group])
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, product, before), at * tile, axis=0)

    return lax.fori_loop(0, visits, visit, out)[:rows].astype(x.dtype)


@jax.jit
def _weight_gradient(x, dy, sizes):
    """For each group, the sum over its rows of the outer product of `dy` and `x`, in float32."""
    rows, groups = x.shape[0], sizes.shape[0]
    tile = _tile_rows(rows, groups)
    tile_of, group_of, visits, starts, ends = _visits(sizes, rows, tile)
    x, dy = _pad_rows(x, tile), _pad_rows(dy, tile)

    def visit(i, total):
        at, group = tile_of[i], group_of[i]
        mine = _rows_of(at, tile, starts[group], ends[group])
        # Both sides are masked: a row of another group may hold an infinity, and 0 * inf is no zero.
        left = jnp.where(mine, lax.dynamic_slice_in_dim(dy, at * tile, tile), 0)
        right = jnp.where(mine, lax.dynamic_slice_in_dim(x, at * tile, tile), 0)
        product = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        before = lax.dynamic_index_in_dim(total, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, before + product, group, axis=0)

    total = jnp.zeros_like(x, shape=(groups, dy.shape[1], x.shape[1]), dtype=jnp.float32)
    return lax.fori_loop(0, visits, visit, total)
