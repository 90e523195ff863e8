"""The C function that XLA calls for a grouped product, and how it shares the work with XLA's threads.

XLA's foreign function interface is a C one (`xla/ffi/api/c_api.h`, which jaxlib brings along). Offsets below are those
of its structs, which it promises to keep within major version 0.
"""

from typing import no_type_check

from numba import njit

from eqx_moe.compiled import c_function
from eqx_moe.kernels.cpu.gemm import BLOCK, NEAR_ROWS, multiply, multiply_turned
from eqx_moe.kernels.cpu.instructions import (
    call,
    call_task,
    clear,
    fetch_add,
    free,
    int_at,
    malloc,
    on_stack,
    process_word,
    put_int,
    put_word,
    sched_yield,
    word_at,
)

#: What is computed: rows times their matrices, rows times the transposed matrices, or the gradient of the matrices.
PRODUCT, TRANSPOSED, WEIGHT_GRADIENT = 0, 1, 2

#: The version of the interface that this is written for.
_MAJOR, _MINOR = 0, 3

# XLA_FFI_CallFrame: extension, api, ctx, args.args, rets.rets, attrs.attrs. XLA_FFI_Buffer: data, dims.
_EXTENSION, _API, _CONTEXT, _ARGS, _RETS, _ATTRS = 8, 16, 24, 72, 112, 160
_DATA, _DIMS = 24, 40
# XLA_FFI_Api: Error_Destroy, ThreadPool_Schedule, ThreadPool_NumThreads.
_DESTROY, _SCHEDULE, _NUM_THREADS = 64, 136, 144

# A job, in words: threads that still know of it; the next item, items done, all items; then what `_item` reads.
_HOLDERS, _NEXT, _DONE, _ITEMS, _KIND, _X, _OTHER, _SIZES, _OUT, _ROWS, _OUTER, _INNER, _SHARE = range(0, 104, 8)
_JOB_BYTES = 104

# Rows that an item takes at most. Features are shared out in multiples of so many, so that packing stays little.
_ROW_BLOCK, _FEATURES = 512, 96
assert BLOCK % _FEATURES == NEAR_ROWS % _FEATURES == 0  # rounded up, they still fit

# Multiplications below which another thread is not worth waking.
_SMALL = 1 << 18

# The address of `help_out`.
_helper_cell, _helper = process_word("eqx_moe_grouped_matmul_helper")


@no_type_check
@njit(nogil=True)
def _dim(buffer, axis):
    return word_at(word_at(buffer + _DIMS) + 8 * axis)


