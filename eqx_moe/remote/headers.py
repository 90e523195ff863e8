"""Headers of files of weights on the Hub: a range of bytes is asked for, not the file."""

import io
import tempfile
from typing import Any

from eqx_moe.checkpoint.header import Entry, read_header
from eqx_moe.errors import CheckpointError
from eqx_moe.remote.client import SENDER, TIMEOUT, retrying

# How many bytes are asked for first, which is all of most headers, and how many at most. A longer header is refused for
# its length.
_FIRST, _LONGEST = 100_000, 100_000_008


def remote_header(client: Any, repo: str, commit: str, shard: str, size: int, place: str) -> dict[str, Entry]:
    """The header of a file of a repo, by the checks that the whole file will have to pass.

    `HfApi.parse_safetensors_file_metadata` checks neither shapes nor offsets, and ends some malformed headers with an
    error of Python's own.

    Args:
        size: bytes of the file, as the Hub lists it.
        place: stands for the file in errors.

    Raises:
        CheckpointError: ST-* codes, as `read_header`; HUB-FILE for a size that cannot be.
    """
    with tempfile.TemporaryFile(buffering=0) as file:
        try:
            file.truncate(size)  # As long as the file, without taking up its room: the rest is a hole.
        except (OSError, OverflowError) as error:
            raise CheckpointError(
                code="HUB-FILE",
                doing="reading a header from the Hub",
                file=place,
                expected="a size that there can be",
                found=f"{size} bytes",
                fix="name another repo",
            ) from error
        if size:
            retrying(lambda: _first_bytes(client, repo, commit, shard, min(size, _FIRST), file))
        file.seek(0)
        needed = 8 + int.from_bytes(file.read(8), "little")
        if _FIRST < needed <= min(size, _LONGEST):
            retrying(lambda: _first_bytes(client, repo, commit, shard, needed, file))
        return read_header(file, place)


def _first_bytes(client: Any, repo: str, commit: str, shard: str, count: int, file: io.FileIO) -> None:
    """Writes the first bytes of a file of the repo, which has as many, to the start of `file`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, httpx

    url = hf_hub_url(repo, shard, revision=commit, endpoint=client.endpoint)
    headers = build_hf_headers(token=client.token, **SENDER)
    headers |= {"range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    file.seek(0)
    came = 0
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=TIMEOUT, retry_on_exceptions=(), retry_on_status_codes=()
    ) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            file.write(piece[: count - came])
            came += len(piece)
            if came > count:  # Who knows no ranges sends the whole file.
                break
    if came < count:
        raise httpx.RemoteProtocolError(f"{came} of {count} bytes came")
