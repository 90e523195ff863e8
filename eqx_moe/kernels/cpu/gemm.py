"""The matrix product of one group, in blocks that stay in near caches.

After Goto and van de Geijn 2008 ("Anatomy of high-performance matrix multiplication"), less the packing of A, which is
read where it lies. Forward A is an expert's matrix: it sees a hundred rows or so, and packing it for these would cost
more than it brings. For gradients its columns are copied to lie near each other. Up to four rows are multiplied by dot
products, with which a matrix is read about as fast as memory gives it.
"""

from typing import no_type_check

from numba import njit

from eqx_moe.kernels.cpu.instructions import (
    DOT_ROWS,
    DOTS_ROWS,
    FEW,
    LANES,
    NARROW,
    TILE_ROWS,
    WIDE,
    add1,
    dot,
    dots,
    move,
    move1,
    narrow_tile,
    near_tile,
    on_stack,
    prefetch,
    transpose8,
    wide_tile,
)

# Panels of B that are packed together, 128 columns of them.
_PANELS = 128 // WIDE

# Of a sum, so much at once: a panel of B takes 16 KiB.
_DEPTH = 4096 // WIDE

# Where rows of A come from memory, they are read in runs of 1 KiB, and stay near for all panels of B.
_DEEP, _COLUMNS = 256, 3 * WIDE

# How far ahead of its copying a row is asked for.
_ROWS_AHEAD = 16

#: Rows of A whose sums wait in a block of their own; and those that are copied to lie near.
BLOCK, NEAR_ROWS = 384, 96

# All of these together have to fit a thread's stack: 512 KiB on macOS.
_PANELS_BYTES = 4 * _PANELS * _DEPTH * WIDE
_NEAR_BYTES = (4 * NEAR_ROWS + 64) * _DEPTH
_TURNED_BYTES = 4 * _COLUMNS * _DEEP
_SUMS_BYTES = 4 * BLOCK * _COLUMNS
_TILE_BYTES = 4 * TILE_ROWS * WIDE


