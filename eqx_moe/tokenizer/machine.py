"""Machine words inside Numba kernels: eight bytes at once, from any place of a byte array.

Numba has no unaligned load, no count of trailing zeros and no prefetch; LLVM has. Words are little-endian, as on every
machine that Numba runs on.
"""

import contextlib
from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from eqx_moe import compiled

# Most of Numba (and with it SciPy) is imported only when the first kernel is called, a quarter of a second. Imports are
# what a program expects to wait for when it imports.
cpu_target.typing_context.refresh()  # pyright: ignore[reportAttributeAccessIssue]
cpu_target.target_context.refresh()  # pyright: ignore[reportAttributeAccessIssue]


def announced() -> contextlib.AbstractContextManager[None]:
    """Kernels that are compiled meanwhile are announced in the log, once in a process."""
    return compiled.announced(
        "compiling the tokenizer's kernels for this machine, about ten seconds; then they are kept, and those of each "
        "pattern when it is first used"
    )


def _address(context, builder, array_type, array, index):
    """A pointer to `array[index]` of a one-dimensional contiguous array; nothing is checked."""
    struct = cgutils.create_struct_proxy(array_type)(context, builder, value=array)
    return builder.gep(struct.data, [index])


@no_type_check
@intrinsic
def load64(typing_context, array, index):
    """The eight bytes from `array[index]` on, as uint64. The caller sees to it that they are there."""

    def codegen(context, builder, signature, arguments):
        place = _address(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(array, types.int64), codegen


@no_type_check
@intrinsic
def store64(typing_context, array, index, value):
    """Put a uint64 into the eight bytes from `array[index]` on."""

    def codegen(context, builder, signature, arguments):
        place = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), codegen


@no_type_check
@intrinsic
def copy(typing_context, source, start, target, place, length):
    """`target[place : place + length] = source[start : start + length]` for arrays of bytes, without Numba's checks."""

    def codegen(context, builder, signature, arguments):
        source, start, target, place, length = arguments
        here = _address(context, builder, signature.args[0], source, start)
        there = _address(context, builder, signature.args[2], target, place)
        cgutils.raw_memcpy(builder, there, here, length, 1)
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64, types.int64), codegen


@no_type_check
@intrinsic
def trailing_zeros(typing_context, value):
    """How many low bits of a uint64 are zero, int64; the value is not 0."""

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen


@no_type_check
@intrinsic
def matches64(typing_context, array, index, mask, value):
    """Which of the 64 bytes from `array[index]` on are `value` under `mask`: bit k of a uint64 for byte k."""

    def codegen(context, builder, signature, arguments):
        byte, vector, index = ir.IntType(8), ir.VectorType(ir.IntType(8), 64), ir.IntType(32)
        nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(index, 0)
        everywhere = ir.Constant(ir.VectorType(index, 64), [0] * 64)

        def spread(number):
            one = builder.insert_element(nothing, builder.trunc(number, byte), first)
            return builder.shuffle_vector(one, nothing, everywhere)

        place = _address(context, builder, signature.args[0], *arguments[:2])
        loaded = builder.load(builder.bitcast(place, vector.as_pointer()), align=1)
        found = builder.icmp_unsigned("==", builder.and_(loaded, spread(arguments[2])), spread(arguments[3]))
        return builder.bitcast(found, ir.IntType(64))

    return types.uint64(array, types.int64, types.int64, types.int64), codegen


@no_type_check
@intrinsic
def byte_swap(typing_context, value):
    """A uint64 with its bytes in the other order."""

    def codegen(context, builder, signature, arguments):
        return builder.bswap(arguments[0])

    return types.uint64(types.uint64), codegen


@no_type_check
@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of `array[index]`, which will be read soon."""

    def codegen(context, builder, signature, arguments):
        place = _address(context, builder, signature.args[0], *arguments)
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        flags = [ir.Constant(number, flag) for flag in (0, 3, 1)]
        builder.call(function, [builder.bitcast(place, byte), *flags])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen
