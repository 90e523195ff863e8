"""Generating text: `generate` for batches, `stream` for one prompt, an id at a time."""

from eqx_moe.generation.decode import generate as generate
from eqx_moe.generation.decode import stream as stream
from eqx_moe.generation.text import decode_stream as decode_stream