@no_type_check
@njit(nogil=True)
def _pack(b, b_row, columns, depth, panels):
    """`panels[n // WIDE, k, n % WIDE] = B[k, n]`; the last panel is filled up with a column again and again."""
    full = columns - columns % WIDE
    for k in range(depth):
        here, there = b + k * b_row, panels + 4 * k * WIDE
        for n in range(0, full, LANES):
            prefetch(here + _ROWS_AHEAD * b_row + 4 * n)
            move(here + 4 * n, there + 4 * ((n // WIDE) * depth * WIDE + n % WIDE))
        if full < columns:
            there += 4 * full * depth
            for n in range(WIDE):
                move1(here + 4 * min(full + n, columns - 1), there + 4 * n)


@no_type_check
@njit(nogil=True)
def _gather(a, a_depth, rows, depth, near):
    """`near[k, m] = A[m, k]`, whose rows are 4 bytes from each other; gives the distance from k to k + 1.

    That is an odd number of cache lines: at a multiple of many, all would compete for a few places of the cache.
    """
    stride = 128 * (-(-rows // 32)) + 64
    full = rows - rows % LANES
    for k in range(depth):
        here, there = a + k * a_depth, near + k * stride
        for m in range(0, full, LANES):
            prefetch(here + _ROWS_AHEAD * a_depth + 4 * m)
            move(here + 4 * m, there + 4 * m)
        for m in range(full, rows):
            move1(here + 4 * m, there + 4 * m)
    return stride


@no_type_check
@njit(nogil=True)
def multiply(a, a_row, a_depth, rows, b, b_row, columns, depth, c, c_row):
    """`C[m, n] = sum over k of A[m, k] B[k, n]`, all of them float32, sums too.

    `A[m, k]` stands at `a + m * a_row + k * a_depth`, `B[k, n]` at `b + k * b_row + 4 * n` and `C[m, n]` at
    `c + m * c_row + 4 * n`. Where rows of A lie nearer to each other than columns, `a_row` is 4, and there are at most
    `NEAR_ROWS`.
    """
    panels, tile, near = on_stack(_PANELS_BYTES), on_stack(_TILE_BYTES), on_stack(_NEAR_BYTES)
    for k in range(0, depth, _DEPTH):
        deep = min(_DEPTH, depth - k)
        left, left_depth = a + k * a_depth, a_depth
        if a_row < a_depth:
            left_depth = _gather(left, a_depth, rows, deep, near)
            left = near
        for n in range(0, columns, _PANELS * WIDE):
            used = min(_PANELS * WIDE, columns - n)
            _pack(b + k * b_row + 4 * n, b_row, used, deep, panels)
            for m in range(0, rows, TILE_ROWS):
                here, there = left + m * a_row, c + m * c_row + 4 * n
                last = min(TILE_ROWS, rows - m) - 1
                for p in range(0, used - WIDE + 1, WIDE):
                    near_tile(here, a_row, left_depth, panels + 4 * p * deep, there + 4 * p, c_row, last, deep, k)
                p = used - used % WIDE
                if p < used:
                    near_tile(here, a_row, left_depth, panels + 4 * p * deep, tile, 4 * WIDE, last, deep, 0)
                    for i in range(last + 1):
                        for j in range(used - p):
                            if k == 0:
                                move1(tile + 4 * (i * WIDE + j), there + i * c_row + 4 * (p + j))
                            else:
                                add1(tile + 4 * (i * WIDE + j), there + i * c_row + 4 * (p + j))


@no_type_check
@njit(nogil=True)
def _pack_turned(b, b_row, columns, depth, width, panel):
    """`panel[k, n] = B[n, k]`; columns past `columns` repeat the last."""
    eights = depth - depth % 8
    for n in range(0, width, 8):
        base = min(n, columns - 1)
        here = b + base * b_row
        last = max(min(8, columns - n), 1) - 1
        for k in range(0, eights, 8):
            transpose8(here + 4 * k, b_row, last, panel + 4 * (k * width + n), 4 * width, 7)
        for i in range(8):
            for k in range(eights, depth):
                move1(here + min(i, last) * b_row + 4 * k, panel + 4 * (k * width + n + i))


@no_type_check
@njit(nogil=True)
def _write_turned(sums, rows, columns, width, c, c_row):
    """`C[n, m] = sums[m, n]`."""
    eights = rows - rows % 8
    for n in range(0, columns, 8):
        last = min(8, columns - n) - 1
        for m in range(0, eights, 8):
            transpose8(sums + 4 * (m * width + n), 4 * width, 7, c + n * c_row + 4 * m, c_row, last)
        for i in range(last + 1):
            for m in range(eights, rows):
                move1(sums + 4 * (m * width + n + i), c + (n + i) * c_row + 4 * m)


@no_type_check
@njit(nogil=True)
def multiply_turned(a, a_row, rows, b, b_row, columns, depth, c, c_row):
    """`C[n, m] = sum over k of A[m, k] B[n, k]`, all of them float32, sums too; at most `BLOCK` rows.

    `A[m, k]` stands at `a + m * a_row + 4 * k`, `B[n, k]` at `b + n * b_row + 4 * k` and `C[n, m]` at
    `c + n * c_row + 4 * m`. A is read where it lies, once for every `_COLUMNS` rows of B.
    """
    if columns == 1:
        for m in range(0, rows, DOT_ROWS):
            dot(a + m * a_row, a_row, min(DOT_ROWS, rows - m) - 1, b, b_row, 0, depth, c + 4 * m, c_row)
        return
    if columns <= FEW:
        for m in range(0, rows, DOTS_ROWS):
            dots(a + m * a_row, a_row, min(DOTS_ROWS, rows - m) - 1, b, b_row, columns - 1, depth, c + 4 * m, c_row)
        return
    panels, sums = on_stack(_TURNED_BYTES), on_stack(_SUMS_BYTES)
    for n in range(0, columns, _COLUMNS):
        used = min(_COLUMNS, columns - n)
        wide = used - used % WIDE
        if used - wide > NARROW:
            wide = used
        for k in range(0, depth, _DEEP):
            deep = min(_DEEP, depth - k)
            here = b + n * b_row + 4 * k
            for p in range(0, wide, WIDE):
                _pack_turned(here + p * b_row, b_row, min(WIDE, used - p), deep, WIDE, panels + 4 * p * deep)
            if wide < used:
                _pack_turned(here + wide * b_row, b_row, used - wide, deep, NARROW, panels + 4 * wide * deep)
            for m in range(0, rows, TILE_ROWS):
                last = min(TILE_ROWS, rows - m) - 1
                here = a + m * a_row + 4 * k
                for p in range(0, wide, WIDE):
                    there = sums + 4 * (p * BLOCK + m * WIDE)
                    wide_tile(here, a_row, 4, panels + 4 * p * deep, there, 4 * WIDE, last, deep, k)
                if wide < used:
                    there = sums + 4 * (wide * BLOCK + m * NARROW)
                    narrow_tile(here, a_row, 4, panels + 4 * wide * deep, there, 4 * NARROW, last, deep, k)
        for p in range(0, wide, WIDE):
            _write_turned(sums + 4 * p * BLOCK, rows, min(WIDE, used - p), WIDE, c + (n + p) * c_row, c_row)
        if wide < used:
            _write_turned(sums + 4 * wide * BLOCK, rows, used - wide, NARROW, c + (n + wide) * c_row, c_row)
