"""Rows sorted by group, each multiplied with the matrix of its group.

One custom VJP for the three contractions: the product, the gradient of its rows (the same with the matrices transposed)
and the gradient of the matrices. Who computes them depends on the platform:

- CPU, float32: kernels of our own (`eqx_moe.kernels.cpu`), each group's product from where its operands lie.
- TPU: `jax.lax.ragged_dot`, whose lowering is native there. On CPU it multiplies every row with every matrix, and on
  CUDA it does so too unless an XLA flag is set (jax 0.10 to 0.12).
- Elsewhere, and on CPU in other dtypes: a batched product over all groups, with as many slots for a group as a mean
  group has rows and a little more, and then a loop over what did not fit, a window of rows at a time. So no matrix is
  copied but for the overflow, the work grows with the rows and not with the groups, and a group that takes all rows
  costs about as much as groups of equal size. Few rows go one at a time, which reads no matrix but theirs.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from eqx_moe.kernels.cpu import calls as cpu
from eqx_moe.kernels.linear import row_in_parts

# Rows that a visit of the overflow takes; and where fewer are left.
_WINDOW, _FEW_LEFT = 128, 16

# Up to so many rows, and up to so many for each group, go one at a time. Measured on 2 x86-64 cores, jax 0.10.2: a row
# costs a third of a batched product with 16 slots of the same matrix.
_FEW, _FEW_EACH = 64, 4

# Rows of the loop over few rows that are written out; a thunk of XLA's CPU loops costs as much as a small row.
_UNROLLED = 8


def grouped_matmul_oracle(
    x: Float[Array, "rows in"], weight: Float[Array, "groups out in"], sizes: Int[Array, " groups"]
) -> Float[Array, "rows out"]:
    """What `grouped_matmul` computes, every row times every matrix. Slow; the definition to test against."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]
    mine = (row >= ends - sizes) & (row < ends)
    return jnp.einsum("ri,goi,rg->ro", x, weight, mine.astype(x.dtype))


def grouped_matmul(
    x: Float[Array, "rows in"],
    weight: Float[Array, "groups out in"],
    sizes: Int[Array, " groups"],
    expected: int | None = None,
) -> Float[Array, "rows out"]:
    """`y[r] = weight[g] @ x[r]`, g being the group that row r lies in.

    The first `sizes[0]` rows belong to group 0, the next `sizes[1]` to group 1, and so on; rows past `sizes.sum()`
    give zero and receive no gradient. Products are accumulated in float32; the result has the dtype of `x`.
    Reverse-mode differentiable.

    `expected` is about how many rows lie in groups, all of them by default: where most do not, it saves their work. It
    changes no result.
    """
    return _grouped(x, weight, sizes, x.shape[0] if expected is None else expected)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x, weight, sizes, expected):
    return _product(x, weight, sizes, expected=expected, transpose=False, kernel=_has_kernel(x, weight))


def _grouped_fwd(x, weight, sizes, expected):
    return _grouped(x, weight, sizes, expected), (x, weight, sizes)


def _grouped_bwd(expected, residuals, dy):
    x, weight, sizes = residuals
    kernel = _has_kernel(x, weight)
    dx = _product(dy, weight, sizes, expected=expected, transpose=True, kernel=kernel).astype(x.dtype)
    dweight = _weight_gradient(x, dy, sizes, expected=expected, kernel=kernel).astype(weight.dtype)
    return dx, dweight, np.zeros(sizes.shape, jax.dtypes.float0)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _has_kernel(x: Array, weight: Array) -> bool:
    """Whether the CPU has kernels for them.

    Tracing loads these, and compiles them when they are first used on a machine; not where JAX runs on something else.
    """
    float32 = x.dtype == weight.dtype == jnp.float32
    return float32 and x.size > 0 and weight.size > 0 and jax.default_backend() == "cpu" and cpu.available()


@functools.partial(jax.jit, static_argnames=("expected", "transpose", "kernel"))
def _product(x, weight, sizes, *, expected: int, transpose: bool, kernel: bool):
    """Rows times their group's matrix, or (for the gradient of rows) times its transpose."""
    few = not transpose and x.shape[0] <= min(_FEW, _FEW_EACH * weight.shape[0])
    portable = _row_by_row if few else functools.partial(_batched, expected=expected, transpose=transpose)
    ways: dict[str, Callable[..., Array]] = {"tpu": functools.partial(_ragged_dot, transpose=transpose)}
    if kernel:
        ways["cpu"] = cpu.transposed_product if transpose else cpu.product
    return lax.platform_dependent(x, weight, sizes, default=portable, **ways)


