"""Grouped-query attention."""

from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqx_moe.kernels.attention import attention
from eqx_moe.nn.cache import AnyCache, LayerCache, empty
from eqx_moe.nn.linear import Linear
from eqx_moe.nn.norm import RMSNorm
from eqx_moe.nn.rope import AbstractRope, rotate
from eqx_moe.sharding import heads_sharding


class Rows(eqx.Module):
    """Where the tokens of one call stand, the same for every layer.

    Without a cache `start` is None and attention reads the tokens themselves; with one the first token stands at
    `start`, and attention reads all places of the cache. `key_segments` are the segments of what it reads; None: they
    are all in one segment, and none is padding. `mesh` is the model's.
    """

    segments: Int[Array, "batch seq"]
    start: Int[Array, ""] | None
    key_segments: Int[Array, "batch keys"] | None
    mesh: Mesh | None = eqx.field(static=True, default=None)

    def attend(
        self,
        q: Float[Array, "batch heads seq head_dim"],
        k: Float[Array, "batch kv_heads keys head_dim"],
        v: Float[Array, "batch kv_heads keys value_dim"],
        *,
        scale: float,
        window: int | None = None,
        sinks: Float[Array, " heads"] | None = None,
    ) -> Float[Array, "batch heads seq value_dim"]:
        """`eqx_moe.kernels.attention.attention` over these rows."""
        return attention(
            q,
            k,
            v,
            scale=scale,
            start=self.start,
            window=window,
            query_segments=None if self.key_segments is None else self.segments,
            key_segments=self.key_segments,
            sinks=sinks,
            sharding=heads_sharding(self.mesh, q.shape[0], q.shape[1]),
        )


class Attention(eqx.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary embedding; all else is optional.

    `sinks` holds a logit for each query head that takes part in its softmax and adds no value (gpt-oss, 2025).
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    sinks: Float[Array, " heads"] | None
    heads: int = eqx.field(static=True)
    kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    rope: AbstractRope = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    qk_norm: Literal["head", "all"] | None = eqx.field(static=True)
    clip: float | None = eqx.field(static=True)

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
        qk_norm: Literal["head", "all"] | None = None,
        qk_norm_eps: float = 1e-6,
        clip: float | None = None,
        sinks: bool = False,
        std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        """
        Args:
            window: how many keys a query sees, the one at its own place included; None for all.
            qk_norm: what a norm on queries and keys goes over: one head, or all of them together.
            clip: queries, keys and values are cut off at so much on either side, after the norm.
            sinks: whether there are any; they start as zero.
        """
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.q = Linear(hidden, heads * head_dim, bias=qkv_bias, std=std, dtype=dtype, key=q_key)
        self.k = Linear(hidden, kv_heads * head_dim, bias=qkv_bias, std=std, dtype=dtype, key=k_key)
        self.v = Linear(hidden, kv_heads * head_dim, bias=qkv_bias, std=std, dtype=dtype, key=v_key)
        self.o = Linear(heads * head_dim, hidden, bias=o_bias, std=std, dtype=dtype, key=o_key)
        sizes = {None: (None, None), "head": (1, 1), "all": (heads, kv_heads)}[qk_norm]
        self.q_norm, self.k_norm = (
            None if size is None else RMSNorm(size * head_dim, eps=qk_norm_eps, dtype=dtype) for size in sizes
        )
        self.sinks = jnp.zeros(heads, dtype) if sinks else None
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope, self.window, self.qk_norm, self.clip = rope, window, qk_norm, clip

    @property
    def head_sizes(self) -> Mapping[str, int]:
        """Linear map -> the size of the heads that its weight is made of."""
        return dict.fromkeys("qkvo", self.head_dim)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike, mesh: Mesh | None) -> LayerCache:
        shape = (batch, self.kv_heads, length, self.head_dim)
        place = heads_sharding(mesh, batch, self.kv_heads)
        return LayerCache(empty(shape, dtype, place), empty(shape, dtype, place))

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rows: Rows,
        tables: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
        cache: AnyCache | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], LayerCache | None]:
        """`tables` are those of `self.rope`. With a cache, writes the tokens' keys and values to it and reads all."""
        batch, seq, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "all":
            q, k = self._normed(q, k)
        if self.clip is not None:
            q, k, v = (jnp.clip(wide, -self.clip, self.clip) for wide in (q, k, v))
        q, k, v = (wide.reshape(batch, seq, -1, self.head_dim) for wide in (q, k, v))
        if self.qk_norm == "head":
            q, k = self._normed(q, k)
        q, k = rotate(q, tables), rotate(k, tables)
        q, k, v = (heads.swapaxes(1, 2) for heads in (q, k, v))
        if cache is not None:
            assert rows.start is not None and isinstance(cache, LayerCache)
            cache = cache.write(k, v, rows.start)
            k, v = cache.keys, cache.values
        out = rows.attend(q, k, v, scale=self.head_dim**-0.5, window=self.window, sinks=self.sinks)
        return self.o(out.swapaxes(1, 2).reshape(batch, seq, self.heads * self.head_dim)), cache

    def _normed(self, q, k):
        assert self.q_norm is not None and self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)


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
