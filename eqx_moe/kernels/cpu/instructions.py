"""What Numba does not have and the CPU kernels need: a tile of sums in registers, memory by its address, atomics.

Addresses and strides are whole numbers, in bytes, int64. Nothing is checked.
"""

import ctypes
from typing import no_type_check

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _WORD, _INT, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)


def _lanes() -> int:
    """Floats of a vector register: 16 with AVX-512; else 8, which NEON takes as two halves."""
    return 16 if llvmlite.binding.get_host_cpu_features().get("avx512f", False) else 8


#: Floats of a vector.
LANES = _lanes()

_VECTOR = ir.VectorType(_FLOAT, LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)

#: Columns and rows of a tile. Two fused multiply-adds start in a cycle and each takes four, so there are at least eight
#: sums (six in a narrow tile without AVX-512); sums, a row of B and a value of A have to fit 16 registers, 32 with it.
WIDE, TILE_ROWS = 2 * LANES, 6 if LANES == 8 else 12
NARROW = LANES


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _vector(builder, address, number: int):
    """A pointer to one of the vectors that stand one after another from an address on."""
    return _pointer(builder, builder.add(address, _WORD(4 * LANES * number)), _VECTOR)


def _clamped(builder, last, count: int):
    """`[min(0, last), min(1, last), ...]`, `count` of them."""
    return [builder.select(builder.icmp_signed("<", _WORD(i), last), _WORD(i), last) for i in range(count)]


def _prefetch(builder, address) -> None:
    """Asks for the cache line at an address."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [_pointer(builder, address, _BYTE), _INT(0), _INT(3), _INT(1)])


def _multiply_add(builder):
    """`a * b + c` of vectors, rounded once."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")


def _spread(builder, value):
    """A vector that holds a value in all lanes."""
    unknown = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    everywhere = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(unknown, value, _INT(0)), unknown, everywhere)


