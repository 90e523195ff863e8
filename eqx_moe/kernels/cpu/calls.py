"""Grouped products on CPU as JAX operations: float32, in machine code of our own.

XLA's matrix products copy what they are given into a form that they like, an expert's matrix too, which for few rows is
much of the time; a slice of a stack it copies before that. These read the matrices where they lie, or, for the gradient
of rows, pack a part at a time.

A program that is exported for CPU names the kernels (`jax.export.DisabledSafetyCheck.custom_call(calls.TARGET)`), and a
process that runs it calls `load` first.
"""

import functools
import os
import platform
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int

#: What XLA calls the kernels.
TARGET = "eqx_moe_grouped_matmul"
_lock = threading.Lock()


@functools.cache
def available() -> bool:
    """Whether this machine has what the kernels need: fused multiply-adds and POSIX. And Numba may use what it has."""
    import llvmlite.binding

    if "NUMBA_CPU_NAME" in os.environ or "NUMBA_CPU_FEATURES" in os.environ:
        return False
    if os.name != "posix" or sys.byteorder != "little" or sys.maxsize < 2**32:
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(llvmlite.binding.get_host_cpu_features().get("fma"))
    return platform.machine().lower() in ("aarch64", "arm64")


@functools.cache
def _load():
    from eqx_moe.compiled import announced

    with announced("compiling the experts' CPU kernels for this machine, some ten seconds; then they are kept"):
        from eqx_moe.kernels.cpu import handler
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler.handler.ctypes), platform="cpu")
    return handler


def load():
    """The kernels, which are compiled if this is their first use on the machine; XLA knows of them afterwards."""
    with _lock:
        return _load()


def _cast(x, axes: frozenset) -> Array:
    """Inside `shard_map`, a value that may differ along these axes of the mesh."""
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def _call(shape: tuple[int, ...], kind: str, *arguments):
    kernels = load()
    axes = [jax.typeof(each).manual_axis_type.varying for each in arguments]
    union = frozenset().union(*axes)
    arguments = [_cast(each, union - own) for each, own in zip(arguments, axes, strict=True)]
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return _cast(call(*arguments, kind=np.int64(getattr(kernels, kind))), union)


def product(
    x: Float32[Array, "rows in"],
    weight: Float32[Array, "groups out in"],
    sizes: Int[Array, " groups"],
) -> Float32[Array, "rows out"]:
    """As `grouped_matmul`."""
    return _call((x.shape[0], weight.shape[1]), "PRODUCT", x, weight, sizes.astype(jnp.int32))


def transposed_product(
    x: Float32[Array, "rows out"],
    weight: Float32[Array, "groups out in"],
    sizes: Int[Array, " groups"],
) -> Float32[Array, "rows in"]:
    """Each row times the transposed matrix of its group."""
    return _call((x.shape[0], weight.shape[2]), "TRANSPOSED", x, weight, sizes.astype(jnp.int32))


def weight_gradient(
    x: Float32[Array, "rows in"], dy: Float32[Array, "rows out"], sizes: Int[Array, " groups"]
) -> Float32[Array, "groups out in"]:
    """For each group, the sum over its rows of the outer product of `dy` and `x`."""
    shape = (sizes.shape[0], dy.shape[1], x.shape[1])
    return _call(shape, "WEIGHT_GRADIENT", x, dy, sizes.astype(jnp.int32))