@no_type_check
@njit(nogil=True)
def _cut(job, size):
    """How the work of a group of so many rows is cut: blocks of rows, blocks of features, features of such a block."""
    kind = word_at(job + _KIND)
    features = word_at(job + _INNER) if kind == TRANSPOSED else word_at(job + _OUTER)
    share = word_at(job + _SHARE)
    row_blocks = 1 if kind == WEIGHT_GRADIENT else -(-size // _ROW_BLOCK)
    most = NEAR_ROWS if kind == WEIGHT_GRADIENT else BLOCK
    blocks = max(1, min(-(-size // share), features // _FEATURES), -(-features // most))
    block = -(-features // (blocks * _FEATURES)) * _FEATURES
    return row_blocks, -(-features // block), block


@no_type_check
@njit(nogil=True)
def _size(job, group, start):
    """Rows of a group that starts at a row; never past the last row, whatever the sizes say."""
    size = int_at(word_at(job + _SIZES) + 4 * group)
    return max(0, min(size, word_at(job + _ROWS) - start))


@no_type_check
@njit(nogil=True)
def _item(job, group, start, size, row_block, block, features):
    """One block of one group."""
    kind = word_at(job + _KIND)
    x, other, out = word_at(job + _X), word_at(job + _OTHER), word_at(job + _OUT)
    outer, inner = word_at(job + _OUTER), word_at(job + _INNER)
    first = block * features
    if kind == WEIGHT_GRADIENT:
        some = min(features, outer - first)
        to = out + 4 * (group * outer + first) * inner
        if size == 0:
            clear(to, 4 * some * inner)
        else:
            dy = other + 4 * (start * outer + first)
            multiply(dy, 4, 4 * outer, some, x + 4 * start * inner, 4 * inner, inner, size, to, 4 * inner)
        return
    start += row_block * _ROW_BLOCK
    rows = min(_ROW_BLOCK, size - row_block * _ROW_BLOCK)
    weight = other + 4 * group * outer * inner
    if kind == PRODUCT:
        some = min(features, outer - first)
        weight += 4 * first * inner
        to = out + 4 * (start * outer + first)
        multiply_turned(weight, 4 * inner, some, x + 4 * start * inner, 4 * inner, rows, inner, to, 4 * outer)
    else:
        some = min(features, inner - first)
        to = out + 4 * (start * inner + first)
        multiply(x + 4 * start * outer, 4 * outer, 4, rows, weight + 4 * first, 4 * inner, some, outer, to, 4 * inner)


@no_type_check
@njit(nogil=True)
def _work(job):
    """Takes items until none is left.

    The arrays are there as long as an item is not done, so they are looked at only with one in hand.
    """
    items = word_at(job + _ITEMS)
    group, start, size, seen, row_blocks, blocks, features = -1, 0, 0, 0, 0, 1, 0
    while True:
        item = fetch_add(job + _NEXT, 1)
        if item >= items:
            return
        while item >= seen + row_blocks * blocks:
            seen += row_blocks * blocks
            start += size
            group += 1
            size = _size(job, group, start)
            row_blocks, blocks, features = _cut(job, size)
        _item(job, group, start, size, (item - seen) // blocks, (item - seen) % blocks, features)
        fetch_add(job + _DONE, 1)


@no_type_check
@njit(nogil=True)
def _let_go(job):
    if fetch_add(job + _HOLDERS, -1) == 1:
        free(job)


@no_type_check
@c_function("void(int64)")
def help_out(job):
    """What each thread does. One may come when all is done and the arrays are gone; the job stays until then."""
    _work(job)
    _let_go(job)


_helper_cell.value = help_out.address


@no_type_check
@njit(nogil=True)
def _succeeded(frame, error):
    """Whether XLA gave no error; one that it gave is the caller's to free."""
    if error == 0:
        return True
    arguments = on_stack(24)
    put_word(arguments, 24)
    put_word(arguments + 8, 0)
    put_word(arguments + 16, error)
    call_task(word_at(word_at(frame + _API) + _DESTROY), arguments)
    return False


@no_type_check
@njit(nogil=True)
def _threads(frame):
    """How many threads XLA has for a program; 1 if it does not say."""
    count, arguments = on_stack(8), on_stack(32)
    put_word(count, 1)
    put_word(arguments, 32)
    put_word(arguments + 8, 0)
    put_word(arguments + 16, word_at(frame + _CONTEXT))
    put_word(arguments + 24, count)
    if not _succeeded(frame, call(word_at(word_at(frame + _API) + _NUM_THREADS), arguments)):
        return 1
    return max(1, word_at(count))


@no_type_check
@njit(nogil=True)
def _ask_for_help(frame, job):
    arguments = on_stack(40)
    put_word(arguments, 40)
    put_word(arguments + 8, 0)
    put_word(arguments + 16, word_at(frame + _CONTEXT))
    put_word(arguments + 24, _helper())
    put_word(arguments + 32, job)
    if not _succeeded(frame, call(word_at(word_at(frame + _API) + _SCHEDULE), arguments)):
        _let_go(job)


@no_type_check
@c_function("int64(int64)")
def handler(frame):
    """An `XLA_FFI_Handler`: gives null, that is, success. Arrays are float32, sizes int32.

    PRODUCT: x [rows, inner], weight [groups, outer, inner], sizes [groups] -> [rows, outer].
    TRANSPOSED: x [rows, outer], weight, sizes -> [rows, inner].
    WEIGHT_GRADIENT: x [rows, inner], dy [rows, outer], sizes -> [groups, outer, inner].
    """
    extension = word_at(frame + _EXTENSION)
    if extension != 0 and int_at(extension + 8) == 1:
        # XLA_FFI_Extension_Metadata: which version of the interface the function is written for, and no more than that.
        metadata = word_at(extension + 24)
        put_int(metadata + 24, _MAJOR)
        put_int(metadata + 28, _MINOR)
        put_int(metadata + 32, 0)
        return 0
    arguments = word_at(frame + _ARGS)
    x, other, sizes = word_at(arguments), word_at(arguments + 8), word_at(arguments + 16)
    out = word_at(word_at(frame + _RETS))
    kind = word_at(word_at(word_at(word_at(frame + _ATTRS)) + 8))
    matrices = out if kind == WEIGHT_GRADIENT else other
    rows, groups, outer, inner = _dim(x, 0), _dim(matrices, 0), _dim(matrices, 1), _dim(matrices, 2)
    threads = _threads(frame)

    job = malloc(_JOB_BYTES)
    put_word(job + _NEXT, 0)
    put_word(job + _DONE, 0)
    put_word(job + _KIND, kind)
    put_word(job + _X, word_at(x + _DATA))
    put_word(job + _OTHER, word_at(other + _DATA))
    put_word(job + _SIZES, word_at(sizes + _DATA))
    put_word(job + _OUT, word_at(out + _DATA))
    put_word(job + _ROWS, rows)
    put_word(job + _OUTER, outer)
    put_word(job + _INNER, inner)
    # Rows of a group for each block of its features: so that there are a few blocks a thread, if rows lie evenly.
    put_word(job + _SHARE, max(1, rows // (4 * threads)))

    items, start = 0, 0
    for group in range(groups):
        size = _size(job, group, start)
        row_blocks, blocks, _ = _cut(job, size)
        items += row_blocks * blocks
        start += size
    if kind != WEIGHT_GRADIENT:
        width = outer if kind == PRODUCT else inner
        clear(word_at(out + _DATA) + 4 * start * width, 4 * (rows - start) * width)
    put_word(job + _ITEMS, items)

    helpers = max(0, min(threads, items) - 1) if start * outer * inner > _SMALL else 0
    # This thread works as the others do and knows of the job until all are done. It calls the function by its address,
    # so that the products are compiled once and not twice.
    put_word(job + _HOLDERS, 2 + helpers)
    for _ in range(helpers):
        _ask_for_help(frame, job)
    call_task(_helper(), job)
    while word_at(job + _DONE) < items:
        sched_yield()
    _let_go(job)
    return 0
