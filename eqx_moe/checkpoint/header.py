"""The safetensors container: a strict parser of its header, and its writer.

A file is an 8-byte little-endian length, that many bytes of JSON (padded with spaces), and the data of the tensors. The
parser accepts what the format's description allows, and less than its reference implementation, safetensors 0.8, which
lets through: a name listed twice (the last one wins), unknown fields, sizes whose product overflows beside a zero.
https://github.com/huggingface/safetensors#format
"""

import io
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, no_type_check

from eqx_moe.checkpoint.jsonfile import JSONProblem, parse_object
from eqx_moe.errors import CheckpointError, quote

#: Bits per element of every dtype of the format.
DTYPE_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "C64": 64},
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_MAX_HEADER = 100_000_000
_MAX_TEXT = 16_000_000  # bytes of a header besides the spaces after it: 100,000 tensors and more
_MAX_DIMENSIONS = 8
#: What `jax.device_put` asks of a host buffer that it takes over without a copy on CPU, in bytes.
ALIGNMENT = 64

# How files begin that are found under the name of a safetensors file, what they are, and what to do.
_REFETCH = "download the file again"
_IMPOSTORS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file that it stands for",
        "run `git lfs pull` in the folder",
    ),
    (b"PK\x03\x04", "a zip archive, as torch.save writes", "convert it to safetensors where it was made"),
    (b"\x80", "a pickle", "convert it to safetensors where it was made; pickles can run code and are never read"),
    (b"\x1f\x8b", "gzip data", "unpack it with gunzip"),
    (b"GGUF", "a GGUF file", "take the checkpoint's safetensors form"),
    (b"<", "a web page or XML", _REFETCH),
    (b"{", "JSON without the 8-byte length before it", _REFETCH),
    (b"\0" * 8, "zeros", _REFETCH),
)


class Entry(NamedTuple):
    """Where a tensor lies: its dtype by the format's name, its shape, and its bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: io.FileIO, name: str) -> dict[str, Entry]:
    """Reads and checks the header of an open safetensors file; `name` stands for it in errors.

    Raises:
        CheckpointError: ST-FORMAT, ST-HEADER, ST-SHAPE, ST-DTYPE, ST-OFFSETS; see `eqx_moe.errors`.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    first = file.read(64)
    if len(first) < 8:
        raise _problem("ST-FORMAT", name, "at least 8 bytes", f"{size} bytes: cut off?", fix=_REFETCH)
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        expected = f"a header of at least 2 and at most {_MAX_HEADER} bytes within the file's {size}"
        for magic, what, fix in _IMPOSTORS:
            if first.startswith(magic):
                raise _problem("ST-FORMAT", name, "a safetensors file", f"looks like {what}", fix=fix)
        raise _problem("ST-FORMAT", name, expected, f"a header length of {length}: cut off or damaged?", fix=_REFETCH)
    file.seek(8)
    raw = file.read(min(length, _MAX_TEXT))
    for start in range(len(raw), length, _MAX_TEXT):
        if file.read(min(_MAX_TEXT, length - start)).strip(b" "):
            expected = f"a header of at most {_MAX_TEXT} bytes, not counting spaces after it"
            raise _problem("ST-HEADER", name, expected, f"{length} bytes", fix="spread the tensors over several files")
    try:
        header = parse_object(raw)
    except JSONProblem as error:
        raise _problem("ST-HEADER", name, "a header that is one JSON object", str(error), fix=_REFETCH) from error
    _check_metadata(header.pop("__metadata__", None), name)
    entries = {tensor: _entry(tensor, entry, 8 + length, name) for tensor, entry in header.items()}
    _check_tiling(entries, 8 + length, size, name)
    return entries


def write_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The bytes before the data of a file that holds these tensors (dtype, shape) in this order, without gaps.

    Padded so that the data starts at a multiple of 64 bytes. `format: pt` is what readers of before 2025 ask for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _check_metadata(metadata: Any, name: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _problem("ST-HEADER", name, "an object of strings", quote(metadata), item="__metadata__")


# Called for every tensor, of which a header may have 100,000: `EQX_MOE_TYPECHECK` took longer than all the rest.
@no_type_check
def _entry(tensor: str, entry: Any, data: int, name: str) -> Entry:
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != fields:
        raise _problem("ST-HEADER", name, f"an object with the keys {sorted(fields)}", quote(entry), item=tensor)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _problem("ST-DTYPE", name, f"a dtype among {', '.join(DTYPE_BITS)}", quote(dtype), item=tensor)
    if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        expected = f"a shape of at most {_MAX_DIMENSIONS} sizes, none of them negative"
        raise _problem("ST-SHAPE", name, expected, quote(shape), item=tensor)
    if math.prod(size for size in shape if size) * DTYPE_BITS[dtype] >= 2**63:
        raise _problem("ST-SHAPE", name, "fewer than 2**63 bits", f"the shape {quote(shape)}", item=tensor)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _problem("ST-OFFSETS", name, "data_offsets [start, stop]", quote(offsets), item=tensor)
    start, stop = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (stop - start):
        expected = (
            f"{bits / 8:g} bytes for {dtype} {tuple(shape)}"
            if bits % 8
            else f"{bits // 8} bytes for {dtype} {tuple(shape)}"
        )
        raise _problem("ST-OFFSETS", name, expected, f"{stop - start} bytes: {offsets}", item=tensor)
    return Entry(dtype, tuple(shape), data + start, data + stop)


# Called twice for every tensor.
@no_type_check
def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_tiling(entries: Mapping[str, Entry], data: int, size: int, name: str) -> None:
    """The tensors must cover the data exactly once: what lies between or after them could be another file's content."""
    end, last = data, ""
    ranges = ((entry.start, entry.stop, i, tensor) for i, (tensor, entry) in enumerate(entries.items()))
    for start, stop, _, tensor in sorted(ranges):
        if start < end:
            found = f"bytes {start - data} to {min(end, stop) - data} are shared with {quote(last)}"
            raise _problem("ST-OFFSETS", name, "every byte of the data in one tensor", found, item=tensor)
        if start > end:
            found = f"bytes {end - data} to {start - data} before it belong to no tensor"
            raise _problem("ST-OFFSETS", name, "every byte of the data in one tensor", found, item=tensor)
        end, last = stop, tensor
    if size != end:
        found = f"{size} bytes: {f'{size - end} too many' if size > end else f'cut off, {end - size} are missing'}"
        raise _problem("ST-OFFSETS", name, f"a file of {end} bytes, as its header says", found, item=last, fix=_REFETCH)


def _problem(
    code: str, name: str, expected: str, found: str, *, item: str = "", fix: str = "download or export the file again"
) -> CheckpointError:
    return CheckpointError(
        code=code, doing="reading a safetensors header", file=name, item=item, expected=expected, found=found, fix=fix
    )
