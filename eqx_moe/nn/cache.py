"""The key-value cache of a decoder."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eqx_moe.sharding import cache_sharding, put


class LayerCache(eqx.Module):
    """Keys and values of one attention layer, a place of the row each.

    Heads come before places: a head's keys then lie together, and a decoding step reads them as they lie.
    """

    keys: Float[Array, "batch kv_heads length head_dim"]
    values: Float[Array, "batch kv_heads length head_dim"]

    def write(
        self,
        keys: Float[Array, "batch kv_heads seq head_dim"],
        values: Float[Array, "batch kv_heads seq head_dim"],
        at: Int[Array, ""],
    ) -> "LayerCache":
        """Puts them at the places from `at` on, where they must fit."""

        def write(cache: LayerCache) -> LayerCache:
            return LayerCache(
                keys=lax.dynamic_update_slice_in_dim(cache.keys, keys.astype(cache.keys.dtype), at, axis=2),
                values=lax.dynamic_update_slice_in_dim(cache.values, values.astype(cache.values.dtype), at, axis=2),
            )

        def write_apart(cache: LayerCache) -> LayerCache:
            return lax.cond(at + keys.shape[2] <= cache.keys.shape[2], write, lambda cache: cache, cache)

        # XLA's CPU back end fuses the write with what reads the cache, does it twice, and copies the whole cache for
        # that at every step. It fuses nothing into a conditional. Elsewhere a conditional would wait for the host.
        return lax.platform_dependent(self, cpu=write_apart, default=write)


class Cache(eqx.Module):
    """What a decoder remembers of the places that it has seen; all rows advance together.

    `segments` holds the segment id of every place (0: padding, or not written yet), so that left padding and packed
    rows stay apart in later calls too. `lengths` are the lengths, in tokens, that rotary embeddings which depend on a
    row's length go by.
    """

    layers: tuple[LayerCache, ...]
    segments: Int[Array, "batch length"]
    filled: Int[Array, ""]
    lengths: Int[Array, " batch"]

    def __init__(
        self,
        shapes: tuple[tuple[int, int], ...],
        batch: int,
        length: int,
        dtype: DTypeLike,
        mesh: Mesh | None = None,
    ):
        """`shapes` gives (kv_heads, head_dim) of each layer. On a mesh the rows are split like those of a batch."""
        self.layers = tuple(
            LayerCache(
                *(
                    jnp.zeros((batch, kv_heads, length, head_dim), dtype, device=cache_sharding(mesh, batch, kv_heads))
                    for _ in ("keys", "values")
                )
            )
            for kv_heads, head_dim in shapes
        )
        self.segments = put(jnp.zeros((batch, length), jnp.int32), mesh, rows=True)
        self.filled = put(jnp.zeros((), jnp.int32), mesh)
        self.lengths = put(jnp.full(batch, length, jnp.int32), mesh, rows=True)

    @property
    def length(self) -> int:
        return self.segments.shape[1]
