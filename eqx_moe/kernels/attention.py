"""Masked attention over places in a row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
    query_places: Int[Array, " queries"],
    key_places: Int[Array, " keys"],
    query_segments: Int[Array, "batch queries"],
    key_segments: Int[Array, "batch keys"],
    window: int | None,
) -> Bool[Array, "batch queries keys"]:
    """Which keys a query sees: those at or before its place, less than `window` places back, and in its segment.

    A window of W thus holds W keys, the query's own among them.
    """
    back = query_places[:, None] - key_places[None, :]
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return near & (query_segments[:, :, None] == key_segments[:, None, :])


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch queries keys"],
    *,
    scale: float,
) -> Float[Array, "batch queries heads head_dim"]:
    """Scaled dot-product attention; query head h reads key-value head `h // (heads / kv_heads)`.

    Scores and softmax are float32, the result has the dtype of `q`. A query that sees no key gets the mean of all
    values: finite, and of no use. Memory grows with queries x keys.
    """
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, queries, heads, head_dim)
