"""Quantised containers: blocks of small floats that share a scale, decoded as they are read.

FP8, as DeepSeek released it (technical report of DeepSeek-V3, section 3.3, arXiv:2412.19437): a matrix of float8_e4m3fn
beside `NAME_scale_inv`, a float32 for every block of 128 x 128; blocks at the edges are smaller. MXFP4, as gpt-oss was
released in (OCP Microscaling Formats 1.0, section 5.3): `NAME_blocks` has 32 values of 4 bits in each 16 bytes, and
`NAME_scales` a power of two for each of these blocks.
"""

import math
from collections.abc import Callable, Mapping
from typing import NoReturn

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from eqx_moe.checkpoint.boxes import Box, inside, lengths, pieces
from eqx_moe.checkpoint.header import Entry
from eqx_moe.checkpoint.shards import Stored
from eqx_moe.errors import CheckpointError

BLOCK = 128
_PIECE = 1 << 19  # values decoded at a time
_SCALES = "_scale_inv"
_MX_BLOCKS, _MX_SCALES, _MX_BLOCK = "_blocks", "_scales", 32
_DECODED = np.dtype(ml_dtypes.bfloat16)
_SCALE_DTYPES = {"F32": np.dtype(np.float32), "BF16": _DECODED}
# What each byte stands for in float32: one FP8 value, or two of FP4 (sign, two bits of exponent, one of mantissa), the
# low half first and looked up as one number of 64 bits. Tables are several times faster than casts and `ldexp`.
_FP8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_FP4_PAIRS = np.stack([np.tile(_FP4, 16), np.repeat(_FP4, 16)], axis=-1).view(np.uint64)[:, 0]
# 2**(scale - 127), and NaN for 255.
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))


def decode_fp8(
    weight: Float[np.ndarray, "*batch out in"],
    scales: Float[np.ndarray, "*batch out_blocks in_blocks"],
    first: tuple[int, int] = (0, 0),
) -> Float[np.ndarray, "*batch out in"]:
    """Matrices of float8_e4m3fn times the scales of their 128 x 128 blocks, in float32; given in bfloat16.

    Of the first blocks `weight` has what follows the row and the column `first`.
    """
    rows, columns = (slice(start, start + size) for start, size in zip(first, weight.shape[-2:], strict=True))
    wide = np.repeat(scales.astype(np.float32), BLOCK, axis=-1)[..., columns]
    return (_FP8[weight.view(np.uint8)] * np.repeat(wide, BLOCK, axis=-2)[..., rows, :]).astype(_DECODED)


def decode_mxfp4(
    blocks: UInt8[np.ndarray, "*batch out in_blocks 16"], scales: UInt8[np.ndarray, "*batch out in_blocks"]
) -> Float[np.ndarray, "*batch out in"]:
    """32 values of a block in 16 bytes, the low half of a byte first, times 2**(scale - 127); in bfloat16.

    bfloat16 has each such value, but from 2**128 on it is infinite. The scale 255 is NaN. gpt-oss's own layout in
    bfloat16, [experts, in, out], is the transpose of this one.
    """
    values = _FP4_PAIRS[blocks].view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= _E8M0[scales][..., None]
    # Each value is exact in bfloat16, the upper half of a float32.
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(_DECODED).reshape(*scales.shape[:-1], -1)


