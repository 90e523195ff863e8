"""The dtypes that weights may have, their names in the format, and casting between them."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from eqx_moe.checkpoint.names import matcher

#: The format's name -> dtype.
WEIGHT_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
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
