"""Grouped-query attention."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqx_moe.kernels.attention import attention
from eqx_moe.nn.cache import LayerCache
from eqx_moe.nn.linear import Linear
from eqx_moe.nn.norm import RMSNorm
from eqx_moe.nn.rope import AbstractRope, rotate


class Rows(eqx.Module):
    """Where the tokens of one call stand, the same for every layer.

    Without a cache `start` is None and attention reads the tokens themselves; with one the first token stands at
    `start`, and attention reads all places of the cache. `key_segments` are the segments of what it reads; None: they
    are all in one segment, and none is padding.
    """

    segments: Int[Array, "batch seq"]
    start: Int[Array, ""] | None
    key_segments: Int[Array, "batch keys"] | None


class Attention(eqx.Module):
    """Grouped-query attention (Ainslie et al. 2023); optional biases, q/k norm per head, rotary, window."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    heads: int = eqx.field(static=True)
    kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    rope: AbstractRope = eqx.field(static=True)
    window: int | None = eqx.field(static=True)

    def __init__(
        self,
        hidden: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: AbstractRope,
        window: int | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm_eps: float | None = None,
        std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        """`qk_norm_eps`: None for no norm on queries and keys. A window of W holds W keys, the query's own included."""
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.q = Linear(hidden, heads * head_dim, bias=qkv_bias, std=std, dtype=dtype, key=q_key)
        self.k = Linear(hidden, kv_heads * head_dim, bias=qkv_bias, std=std, dtype=dtype, key=k_key)
        self.v = Linear(hidden, kv_heads * head_dim, bias=qkv_bias, std=std, dtype=dtype, key=v_key)
        self.o = Linear(heads * head_dim, hidden, bias=o_bias, std=std, dtype=dtype, key=o_key)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps, dtype=dtype)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps, dtype=dtype)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope, self.window = rope, window

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rows: Rows,
        tables: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], LayerCache | None]:
        """`tables` are those of `self.rope`. With a cache, writes the tokens' keys and values to it and reads all."""
        batch, seq, _ = x.shape
        q = self.q(x).reshape(batch, seq, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, seq, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, seq, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, tables), rotate(k, tables)
        q, k, v = (heads.swapaxes(1, 2) for heads in (q, k, v))
        if cache is not None:
            assert rows.start is not None
            cache = cache.write(k, v, rows.start)
            k, v = cache.keys, cache.values
        out = attention(
            q,
            k,
            v,
            scale=self.head_dim**-0.5,
            start=rows.start,
            window=self.window,
            query_segments=None if rows.key_segments is None else rows.segments,
            key_segments=rows.key_segments,
        )
        return self.o(out.swapaxes(1, 2).reshape(batch, seq, self.heads * self.head_dim)), cache


def segment_layout(segments: Int[Array, "batch seq"]) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
    """For every token, how many tokens of its segment stand before it, and how many its segment has in all.

    By sorting, so that memory stays linear in the length of a row.
    """
    order = jnp.argsort(segments, axis=1, stable=True)
    ordered = jnp.take_along_axis(segments, order, axis=1)
    change = ordered[:, 1:] != ordered[:, :-1]
    edge = jnp.ones((segments.shape[0], 1), bool)
    index = jnp.arange(segments.shape[1])
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, change], axis=1), index, 0), axis=1)
    last = jnp.where(jnp.concatenate([change, edge], axis=1), index, segments.shape[1])
    last = jax.lax.cummin(last, axis=1, reverse=True)
    back = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(index - first, back, axis=1), jnp.take_along_axis(last - first + 1, back, axis=1)
