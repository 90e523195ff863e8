"""The matrix product of one group, in blocks that stay in near caches.

After Goto and van de Geijn 2008 ("Anatomy of high-performance matrix multiplication"), less the packing of A, which is
read where it lies. Forward A is an expert's matrix: it sees a hundred rows or so, and packing it for these would cost
more than it brings.
"""

from typing import no_type_check

from numba import njit

from eqx_moe.kernels.cpu.instructions import (
    LANES,
    NARROW,
    NARROW_ROWS,
    WIDE,
    WIDE_ROWS,
    add1,
    move,
    move1,
    narrow_tile,
    on_stack,
    prefetch,
    transpose8,
    wide_tile,
)

# Panels of B that are packed together, 128 columns of them.
_PANELS = 128 // WIDE

# Of a sum, so much at once: a panel of B takes 16 KiB. With few columns A comes from memory; then its rows are read in
# long runs, a panel takes 64 KiB, and the first so many cache lines of the next rows are asked for.
_DEPTH, _NARROW_DEPTH = 4096 // WIDE, 16384 // NARROW
_LINES_AHEAD = 4

#: Rows whose sums wait in a block of their own, 48 KiB (96 KiB with AVX-512).
BLOCK = 768

_PANEL_BYTES = 4 * max(_DEPTH * WIDE, _NARROW_DEPTH * NARROW)
_PANELS_BYTES = 4 * _PANELS * _DEPTH * WIDE
_SUMS_BYTES = 4 * BLOCK * WIDE
_TILE_BYTES = 4 * WIDE_ROWS * WIDE


@no_type_check
@njit(nogil=True)
def _pack(b, b_row, columns, depth, panels):
    """`panels[n // WIDE, k, n % WIDE] = B[k, n]`; the last panel is filled up with a column again and again."""
    full = columns - columns % WIDE
    for k in range(depth):
        here, there = b + k * b_row, panels + 4 * k * WIDE
        for n in range(0, full, LANES):
            move(here + 4 * n, there + 4 * ((n // WIDE) * depth * WIDE + n % WIDE))
        if full < columns:
            there += 4 * full * depth
            for n in range(WIDE):
                move1(here + 4 * min(full + n, columns - 1), there + 4 * n)


@no_type_check
@njit(nogil=True)
def multiply(a, a_row, a_depth, rows, b, b_row, columns, depth, c, c_row):
    """`C[m, n] = sum over k of A[m, k] B[k, n]`, all of them float32, sums too.

    `A[m, k]` stands at `a + m * a_row + k * a_depth`, `B[k, n]` at `b + k * b_row + 4 * n` and `C[m, n]` at
    `c + m * c_row + 4 * n`.
    """
    panels, tile = on_stack(_PANELS_BYTES), on_stack(_TILE_BYTES)
    for n in range(0, columns, _PANELS * WIDE):
        used = min(_PANELS * WIDE, columns - n)
        for k in range(0, depth, _DEPTH):
            deep = min(_DEPTH, depth - k)
            _pack(b + k * b_row + 4 * n, b_row, used, deep, panels)
            for m in range(0, rows, WIDE_ROWS):
                here, there = a + m * a_row + k * a_depth, c + m * c_row + 4 * n
                last = min(WIDE_ROWS, rows - m) - 1
                for p in range(0, used - WIDE + 1, WIDE):
                    wide_tile(here, a_row, a_depth, panels + 4 * p * deep, there + 4 * p, c_row, last, deep, k)
                p = used - used % WIDE
                if p < used:
                    wide_tile(here, a_row, a_depth, panels + 4 * p * deep, tile, 4 * WIDE, last, deep, 0)
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
    """`C[n, m] = sum over k of A[m, k] B[n, k]`, all of them float32, sums too.

    `A[m, k]` stands at `a + m * a_row + 4 * k`, `B[n, k]` at `b + n * b_row + 4 * k` and `C[n, m]` at
    `c + n * c_row + 4 * m`. A is read where it lies, once for every `WIDE` rows of B.
    """
    panel, sums = on_stack(_PANEL_BYTES), on_stack(_SUMS_BYTES)
    for n in range(0, columns, WIDE):
        used = min(WIDE, columns - n)
        width = NARROW if used <= NARROW else WIDE
        for m in range(0, rows, BLOCK):
            some = min(BLOCK, rows - m)
            step = _DEPTH if width == WIDE else _NARROW_DEPTH
            for k in range(0, depth, step):
                deep = min(step, depth - k)
                _pack_turned(b + n * b_row + 4 * k, b_row, used, deep, width, panel)
                here = a + m * a_row + 4 * k
                if width == WIDE:
                    for s in range(0, some, WIDE_ROWS):
                        last = min(WIDE_ROWS, some - s) - 1
                        wide_tile(here + s * a_row, a_row, 4, panel, sums + 4 * s * width, 4 * width, last, deep, k)
                else:
                    for s in range(0, some, NARROW_ROWS):
                        last = min(NARROW_ROWS, some - s) - 1
                        for i in range(NARROW_ROWS):
                            ahead = here + (s + NARROW_ROWS + i) * a_row
                            for line in range(_LINES_AHEAD):
                                prefetch(ahead + 64 * line)
                        narrow_tile(here + s * a_row, a_row, 4, panel, sums + 4 * s * width, 4 * width, last, deep, k)
            _write_turned(sums, some, used, width, c + n * c_row + 4 * m, c_row)
