"""Quantised containers: blocks of small floats that share a scale, decoded as they are read.

FP8, as DeepSeek released it (technical report of DeepSeek-V3, section 3.3, arXiv:2412.19437): a matrix of float8_e4m3fn
beside `NAME_scale_inv`, a float32 for every block of 128 x 128; blocks at the edges are smaller. MXFP4, as gpt-oss was
released in (OCP Microscaling Formats 1.0, section 5.3): 32 values of 4 bits share a power of two; no family here has it
yet.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from eqx_moe.checkpoint.header import Entry
from eqx_moe.checkpoint.shards import Stored
from eqx_moe.errors import CheckpointError

BLOCK = 128
_SCALES = "_scale_inv"
_DECODED = np.dtype(ml_dtypes.bfloat16)
_SCALE_DTYPES = {"F32": np.dtype(np.float32), "BF16": _DECODED}
# Sign, two bits of exponent, one of mantissa (E2M1).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def decode_fp8(
    weight: Float[np.ndarray, "*batch out in"], scales: Float[np.ndarray, "*batch out_blocks in_blocks"]
) -> Float[np.ndarray, "*batch out in"]:
    """Matrices of float8_e4m3fn times the scales of their 128 x 128 blocks, in float32; given in bfloat16."""
    rows, columns = weight.shape[-2:]
    wide = np.repeat(scales.astype(np.float32), BLOCK, axis=-1)[..., :columns]
    return (weight.astype(np.float32) * np.repeat(wide, BLOCK, axis=-2)[..., :rows, :]).astype(_DECODED)


def decode_mxfp4(
    blocks: UInt8[np.ndarray, "*batch out in_blocks 16"], scales: UInt8[np.ndarray, "*batch out in_blocks"]
) -> Float[np.ndarray, "*batch out in"]:
    """32 values of a block in 16 bytes, the low half of a byte first, times 2**(scale - 127); in bfloat16.

    bfloat16 has each such value, but from 2**128 on it is infinite. The scale 255 is NaN. gpt-oss's own layout in
    bfloat16, [experts, in, out], is the transpose of this one.
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 2 * blocks.shape[-1])
    with np.errstate(over="ignore"):
        values = np.ldexp(_FP4[codes], scales[..., None].astype(np.int32) - 127)
    values[scales == 255] = np.nan
    return values.astype(_DECODED).reshape(*scales.shape[:-1], -1)


def decoded(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors, each FP8 matrix and its scales as one tensor of bfloat16 that is decoded as it is read.

    Raises:
        CheckpointError: ST-SHAPE or ST-DTYPE if scales do not belong to their matrix.
    """
    result: dict[str, Stored] = {}
    for name, tensor in stored.items():
        base = name.removesuffix(_SCALES)
        if name != base and base in stored and stored[base].entry.dtype == "F8_E4M3":
            continue
        scales = stored.get(name + _SCALES)
        result[name] = _paired(name, tensor, scales) if scales and tensor.entry.dtype == "F8_E4M3" else tensor
    return result


def _paired(name: str, weight: Stored, scales: Stored) -> Stored:
    def refuse(code: str, expected: str, found: str) -> NoReturn:
        raise CheckpointError(
            code=code,
            doing="decoding FP8 weights",
            file=scales.path,
            item=name + _SCALES,
            expected=expected,
            found=found,
            fix="export the checkpoint again, in bfloat16 if need be",
        )

    shape = weight.entry.shape
    due = (*shape[:-2], *(math.ceil(size / BLOCK) for size in shape[-2:]))
    if scales.entry.shape != due or len(shape) < 2:
        expected = f"the shape {due}, a scale for each block of {BLOCK} x {BLOCK} of {shape}"
        refuse("ST-SHAPE", expected, str(scales.entry.shape))
    if scales.entry.dtype not in _SCALE_DTYPES:
        refuse("ST-DTYPE", f"scales in a dtype among {', '.join(_SCALE_DTYPES)}", scales.entry.dtype)
    entry = Entry("BF16", shape, 0, math.prod(shape) * _DECODED.itemsize)
    return Stored(weight.file, weight.path, entry, _FP8(weight, scales).read_into)


@dataclass(frozen=True)
class _FP8:
    """FP8 matrices under one another, and the scales of their blocks."""

    weight: Stored
    scales: Stored

    def read_into(self, start: int, target: np.ndarray) -> None:
        """Fills a contiguous array of bfloat16 with the decoded values from the byte `start` on."""
        flat = target.reshape(-1)
        rows, columns = self.weight.entry.shape[-2:]
        first = start // _DECODED.itemsize
        for matrix, row, stop in _row_blocks(first, first + flat.size, rows, columns):
            values = self._decode(matrix, row, stop).reshape(-1)
            at = (matrix * rows + row) * columns - first  # where they begin in `flat`
            here = flat[max(at, 0) : at + values.size]
            here[...] = values[max(-at, 0) :][: here.size]

    def _decode(self, matrix: int, row: int, stop: int) -> np.ndarray:
        """The rows [row, stop) of one matrix, within a row of blocks."""
        rows, columns = self.weight.entry.shape[-2:]
        weight = np.empty((stop - row, columns), ml_dtypes.float8_e4m3fn)
        self.weight.read_into(self.weight.entry.start + (matrix * rows + row) * columns, weight)
        down, across = self.scales.entry.shape[-2:]
        scales = np.empty((1, across), _SCALE_DTYPES[self.scales.entry.dtype])
        at = (matrix * down + row // BLOCK) * scales.nbytes
        self.scales.read_into(self.scales.entry.start + at, scales)
        return decode_fp8(weight, scales)


def _row_blocks(first: int, last: int, rows: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """The (matrix, first row, row after the last) that hold the elements [first, last), each within a row of blocks."""
    if first == last:
        return
    row, stop = first // columns, -(-last // columns)  # of all matrices under one another
    while row < stop:
        matrix, inside = divmod(row, rows)
        end = min((inside // BLOCK + 1) * BLOCK, rows, inside + stop - row)
        yield matrix, inside, end
        row += end - inside