def decoded(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors, each FP8 matrix and its scales as one tensor of bfloat16 that is decoded as it is read, and so
    each pair of MXFP4 blocks and scales, [..., out, in], under the name of the blocks.

    Raises:
        CheckpointError: ST-SHAPE or ST-DTYPE if scales do not belong to their matrix.
    """
    result: dict[str, Stored] = {}
    for name, tensor in stored.items():
        dtype = tensor.entry.dtype
        if name.endswith((_SCALES, _MX_SCALES)) and _is_scales(name, stored):
            continue
        if dtype == "F8_E4M3" and name + _SCALES in stored:
            result[name] = _fp8(name, tensor, stored[name + _SCALES])
        elif dtype == "U8" and name.endswith(_MX_BLOCKS) and _mx_scales(name) in stored:
            result[name] = _mxfp4(name, tensor, stored[_mx_scales(name)])
        else:
            result[name] = tensor
    return result


def _mx_scales(name: str) -> str:
    return name.removesuffix(_MX_BLOCKS) + _MX_SCALES


def _is_scales(name: str, stored: Mapping[str, Stored]) -> bool:
    for suffix, ending, dtype in ((_SCALES, "", "F8_E4M3"), (_MX_SCALES, _MX_BLOCKS, "U8")):
        weight = stored.get(name.removesuffix(suffix) + ending)
        if name.endswith(suffix) and weight is not None and weight.entry.dtype == dtype:
            return True
    return False


def _refuse(code: str, container: str, scales: Stored, item: str, expected: str, found: str) -> NoReturn:
    raise CheckpointError(
        code=code,
        doing=f"decoding {container} weights",
        file=scales.path,
        item=item,
        expected=expected,
        found=found,
        fix="export the checkpoint again, in bfloat16 if need be",
    )


def _fp8(name: str, weight: Stored, scales: Stored) -> Stored:
    shape = weight.entry.shape
    due = (*shape[:-2], *(math.ceil(size / BLOCK) for size in shape[-2:]))
    if scales.entry.shape != due or len(shape) < 2:
        expected = f"the shape {due}, a scale for each block of {BLOCK} x {BLOCK} of {shape}"
        _refuse("ST-SHAPE", "FP8", scales, name + _SCALES, expected, str(scales.entry.shape))
    if scales.entry.dtype not in _SCALE_DTYPES:
        expected = f"scales in a dtype among {', '.join(_SCALE_DTYPES)}"
        _refuse("ST-DTYPE", "FP8", scales, name + _SCALES, expected, scales.entry.dtype)

    def decode(box: Box) -> np.ndarray:
        blocks = (*box[:-2], *(_blocks(along, BLOCK) for along in box[-2:]))
        factors = _read(scales, blocks, _SCALE_DTYPES[scales.entry.dtype])
        row, column = (along.start % BLOCK for along in box[-2:])
        return decode_fp8(_read(weight, box, np.dtype(ml_dtypes.float8_e4m3fn)), factors, (row, column))

    return _decoding(weight, shape, decode)


def _mxfp4(name: str, blocks: Stored, scales: Stored) -> Stored:
    shape, item = blocks.entry.shape, _mx_scales(name)
    if len(shape) < 3 or shape[-1] != _MX_BLOCK // 2 or scales.entry.shape != shape[:-1]:
        expected = f"blocks [..., out, in / {_MX_BLOCK}, {_MX_BLOCK // 2}] and scales of the same shape but the last"
        _refuse("ST-SHAPE", "MXFP4", scales, item, expected, f"blocks {shape} and scales {scales.entry.shape}")
    if scales.entry.dtype != "U8":
        _refuse("ST-DTYPE", "MXFP4", scales, item, "scales in U8", scales.entry.dtype)

    def decode(box: Box) -> np.ndarray:
        *rows, along = box
        across = (*rows, _blocks(along, _MX_BLOCK))
        codes = _read(blocks, (*across, range(_MX_BLOCK // 2)), np.dtype(np.uint8))
        skip = along.start % _MX_BLOCK
        return decode_mxfp4(codes, _read(scales, across, np.dtype(np.uint8)))[..., skip : skip + len(along)]

    return _decoding(blocks, (*shape[:-2], shape[-2] * _MX_BLOCK), decode)


def _blocks(along: range, size: int) -> range:
    """The blocks that a range of places lies in."""
    return range(along.start // size, -(-along.stop // size))


def _read(stored: Stored, box: Box, dtype: np.dtype) -> np.ndarray:
    values = np.empty(lengths(box), dtype)
    stored.read(box, values)
    return values


def _decoding(stored: Stored, shape: tuple[int, ...], decode: Callable[[Box], np.ndarray]) -> Stored:
    """A tensor of bfloat16 of which `decode` gives the values of a box."""

    def read(box: Box, target: np.ndarray) -> None:
        for piece in pieces(box, shape, _PIECE):
            target[inside(piece, box)] = decode(piece)

    entry = Entry("BF16", shape, 0, math.prod(shape) * _DECODED.itemsize)
    return Stored(stored.file, stored.path, entry, read)