def _multiply(rows, matrix, transpose: bool):
    """[..., rows, in] x [..., out, in] -> [..., rows, out], or with the transposed matrix; accumulated in float32."""
    batch = tuple(range(matrix.ndim - 2))
    contract = matrix.ndim - (2 if transpose else 1)
    numbers = (((rows.ndim - 1,), (contract,)), (batch, batch))
    return lax.dot_general(rows, matrix, numbers, preferred_element_type=jnp.float32).astype(rows.dtype)


def _ragged_dot(x, weight, sizes, *, transpose: bool):
    """XLA's own. Its rows past the groups are zero or not written, as the lowering has it."""
    y = _ragged(x, weight if transpose else weight.swapaxes(1, 2), sizes)
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), y, 0).astype(x.dtype)


# One after the other under `vmap`, where it takes only arguments that are all batched.
@jax.custom_batching.sequential_vmap
def _ragged(x, weight, sizes):
    return lax.ragged_dot(x, weight, sizes, preferred_element_type=jnp.float32)


def _one_row(x, weight, row, group):
    """The product of one row and the matrix of its group, [1, out]."""

    def columns(start, size):
        return lax.dynamic_slice(weight, (group, 0, start), (1, weight.shape[1], size))[0]

    return row_in_parts(lax.dynamic_slice_in_dim(x, row, 1), columns)


def _row_by_row(x, weight, sizes):
    """One row at a time: XLA's CPU back end then multiplies from where the matrix lies, at the speed of memory.

    Rows of one group follow each other, so that a matrix is read from memory once and from the cache after that.
    """
    rows, out_size = x.shape[0], weight.shape[1]
    ends = jnp.cumsum(sizes)
    # Rows past the groups repeat the last row's matrix, which is at hand.
    row = jnp.minimum(jnp.arange(rows), jnp.maximum(ends[-1] - 1, 0))
    group = jnp.sum(row[:, None] >= ends, axis=1)

    if rows <= _UNROLLED:
        y = jnp.concatenate([_one_row(x, weight, r, group[r]) for r in range(rows)])
    else:

        def body(i, out):
            start = jnp.minimum(i * _UNROLLED, rows - _UNROLLED)
            block = jnp.concatenate([_one_row(x, weight, start + r, group[start + r]) for r in range(_UNROLLED)])
            return lax.dynamic_update_slice_in_dim(out, block, start, axis=0)

        y = lax.fori_loop(0, -(-rows // _UNROLLED), body, jnp.zeros_like(x, shape=(rows, out_size)))
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], y, 0)


