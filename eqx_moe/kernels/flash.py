"""Attention over one chunk of queries and one of keys at a time: memory is linear in the length, on every platform.

The softmax is accumulated online (Milakov and Gimelshein 2018); the backward pass computes the scores again from each
row's log-sum-exp (Dao et al. 2022, "FlashAttention", algorithms 2 and 4).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# A chunk's scores are batch x heads x CHUNK x CHUNK float32. Measured on CPU: 128 and 512 are both slower.
CHUNK = 256

# The maximum of a row that has seen no key yet: below every score, and finite, so that differences are.
LOWEST = -1e30


def flash_attention(
    q: Float[Array, "batch heads queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys value_dim"],
    *,
    scale: float,
    start: Int[Array, ""] | None = None,
    window: int | None = None,
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch heads queries value_dim"]:
    """What `attention_oracle` computes, with its arguments.

    Reverse-mode differentiable in `q`, `k`, `v` and `sinks`; kept for that are these, the output and one float32 per
    query and head. Chunks that causality or the window masks as a whole are not visited: T tokens cost T x T / 2,
    with a window of W they cost T x W, and the end of a cache that is not filled yet costs nothing.
    """
    cut = _Cut(min(CHUNK, q.shape[2]), min(CHUNK, k.shape[2]), -(-k.shape[2] // CHUNK), scale, window)
    start = jnp.zeros((), jnp.int32) if start is None else start
    return _flash(q, k, v, sinks, start, query_segments, key_segments, cut)


class _Cut(NamedTuple):
    """The sizes of a query chunk and of a key chunk, how many of the latter there are, and what scores go by."""

    query: int
    key: int
    key_chunks: int
    scale: float
    window: int | None

    def met_by(self, i, start):
        """Of the keys that some query of chunk `i` sees: their first chunk, and the one after their last."""
        place = start + i * self.query
        end = jnp.minimum((place + self.query - 1) // self.key + 1, self.key_chunks)
        if self.window is None:
            return 0, end
        return jnp.maximum(place - self.window + 1, 0) // self.key, end

    def scores(self, q, k, i, j, start, query_segments, key_segments):
        """Scores of query chunk `i` with key chunk `j`, [batch, kv_heads, group, query, key]; -inf where masked.

        `q` and `k` are the chunks, the segments are those of all chunks.
        """
        scores = jnp.einsum("bgrqd,bgkd->bgrqk", q, k, preferred_element_type=jnp.float32) * self.scale
        if query_segments is not None:
            query_segments, key_segments = _take(query_segments, i, self.query, 1), _take(key_segments, j, self.key, 1)
        place = start + i * self.query + jnp.arange(self.query)
        seen = visible(place, j * self.key + jnp.arange(self.key), self.window, query_segments, key_segments)
        return jnp.where(seen, scores, -jnp.inf)


def visible(query_places, key_places, window: int | None, query_segments, key_segments):
    """Which keys a query sees: those at or before its place, less than `window` places back, and in its segment.

    A window of W thus holds W keys, the query's own among them. The result broadcasts to [batch, kv_heads, group,
    queries, keys].
    """
    back = query_places[:, None] - key_places[None, :]
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    if query_segments is None:
        return seen
    return (seen & (query_segments[:, :, None] == key_segments[:, None, :]))[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _flash(q, k, v, sinks, start, query_segments, key_segments, cut: _Cut):
    return _forward(q, k, v, sinks, start, query_segments, key_segments, cut)[0]


def _flash_fwd(q, k, v, sinks, start, query_segments, key_segments, cut: _Cut):
    out, logsumexp = _forward(q, k, v, sinks, start, query_segments, key_segments, cut)
    return out, (q, k, v, sinks, start, query_segments, key_segments, out, logsumexp)


def _flash_bwd(cut: _Cut, residuals, d_out):
    return *_backward(*residuals, d_out, cut), None, None, None


_flash.defvjp(_flash_fwd, _flash_bwd)


@functools.partial(jax.jit, static_argnames="cut")
def _forward(q, k, v, sinks, start, query_segments, key_segments, cut: _Cut):
    """The output, and the logarithm of every softmax denominator, [batch, heads, queries] in float32."""
    batch, heads, queries, _ = q.shape
    q, (k, v) = _grouped(q, k.shape[1], cut), (_padded(x, 2, cut.key) for x in (k, v))
    query_segments, key_segments = _padded_segments(query_segments, key_segments, cut)

    def query_chunk(_, i):
        q_i = _take(q, i, cut.query, 3)
        zero = _zeros_like(q_i[..., 0])  # [batch, kv_heads, group, query]
        if sinks is None:
            total, top = zero, zero + LOWEST
        else:  # A sink is one more logit, already seen, whose value is zero.
            total, top = zero + 1.0, zero + sinks.astype(jnp.float32).reshape(*q_i.shape[1:3], 1)

        def visit(j, state):
            total, top, out = state
            k_j, v_j = _take(k, j, cut.key, 2), _take(v, j, cut.key, 2)
            scores = cut.scores(q_i, k_j, i, j, start, query_segments, key_segments)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            values = jnp.einsum("bgrqk,bgkd->bgrqd", weights.astype(v.dtype), v_j, preferred_element_type=jnp.float32)
            return total * shrink + jnp.sum(weights, axis=-1), new_top, out * shrink[..., None] + values

        state = total, top, zero[..., None] * jnp.zeros(v.shape[-1])
        total, top, out = lax.fori_loop(*cut.met_by(i, start), visit, state)
        empty = total == 0
        out = out / jnp.where(empty, 1.0, total)[..., None]
        return None, (out.astype(q.dtype), jnp.where(empty, 0.0, top + jnp.log(total)))

    _, (out, logsumexp) = lax.scan(query_chunk, None, jnp.arange(q.shape[3] // cut.query))
    return _ungrouped(out, heads, queries), _ungrouped(logsumexp, heads, queries)


@functools.partial(jax.jit, static_argnames="cut")
def _backward(q, k, v, sinks, start, query_segments, key_segments, out, logsumexp, d_out, cut: _Cut):
    """The gradients of q, k, v and sinks."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    # Each query's sum over keys of weight times its gradient (Dao et al. 2022, B.2, equation 4).
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(jnp.float32)[:, None] - logsumexp)
        d_sinks = -jnp.sum(weight * delta, axis=(0, 2)).astype(sinks.dtype)
    dtypes = q.dtype, k.dtype, v.dtype
    q, d_out, delta, logsumexp = (_grouped(x, kv_heads, cut) for x in (q, d_out, delta, logsumexp))
    k, v = (_padded(x, 2, cut.key) for x in (k, v))
    query_segments, key_segments = _padded_segments(query_segments, key_segments, cut)

    def query_chunk(gradients, i):
        q_i, d_out_i, delta_i, logsumexp_i = (_take(x, i, cut.query, 3) for x in (q, d_out, delta, logsumexp))

        def visit(j, gradients):
            d_q, d_k, d_v = gradients
            k_j, v_j = _take(k, j, cut.key, 2), _take(v, j, cut.key, 2)
            scores = cut.scores(q_i, k_j, i, j, start, query_segments, key_segments)
            weights = jnp.exp(scores - logsumexp_i[..., None])
            d_weights = jnp.einsum("bgrqd,bgkd->bgrqk", d_out_i, v_j, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta_i[..., None]) * cut.scale).astype(q.dtype)
            d_q += jnp.einsum("bgrqk,bgkd->bgrqd", d_scores, k_j, preferred_element_type=jnp.float32)
            d_k_j = jnp.einsum("bgrqk,bgrqd->bgkd", d_scores, q_i, preferred_element_type=jnp.float32)
            d_v_j = jnp.einsum(
                "bgrqk,bgrqd->bgkd", weights.astype(d_out.dtype), d_out_i, preferred_element_type=jnp.float32
            )
            return d_q, _add(d_k, d_k_j, j * cut.key), _add(d_v, d_v_j, j * cut.key)

        d_q, *gradients = lax.fori_loop(*cut.met_by(i, start), visit, (_zeros_like(q_i), *gradients))
        return tuple(gradients), d_q.astype(q.dtype)

    (d_k, d_v), d_q = lax.scan(query_chunk, (_zeros_like(k), _zeros_like(v)), jnp.arange(q.shape[3] // cut.query))
    d_k, d_v = d_k[:, :, :keys], d_v[:, :, :keys]
    gradients = (x.astype(dtype) for x, dtype in zip((_ungrouped(d_q, heads, queries), d_k, d_v), dtypes, strict=True))
    return *gradients, d_sinks


def _padded(x, axis: int, multiple: int, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def _padded_segments(query_segments, key_segments, cut: _Cut):
    if query_segments is None:
        return None, None
    return _padded(query_segments, 1, cut.query), _padded(key_segments, 1, cut.key)


def _grouped(x, kv_heads: int, cut: _Cut):
    """[batch, heads, queries, ...] to [batch, kv_heads, group, queries, ...], whole chunks of queries.

    Zeros in the place of missing queries are harmless: their scores, log-sum-exp and gradients are zero, so that their
    weights are finite and meet only zeros.
    """
    x = _padded(x, 2, cut.query)
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _ungrouped(chunks, heads: int, queries: int):
    """[chunks, batch, kv_heads, group, query, ...] to [batch, heads, queries, ...]."""
    x = jnp.moveaxis(chunks, 0, 3)
    x = x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :queries]
    return x.reshape(x.shape[0], heads, *x.shape[3:])


def _take(x, i, size: int, axis: int):
    return lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _zeros_like(x):
    """In float32, and on a mesh spread as `x` is: what a loop carries may not change its sharding."""
    return jnp.zeros_like(x, dtype=jnp.float32)


def _add(total, part, at):
    before = lax.dynamic_slice_in_dim(total, at, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(total, before + part, at, axis=2)
