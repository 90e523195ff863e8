"""The dtypes of the format, those of them that weights may have, and casting between them."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from eqx_moe.checkpoint.names import matcher

#: Every dtype of the format by its name there. NumPy holds those of 6 and 4 bits a byte each, the files pack them.
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        **{"BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32},
        **{"I32": np.int32, "U64": np.uint64, "I64": np.int64, "C64": np.complex64},
        **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
        **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz},
        **{"F8_E5M2": ml_dtypes.float8_e5m2, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz},
        **{"F8_E8M0": ml_dtypes.float8_e8m0fnu, "F6_E2M3": ml_dtypes.float6_e2m3fn},
        **{"F6_E3M2": ml_dtypes.float6_e3m2fn, "F4": ml_dtypes.float4_e2m1fn},
    }.items()
}
#: Those that weights may have.
WEIGHT_DTYPES = {name: DTYPES[name] for name in ("F32", "F16", "BF16")}
FORMAT_NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}


def weight_dtype(dtype: Any) -> np.dtype:
    """A dtype or its name as one that weights may have.

    Raises:
        ValueError: it is none of float32, float16, bfloat16.
    """
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known not in FORMAT_NAMES:
        raise ValueError(f"`dtype` must be one of {sorted(map(str, FORMAT_NAMES))}; got {dtype!r}.")
    return known


def target_dtype(path: str, dtype: np.dtype, named: np.dtype | None, keep_fp32: tuple[str, ...]) -> np.dtype:
    """What a leaf is cast to: `named`, but float32 where a template of `keep_fp32` fits; itself if nothing is named."""
    if named is None:
        return dtype
    kept = any(matcher(template).fullmatch(path) for template in keep_fp32)
    return np.dtype(np.float32) if kept else named


def cast(source: np.ndarray, target: np.ndarray) -> bool:
    """Copies `source` into `target`, rounding to its dtype. Returns whether all finite values stayed finite."""
    with np.errstate(over="ignore"):
        target[...] = source
    # Of the three only float16 has a narrower range than another.
    if target.dtype != np.float16 or source.dtype == target.dtype:
        return True
    return bool(np.array_equal(np.isfinite(source), np.isfinite(target)))
