"""Attention on TPU, by the Pallas kernel that comes with JAX ("splash attention").

What is ours is the fit: lengths that are no multiple of a block, packed rows, sinks, and rows and heads that lie on
several devices, over which XLA could not split a kernel that it cannot look into.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

# A register has so many lanes, and the kernel's blocks are multiples of it. Of these, large ones are the faster.
_LANES, _BLOCKS = 128, (512, 384, 256)


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

    `sharding` is how the rows and heads of `q` are spread over devices, as for `attention`. `interpret` runs the kernel
    without a TPU, slowly.
    """
    local = functools.partial(_local, scale=scale, window=window, interpret=interpret)
    if sharding is None:
        return local(q, k, v, query_segments, key_segments, sinks)
    rows, heads = sharding.spec[:2]
    if heads is not None:
        # Each device needs the key-value heads of its own query heads: as often as it takes, they are there twice.
        parts, kv_heads = sharding.mesh.shape[heads], k.shape[1]
        copies = parts // math.gcd(parts, kv_heads)
        if q.shape[1] % (kv_heads * copies):
            heads = None
        elif copies > 1:
            k, v = jnp.repeat(k, copies, axis=1), jnp.repeat(v, copies, axis=1)
    specs = (*[P(rows, heads)] * 3, *[P(rows)] * 2, P(heads))
    # Unchecked, because the kernel does not say over which axes its output varies.
    spread = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=P(rows, heads), check_vma=False)
    return spread(q, k, v, query_segments, key_segments, sinks)


def _local(q, k, v, query_segments, key_segments, sinks, *, scale: float, window: int | None, interpret: bool):
    """One device's rows and heads."""
    seq, block = q.shape[2], _block(q.shape[2])
    # Places beyond the end come after every query, so that causality hides them.
    q, k, v = (_padded(x, 2, block) for x in ((q.astype(jnp.float32) * scale).astype(q.dtype), k, v))
    segments = None
    if query_segments is not None:
        segments = pallas.SegmentIds(q=_padded(query_segments, 1, block), kv=_padded(key_segments, 1, block))
    if sinks is not None:
        sinks = sinks.astype(q.dtype)  # The kernel's gradient has this dtype.
    kernel = _kernel(q.shape[1], q.shape[2], block, window, interpret)
    over_rows = (0, 0, 0, None if segments is None else 0, None)
    out: Any = jax.vmap(kernel, in_axes=over_rows)(q, k, v, segments, sinks)
    return out[:, :, :seq]


def _block(seq: int) -> int:
    """The places of a block: those that leave the least of the last one empty."""
    if seq <= _BLOCKS[-1]:
        return -(-seq // _LANES) * _LANES
    return min(_BLOCKS, key=lambda block: -seq % block)


@functools.lru_cache(maxsize=16)
def _kernel(heads: int, seq: int, block: int, window: int | None, interpret: bool):
    """The kernel and its tables of the mask, which take seconds to make for long rows: once for all layers.

    The tables are NumPy's, so that they belong to no mesh and to no program that is being traced.
    """
    mask = pallas.CausalMask((seq, seq)) if window is None else pallas.LocalMask((seq, seq), (window - 1, 0), offset=0)
    masks = pallas.MultiHeadMask([mask] * heads)
    forward, function = tables.process_mask(masks, (block, block))
    backward, _ = tables.process_mask_dkv(masks, (block, block))
    sizes = pallas.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=function,
        interpret=interpret,
    )


def _padded(x, axis: int, multiple: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
