"""Headers of weights on the Hub, which are read before anything is downloaded: malformed, long, from odd servers."""

import json

import pytest
import tiny
from downloading import HEADER, INDEX, LARGE, REPO, SHARDS, files_of, refused, weights

import eqx_moe

SINGLE = "model.safetensors"
ENTRY = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, bytes]:
    """The files of a model in one file."""
    folder = tmp_path_factory.mktemp("single")
    eqx_moe.save_pretrained(tiny.model(seed=3), folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def shard(header: object, data: bytes = bytes(12)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


DIGITS = b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,12]}}'
MALFORMED = {
    "shape null": ("ST-SHAPE", shard({"x": ENTRY | {"shape": None}})),
    "shape of text": ("ST-SHAPE", shard({"x": ENTRY | {"shape": ["3"]}})),
    "shape negative": ("ST-SHAPE", shard({"x": ENTRY | {"shape": [-3]}})),
    "shape float": ("ST-SHAPE", shard({"x": ENTRY | {"shape": [3.0]}})),
    "shape overflow": ("ST-SHAPE", shard({"x": ENTRY | {"shape": [2**62, 2**62]}})),
    "offsets null": ("ST-OFFSETS", shard({"x": ENTRY | {"data_offsets": None}})),
    "offsets one": ("ST-OFFSETS", shard({"x": ENTRY | {"data_offsets": [0]}})),
    "offsets three": ("ST-OFFSETS", shard({"x": ENTRY | {"data_offsets": [0, 1, 2]}})),
    "file too long": ("ST-OFFSETS", shard({"x": ENTRY}, bytes(13))),
    "file too short": ("ST-OFFSETS", shard({"x": ENTRY}, bytes(11))),
    "dtype list": ("ST-DTYPE", shard({"x": ENTRY | {"dtype": [3]}})),
    "dtype number": ("ST-DTYPE", shard({"x": ENTRY | {"dtype": 3}})),
    "entry list": ("ST-HEADER", shard({"x": [1]})),
    "metadata list": ("ST-HEADER", shard({"__metadata__": [1], "x": ENTRY})),
    "header list": ("ST-HEADER", shard([])),
    "name twice": ("ST-HEADER", shard(b'{"x":1,"x":2}')),
    "no UTF-8": ("ST-HEADER", shard(b'{"\xe9":1}')),
    "NaN": ("ST-HEADER", shard(b'{"x":NaN}')),
    "5,000 digits": ("ST-HEADER", shard(DIGITS)),
    "nested": ("ST-HEADER", shard(b'{"x":' + b"[" * 100_000)),
    "empty": ("ST-FORMAT", b""),
    "seven bytes": ("ST-FORMAT", bytes(7)),
    "length": ("ST-FORMAT", b"\xff" * 8 + bytes(20)),
    "long length": ("ST-FORMAT", (150_000).to_bytes(8, "little") + bytes(100_100)),
    "web page": ("ST-FORMAT", b"<html>" + bytes(100)),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_wrong_with_a_header_is_said_before_the_download(hub, single, kind):
    code, content = MALFORMED[kind]
    hub.put(REPO, single | {SINGLE: content})
    error = refused(code, SINGLE)
    assert error.file.startswith(REPO) and not hub.count(LARGE) and not hub.naps
    # A second look, of one or two requests each.
    assert hub.count(HEADER) == (0 if kind == "empty" else 4 if kind == "nested" else 2)


def test_long_headers_take_two_requests(hub, single):
    """And spaces behind the text are no reason to refuse one."""
    content = single[SINGLE]
    length = int.from_bytes(content[:8], "little")
    hub.put(REPO, single | {SINGLE: shard(content[8 : 8 + length] + b" " * 200_000, content[8 + length :])})
    model = eqx_moe.from_pretrained(REPO)
    assert weights(model) == weights(tiny.model(seed=3))
    assert hub.count(HEADER) == 2 and hub.count(HEADER + "99999$") == 1


@pytest.mark.parametrize("size", [2**62, 2**70])
def test_a_size_that_cannot_be(hub, single, size):
    hub.put(REPO, single)
    hub.sizes[SINGLE] = size
    refused("HUB-FILE", str(size), SINGLE)


def test_a_server_that_knows_no_ranges(hub, single):
    hub.ranges = False
    hub.put(REPO, single)
    assert weights(eqx_moe.from_pretrained(REPO)) == weights(tiny.model(seed=3))


def test_a_header_that_does_not_arrive(hub, single):
    hub.put(REPO, single)
    hub.fault(HEADER, "status", status=200, times=10**6)
    refused("HUB-OFFLINE")
    assert hub.count(HEADER) == 5


@pytest.mark.parametrize("change", ["wrong shard", "ghost", "unlisted"])
def test_an_index_that_disagrees_with_the_shards_is_found_before_the_download(hub, tmp_path, change):
    files = files_of(tmp_path, seed=3)
    index = json.loads(files[INDEX])
    shards = list(index["weight_map"].values())
    tensor, shard = next(each for each in index["weight_map"].items() if shards.count(each[1]) > 1)
    index["weight_map"] |= {"ghost" if change == "ghost" else tensor: next(s for s in SHARDS if s != shard)}
    if change == "unlisted":
        del index["weight_map"][tensor]
    hub.put(REPO, files | {INDEX: json.dumps(index).encode()})
    error = refused("IDX-MISMATCH", "ghost" if change == "ghost" else tensor)
    assert error.file.startswith(REPO) and error.file.endswith(INDEX)
    assert not hub.count(LARGE) and hub.count(HEADER) == 2 * len(SHARDS)
    hub.put(REPO, files)
    assert weights(eqx_moe.from_pretrained(REPO)) == weights(tiny.model(seed=3))


def test_names_of_files_that_are_none(hub, tmp_path):
    """Then the reader of the index says what is wrong with it."""
    files = files_of(tmp_path, seed=3)
    index = json.loads(files[INDEX])
    index["weight_map"] |= {next(iter(index["weight_map"])): 3}
    hub.put(REPO, files | {INDEX: json.dumps(index).encode()})
    refused("IDX-MAP")
    assert not hub.count(LARGE) and not hub.count(HEADER)
