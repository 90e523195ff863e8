"""Tensors as they are stored, in every dtype of the format: for what no model has as weights (scales, codes)."""

import numpy as np

from eqx_moe.checkpoint.dtypes import DTYPES
from eqx_moe.checkpoint.header import DTYPE_BITS
from eqx_moe.checkpoint.shards import Stored, read_into
from eqx_moe.errors import CheckpointError


def read_array(stored: Stored, name: str) -> np.ndarray:
    """One tensor of `open_weights`; `name` is for errors.

    Elements of 4 and 6 bits, which the files pack from the lowest bits of the first byte on, have a byte each here.

    Raises:
        CheckpointError: ST-VALUE for a BOOL that is neither 0 nor 1; ST-CHANGED.
    """
    entry, dtype, bits = stored.entry, DTYPES[stored.entry.dtype], DTYPE_BITS[stored.entry.dtype]
    raw = np.empty(stored.size, np.uint8)
    read_into(stored.file, stored.path, entry.start, raw)
    if bits < 8:
        ones = np.unpackbits(raw, bitorder="little").reshape(-1, bits)
        raw = np.packbits(ones, axis=-1, bitorder="little").reshape(-1)
    if entry.dtype == "BOOL" and raw.size and raw.max() > 1:
        raise CheckpointError(
            code="ST-VALUE",
            doing="reading a tensor",
            file=stored.path,
            item=name,
            expected="booleans, bytes of 0 or 1",
            found=f"a byte of {raw.max()}",
            fix="download or export the file again",
        )
    return raw.view(dtype).reshape(entry.shape)
