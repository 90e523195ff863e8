"""Headers and index files that hypothesis makes up: loaded right, or refused as a CheckpointError, and nothing else."""

import json
import pathlib
import struct
import tempfile

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eqx_moe.checkpoint import open_weights
from eqx_moe.checkpoint.header import DTYPE_BITS
from eqx_moe.errors import CheckpointError

SIZES = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**31, 2**62, 2**64, 10**25]), st.just(1.0), st.none())
NAMES = st.one_of(st.sampled_from(["a", "b", "__metadata__", "../a", "a\0", ""]), st.text(max_size=3))
JUNK = st.recursive(st.none() | st.booleans() | SIZES | st.text(max_size=3), st.lists, max_leaves=4)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F128"]) | JUNK,
        "shape": st.lists(SIZES, max_size=3) | JUNK,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2) | JUNK,
        "more": JUNK,
    },
)
SHARDS = ["0.safetensors", "1.safetensors", "2.safetensors"]
PLACES = st.sampled_from([*SHARDS, "../0.safetensors", "/etc/passwd", "0.bin", "", ".", "0.safetensors\0"]) | JUNK


@st.composite
def tiled(draw) -> dict:
    """A header that is right but, now and then, for one thing."""
    header, start = {}, 0
    for name in draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from([dtype for dtype, bits in DTYPE_BITS.items() if bits >= 8]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        stop = start + int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    if header and draw(st.integers(0, 2)) == 0:
        entry = header[draw(st.sampled_from(sorted(header)))]
        entry[draw(st.sampled_from(sorted(entry)))] = draw(JUNK | st.lists(st.integers(0, 9), max_size=3))
    return header


def read(folder: pathlib.Path) -> dict | None:
    """What a folder's headers say, None if it is refused as it should be."""
    try:
        with open_weights(folder) as stored:
            return {name: (each.entry.dtype, each.entry.shape, each.size) for name, each in stored.items()}
    except CheckpointError as error:
        text = str(error)
        assert error.expected and error.found and error.fix and len(text) < 5000
        assert all(line.isprintable() for line in text.split("\n"))
        return None


def fuzzed(examples: int):
    return settings(
        max_examples=examples, deadline=2000, suppress_health_check=[HealthCheck.too_slow], derandomize=True
    )


@fuzzed(2500)
@given(st.one_of(tiled(), st.dictionaries(NAMES, ENTRIES | JUNK, max_size=3)), st.sampled_from([0, 0, 0, 1, -1, 7]))
def test_made_up_headers(header, more):
    """Whatever is accepted, safetensors accepts with the same content."""
    text = json.dumps(header).encode()
    ends = [entry.get("data_offsets") for entry in header.values() if isinstance(entry, dict)]
    last = max([end[1] for end in ends if isinstance(end, list) and len(end) == 2 and type(end[1]) is int], default=0)
    raw = struct.pack("<Q", len(text)) + text + bytes(max(0, min(last, 10_000) + more))
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "model.safetensors").write_bytes(raw)
        found = read(pathlib.Path(folder))
    if found is not None:
        theirs = {
            name: (each["dtype"], tuple(each["shape"]), len(each["data"]))
            for name, each in safetensors.deserialize(raw)
        }
        assert found == theirs


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard, names in zip(SHARDS, ("ab", "c", ""), strict=True):
        header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
        text = json.dumps(header).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(text)) + text + bytes(len(names)))
    return folder


RIGHT = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}


@fuzzed(2500)
@given(
    st.one_of(
        JUNK,
        st.dictionaries(st.sampled_from("abcd"), PLACES, max_size=4),
        st.dictionaries(st.sampled_from("abcd"), PLACES, max_size=1).map(lambda change: RIGHT | change),
    ),
    st.binary(max_size=2),
)
def test_made_up_index_files(shards, weight_map, after):
    (shards / "model.safetensors.index.json").write_bytes(json.dumps({"weight_map": weight_map}).encode() + after)
    found = read(shards)
    # What it lists must be all that the shards that it names have; the third has nothing to list.
    whole = weight_map in (RIGHT, {"a": SHARDS[0], "b": SHARDS[0]}, {"c": SHARDS[1]})
    assert (found is not None) == (whole and not after.strip(b" \t\r\n"))