def _tile(columns: int, ahead: bool):
    rows = TILE_ROWS

    @no_type_check
    @intrinsic
    def tile(typing_context, a, a_row, a_depth, b, c, c_row, last, depth, add):
        """`C[m, :] = sum over k of A[m, k] B[k, :]`, or `+=` where `add` is not 0. B is dense; `depth` is at least 1.

        Rows of A past `last` are taken to be row `last`, of C too: they write the same once more.
        """

        def codegen(context, builder, signature, arguments):
            a, a_row, a_depth, b, c, c_row, last, depth, add = arguments
            multiply_add = _multiply_add(builder)
            vectors = range(columns // LANES)
            index = _clamped(builder, last, rows)
            starts = [builder.add(a, builder.mul(m, a_row)) for m in index]

            before = builder.block
            loop, done = builder.append_basic_block("depth"), builder.append_basic_block("summed")
            builder.branch(loop)
            builder.position_at_end(loop)
            k, offset, here = (builder.phi(_WORD) for _ in range(3))
            sums = [[builder.phi(_VECTOR) for _ in vectors] for _ in range(rows)]
            if ahead:
                # A cache line of 16 rows in turn, of those after these: they come while this is computed.
                row = builder.mul(builder.add(_WORD(rows), builder.and_(k, _WORD(15))), a_row)
                place = builder.add(builder.add(a, row), builder.mul(builder.lshr(k, _WORD(4)), _WORD(64)))
                _prefetch(builder, place)
            line = [builder.load(_vector(builder, here, v), align=4) for v in vectors]
            totals = []
            for start, row in zip(starts, sums, strict=True):
                value = builder.load(_pointer(builder, builder.add(start, offset), _FLOAT), align=4)
                spread = _spread(builder, value)
                totals.append([builder.call(multiply_add, [spread, line[v], row[v]]) for v in vectors])
            steps = ((k, _WORD(0), _WORD(1)), (offset, _WORD(0), a_depth), (here, b, _WORD(4 * columns)))
            for phi, first, step in steps:
                phi.add_incoming(first, before)
                phi.add_incoming(builder.add(phi, step), loop)
            for row, total in zip(sums, totals, strict=True):
                for phi, value in zip(row, total, strict=True):
                    phi.add_incoming(_ZERO, before)
                    phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", builder.add(k, _WORD(1)), depth), loop, done)

            builder.position_at_end(done)
            rows_of_c = [builder.add(c, builder.mul(m, c_row)) for m in index]
            places = [[_vector(builder, row, v) for v in vectors] for row in rows_of_c]
            with builder.if_else(builder.icmp_signed("!=", add, _WORD(0))) as (then, otherwise):
                with then:
                    # All are read before any is written: the last row may be there more than once.
                    old = [[builder.load(place, align=4) for place in row] for row in places]
                    for m in range(rows):
                        for v in vectors:
                            builder.store(builder.fadd(old[m][v], totals[m][v]), places[m][v], align=4)
                with otherwise:
                    for m in range(rows):
                        for v in vectors:
                            builder.store(totals[m][v], places[m][v], align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile


#: Of the last two, A lies row by row, and the next rows are asked for.
near_tile, wide_tile, narrow_tile = _tile(WIDE, False), _tile(WIDE, True), _tile(NARROW, True)


def _dots(rows: int, columns: int):
    @no_type_check
    @intrinsic
    def dots(typing_context, a, a_row, a_last, b, b_row, b_last, depth, c, c_row):
        """`C[n, m] = sum over k of A[m, k] B[n, k]`, vectors along k; rows past the last are those, as in `tile`."""

        def codegen(context, builder, signature, arguments):
            a, a_row, a_last, b, b_row, b_last, depth, c, c_row = arguments
            multiply_add = _multiply_add(builder)
            kind = ir.FunctionType(_VECTOR, [_VECTOR.as_pointer(), _INT, ir.VectorType(ir.IntType(1), LANES), _VECTOR])
            name = f"llvm.masked.load.v{LANES}f32.p0v{LANES}f32"
            masked_load = cgutils.get_or_insert_function(builder.module, kind, name)
            m, n = _clamped(builder, a_last, rows), _clamped(builder, b_last, columns)
            lines = [builder.add(a, builder.mul(i, a_row)) for i in m]
            others = [builder.add(b, builder.mul(j, b_row)) for j in n]
            full = builder.and_(depth, _WORD(-LANES))

            def added(sums, load):
                left = [load(line) for line in lines]
                result = []
                for j, other in enumerate(others):
                    right = load(other)
                    result.append(
                        [builder.call(multiply_add, [each, right, sums[j][i]]) for i, each in enumerate(left)]
                    )
                return result

            before = builder.block
            head, loop, done = (builder.append_basic_block(name) for name in ("head", "depth", "rest"))
            builder.branch(head)
            builder.position_at_end(head)
            k = builder.phi(_WORD)
            sums = [[builder.phi(_VECTOR) for _ in lines] for _ in others]
            builder.cbranch(builder.icmp_signed("<", k, full), loop, done)
            builder.position_at_end(loop)
            at = builder.mul(k, _WORD(4))
            for line in lines:
                _prefetch(builder, builder.add(line, builder.add(at, builder.mul(a_row, _WORD(rows)))))
            totals = added(sums, lambda line: builder.load(_pointer(builder, builder.add(line, at), _VECTOR), align=4))
            k.add_incoming(_WORD(0), before)
            k.add_incoming(builder.add(k, _WORD(LANES)), loop)
            for old, new in zip(sums, totals, strict=True):
                for phi, value in zip(old, new, strict=True):
                    phi.add_incoming(_ZERO, before)
                    phi.add_incoming(value, loop)
            builder.branch(head)

            builder.position_at_end(done)
            left = builder.trunc(builder.sub(depth, full), _INT)
            lanes = ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES)))
            mask = builder.icmp_signed("<", lanes, _spread(builder, left))
            at = builder.mul(full, _WORD(4))

            def rest(line):
                place = _pointer(builder, builder.add(line, at), _VECTOR)
                return builder.call(masked_load, [place, _INT(4), mask, _ZERO])

            for j, row in enumerate(added(sums, rest)):
                for i, total in enumerate(row):
                    width = LANES
                    while width > 1:
                        width //= 2
                        order = ir.Constant(ir.VectorType(_INT, width), list(range(width)))
                        upper = ir.Constant(ir.VectorType(_INT, width), list(range(width, 2 * width)))
                        low, high = (builder.shuffle_vector(total, total, each) for each in (order, upper))
                        total = builder.fadd(low, high)
                    value = builder.extract_element(total, _INT(0))
                    place = builder.add(builder.add(c, builder.mul(n[j], c_row)), builder.mul(m[i], _WORD(4)))
                    builder.store(value, _pointer(builder, place, _FLOAT), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return dots


#: With few rows of B, sums are taken along k: nothing is packed.
FEW = 4
DOT_ROWS, DOTS_ROWS = 4, 4 if LANES == 16 else 2
dot, dots = _dots(DOT_ROWS, 1), _dots(DOTS_ROWS, FEW)


@no_type_check
@intrinsic
def transpose8(typing_context, source, source_row, source_last, target, target_row, target_last):
    """`target[j, i] = source[i, j]` for 8 x 8 floats; rows past the last ones are taken to be those, as in `tile`."""

    def codegen(context, builder, signature, arguments):
        source, source_row, source_last, target, target_row, target_last = arguments
        vector = ir.VectorType(_FLOAT, 8)

        def rows(base, stride, last):
            index = _clamped(builder, last, 8)
            return [_pointer(builder, builder.add(base, builder.mul(i, stride)), vector) for i in index]

        lines = [builder.load(place, align=4) for place in rows(source, source_row, source_last)]
        # Three rounds; each swaps the off-diagonal blocks of half the size before: 4 x 4, 2 x 2, single values.
        for half in (4, 2, 1):
            low = [j if not j & half else 8 + j - half for j in range(8)]
            high = [j + half if not j & half else 8 + j for j in range(8)]
            masks = [ir.Constant(ir.VectorType(_INT, 8), mask) for mask in (low, high)]
            for i in range(8):
                if not i & half:
                    pair = lines[i], lines[i + half]
                    lines[i], lines[i + half] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        for line, place in zip(lines, rows(target, target_row, target_last), strict=True):
            builder.store(line, place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


def _mover(kind):
    @no_type_check
    @intrinsic
    def move(typing_context, source, target):
        """Floats from one address to another."""

        def codegen(context, builder, signature, arguments):
            source, target = (_pointer(builder, address, kind) for address in arguments)
            builder.store(builder.load(source, align=4), target, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return move


#: `LANES` floats, and one.
move, move1 = _mover(_VECTOR), _mover(_FLOAT)


@no_type_check
@intrinsic
def add1(typing_context, source, target):
    """Adds the float at one address to that at another."""

    def codegen(context, builder, signature, arguments):
        source, target = (_pointer(builder, address, _FLOAT) for address in arguments)
        total = builder.fadd(builder.load(target, align=4), builder.load(source, align=4))
        builder.store(total, target, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@no_type_check
@intrinsic
def prefetch(typing_context, address):
    """Ask for the cache line at an address, which will be read soon; the address may be anywhere."""

    def codegen(context, builder, signature, arguments):
        _prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@no_type_check
@intrinsic
def clear(typing_context, address, length):
    """Zeros, `length` bytes of them."""

    def codegen(context, builder, signature, arguments):
        cgutils.memset(builder, _pointer(builder, arguments[0], _BYTE), arguments[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@no_type_check
@intrinsic
def int_at(typing_context, address):
    """The int32 at an address, as int64."""

    def codegen(context, builder, signature, arguments):
        return builder.sext(builder.load(_pointer(builder, arguments[0], _INT)), _WORD)

    return types.int64(types.int64), codegen


@no_type_check
@intrinsic
def put_int(typing_context, address, value):
    """Puts an int32 at an address."""

    def codegen(context, builder, signature, arguments):
        builder.store(builder.trunc(arguments[1], _INT), _pointer(builder, arguments[0], _INT))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@no_type_check
@intrinsic
def word_at(typing_context, address):
    """The int64 at an address; what other threads wrote before they wrote it is seen after it."""

    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(builder, arguments[0], _WORD), "acquire", 8)

    return types.int64(types.int64), codegen


@no_type_check
@intrinsic
def put_word(typing_context, address, value):
    """Puts an int64 at an address; other threads see it after a `fetch_add` that follows."""

    def codegen(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], _WORD))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@no_type_check
@intrinsic
def fetch_add(typing_context, address, value):
    """Adds to the int64 at an address, at once for all threads; what was there before."""

    def codegen(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], _WORD), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@no_type_check
@intrinsic(prefer_literal=True)
def on_stack(typing_context, size):
    """The address of so many bytes (a constant) that last as long as the function that asks for them."""
    length = size.literal_value

    def codegen(context, builder, signature, arguments):
        with builder.goto_entry_block():
            place = builder.alloca(_BYTE, length)
            place.align = 64
        return builder.ptrtoint(place, _WORD)

    return types.int64(size), codegen


def _caller(gives):
    result = ir.VoidType() if gives == types.void else _WORD

    @no_type_check
    @intrinsic
    def call(typing_context, function, argument):
        """Calls the C function at an address with an int64."""

        def codegen(context, builder, signature, arguments):
            kind = ir.FunctionType(result, [_WORD])
            found = builder.call(_pointer(builder, arguments[0], kind), [arguments[1]])
            return context.get_dummy_value() if gives == types.void else found

        return gives(types.int64, types.int64), codegen

    return call


#: Calls of a function that gives nothing, and of one that gives an address.
call_task, call = _caller(types.void), _caller(types.int64)


def process_word(name: str):
    """A cell for a number that differs from process to process, and the instruction that loads it.

    Machine code that is kept on disk knows it by its name alone.
    """
    cell = ctypes.c_int64()
    llvmlite.binding.add_symbol(name, ctypes.addressof(cell))

    @no_type_check
    @intrinsic
    def load(typing_context):
        def codegen(context, builder, signature, arguments):
            place = builder.module.globals.get(name) or ir.GlobalVariable(builder.module, _WORD, name)
            return builder.load(place)

        return types.int64(), codegen

    return cell, load


malloc = types.ExternalFunction("malloc", types.int64(types.int64))
free = types.ExternalFunction("free", types.void(types.int64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())
