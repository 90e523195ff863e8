"""Attention on TPU, by the Pallas kernel that comes with JAX ("splash attention").

What is ours is the fit: lengths that are no multiple of a block, packed rows, sinks, and rows and heads that lie on
several devices, over which XLA could not split a kernel that it cannot look into.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

# The tiles of the kernel are multiples of as many places as a register has lanes; the largest is what MaxText uses.
_LANES, _LARGEST = 128, 512


def splash_attention(
    q: Float[Array, "batch heads seq head_dim"],
    k: Float[Array, "batch kv_heads seq head_dim"],
    v: Float[Array, "batch kv_heads seq value_dim"],
    *,
    scale: float,
    window: int | None = None,
    query_segments: Int[Array, "batch seq"] | None = None,
    key_segments: Int[Array, "batch seq"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    sharding: NamedSharding | None = None,
    interpret: bool = False,
) -> Float[Array, "batch heads seq value_dim"]:
    """What `attention_oracle` computes, with its arguments, for keys that are the queries' own.

    `sharding` is how rows and heads are spread over devices, as for `attention`. `interpret` runs the kernel without a
    TPU, slowly.
    """
    local = functools.partial(_local, scale=scale, window=window, interpret=interpret)
    if sharding is None:
        return local(q, k, v, query_segments, key_segments, sinks)
    rows, heads = sharding.spec[:2]
    specs = (*[P(rows, heads)] * 3, *[P(rows)] * 2, P(heads))
    # Unchecked, because the kernel does not say over which axes its output varies.
    spread = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=P(rows, heads), check_vma=False)
    return spread(q, k, v, query_segments, key_segments, sinks)


def _local(q, k, v, query_segments, key_segments, sinks, *, scale: float, window: int | None, interpret: bool):
    """One device's rows and heads."""
    seq = q.shape[2]
    # Places beyond the end come after every query, so that causality hides them.
    q, k, v = (_padded(x, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    segments = None
    if query_segments is not None:
        segments = pallas.SegmentIds(q=_padded(query_segments, 1), kv=_padded(key_segments, 1))
    kernel = _kernel(q.shape[1], q.shape[2], window, interpret)
    over_rows = (0, 0, 0, None if segments is None else 0, None)
    return jax.vmap(kernel, in_axes=over_rows)(q, k, v, segments, sinks)[:, :, :seq]


@functools.lru_cache(maxsize=16)
def _kernel(heads: int, seq: int, window: int | None, interpret: bool):
    """The kernel and its tables of the mask, which take seconds to make for long rows: once for all layers."""
    mask = pallas.CausalMask((seq, seq)) if window is None else pallas.LocalMask((seq, seq), (window - 1, 0), offset=0)
    size = max(block for block in range(_LANES, _LARGEST + 1, _LANES) if seq % block == 0)
    sizes = pallas.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    masks = pallas.MultiHeadMask([mask] * heads)
    with jax.ensure_compile_time_eval():  # arrays that outlive the program being traced
        return pallas.make_splash_mha(masks, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)


def _padded(x, axis: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % _LANES)
    return jnp.pad(x, widths)