def _slots(rows: int, groups: int, expected: int) -> int:
    """Slots a group: the mean and about a standard deviation of groups that are filled at random, a multiple of 8."""
    mean = expected / groups
    return min(rows, -(-math.ceil(mean + math.sqrt(mean)) // 8) * 8)


class _Layout:
    """Where the rows of each group stand: in its slots, or past them.

    If the slots would stay mostly empty while most rows lie elsewhere, they are not used at all.
    """

    def __init__(self, sizes: Int[Array, " groups"], rows: int, expected: int):
        self.rows, groups = rows, sizes.shape[0]
        self.slots = _slots(rows, groups, expected)
        self.window = min(_WINDOW, rows)
        self.few = min(_FEW_LEFT, rows)
        self.ends = jnp.cumsum(sizes)
        self.starts = self.ends - sizes
        over = jnp.sum(jnp.maximum(sizes - self.slots, 0))
        self.use_slots = 2 * over <= self.ends[-1]
        self.held = jnp.where(self.use_slots, jnp.minimum(sizes, self.slots), 0)
        #: [groups, slots]: the row of each slot, any row where the slot is empty.
        self.row_of_slot = jnp.minimum(self.starts[:, None] + jnp.arange(self.slots), rows - 1)

    def slot_of_row(self):
        """[rows]: the slot of each row, counted through all groups; any slot for a row that has none."""
        row = jnp.arange(self.rows)
        group = jnp.minimum(jnp.sum(row[:, None] >= self.ends, axis=1), self.ends.shape[0] - 1)
        return group * self.slots + jnp.minimum(row - self.starts[group], self.slots - 1)

    def visit_rest(self, body, carry):
        """`carry = body(carry, group, few, window)` for every window of rows without a slot.

        `window(rows)` says where the window stands if it takes so many rows: the first of them, and which [rows, 1] are
        the group's. `few` says that not more than `_FEW_LEFT` are. A conditional in the body should not hold the carry:
        it would be copied.
        """
        first = self.starts + self.held
        windows = -(-(self.ends - first) // self.window)
        last = jnp.cumsum(windows)

        def visit(i, carry):
            group = jnp.sum(i >= last)
            start = first[group] + (i - last[group] + windows[group]) * self.window

            def window(rows: int):
                at = jnp.minimum(start, self.rows - rows)
                row = at + jnp.arange(rows)[:, None]
                return at, (row >= start) & (row < self.ends[group])

            return body(carry, group, self.ends[group] - start <= _FEW_LEFT, window)

        return lax.fori_loop(0, last[-1], visit, carry)


def _batched(x, weight, sizes, *, expected: int, transpose: bool):
    groups, out_size = weight.shape[0], weight.shape[2 if transpose else 1]
    layout = _Layout(sizes, x.shape[0], expected)
    slotted = jnp.take(x, layout.row_of_slot, axis=0, mode="clip")
    y = lax.cond(
        layout.use_slots,
        lambda slotted: _multiply(slotted, weight, transpose),
        lambda slotted: jnp.zeros_like(x, shape=(groups, layout.slots, out_size)),
        slotted,
    )
    y = jnp.take(y.reshape(-1, out_size), layout.slot_of_row(), axis=0, mode="clip")
    y = jnp.where(jnp.arange(x.shape[0])[:, None] < layout.ends[-1], y, 0)

    def visit(y, group, few, window):
        first, mine = window(layout.window)
        empty = jnp.zeros_like(x, shape=(layout.window, out_size))

        def all_rows(rows):
            at, _ = window(rows)
            matrix = lax.dynamic_index_in_dim(weight, group, keepdims=False)
            found = _multiply(lax.dynamic_slice_in_dim(x, at, rows), matrix, transpose)
            return lax.dynamic_update_slice_in_dim(empty, found, at - first, axis=0)

        def row_by_row():
            at, mine = window(layout.few)

            def put(r, found):
                return lax.dynamic_update_slice_in_dim(
                    found, _one_row(x, weight, at + r, group), at - first + r, axis=0
                )

            start = jnp.argmax(mine[:, 0])
            return lax.fori_loop(start, start + jnp.sum(mine), put, empty)

        found = lax.cond(
            few,
            # One row needs no copy of its matrix, except where the matrix is transposed.
            functools.partial(all_rows, layout.few) if transpose else row_by_row,
            functools.partial(all_rows, layout.window),
        )
        before = lax.dynamic_slice_in_dim(y, first, layout.window)
        return lax.dynamic_update_slice_in_dim(y, jnp.where(mine, found, before), first, axis=0)

    return layout.visit_rest(visit, y)


@functools.partial(jax.jit, static_argnames=("expected", "kernel"))
def _weight_gradient(x, dy, sizes, *, expected: int, kernel: bool):
    """For each group, the sum over its rows of the outer product of `dy` and `x`, in float32."""
    portable = functools.partial(_batched_gradient, expected=expected)
    ways = {"cpu": cpu.weight_gradient} if kernel else {}
    return lax.platform_dependent(x, dy, sizes, default=portable, **ways)


def _batched_gradient(x, dy, sizes, *, expected: int):
    layout = _Layout(sizes, x.shape[0], expected)
    filled = jnp.arange(layout.slots) < layout.held[:, None]

    def outer(take, mine):
        # Both sides are masked: a row of another group may hold an infinity, and 0 * inf is no zero.
        left, right = (jnp.where(mine, take(each), 0) for each in (dy, x))
        return jnp.einsum("...ro,...ri->...oi", left, right, preferred_element_type=jnp.float32)

    total = lax.cond(
        layout.use_slots,
        lambda: outer(lambda each: jnp.take(each, layout.row_of_slot, axis=0, mode="clip"), filled[..., None]),
        lambda: jnp.zeros_like(x, shape=(sizes.shape[0], dy.shape[1], x.shape[1]), dtype=jnp.float32),
    )

    def visit(total, group, few, window):
        def product(rows):
            at, mine = window(rows)
            return outer(lambda each: lax.dynamic_slice_in_dim(each, at, rows), mine)

        found = lax.cond(few, lambda: product(layout.few), lambda: product(layout.window))
        before = lax.dynamic_index_in_dim(total, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, before + found, group, axis=0)

    return layout.visit_rest(visit, total)
