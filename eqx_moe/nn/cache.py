"""The key-value cache of a decoder."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from eqx_moe.sharding import put


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

        return _write(self, write, at + keys.shape[2] <= self.keys.shape[2])


class LatentCache(eqx.Module):
    """What multi-head latent attention remembers: of each place one latent and one rotated key, for all heads."""

    entries: Float[Array, "batch length width"]

    def write(self, entries: Float[Array, "batch seq width"], at: Int[Array, ""]) -> "LatentCache":
        """Puts them at the places from `at` on, where they must fit."""

        def write(cache: LatentCache) -> LatentCache:
            new = entries.astype(cache.entries.dtype)
            return LatentCache(lax.dynamic_update_slice_in_dim(cache.entries, new, at, axis=1))

        return _write(self, write, at + entries.shape[1] <= self.entries.shape[1])


#: What a layer remembers: each kind of attention makes its own kind.
AnyCache = LayerCache | LatentCache
Some = TypeVar("Some", LayerCache, LatentCache)


def _write(cache: Some, write: Callable[[Some], Some], fits: Bool[Array, ""]) -> Some:
    def write_apart(cache: Some) -> Some:
        return lax.cond(fits, write, lambda cache: cache, cache)

    # XLA's CPU back end fuses the write with what reads the cache, does it twice, and copies the whole cache for that
    # at every step. It fuses nothing into a conditional. Elsewhere a conditional would wait for the host.
    return lax.platform_dependent(cache, cpu=write_apart, default=write)


def empty(shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding | None) -> Float[Array, "..."]:
    """Zeros that lie as `sharding` says, in a program too, where `jnp.zeros` takes no notice of it."""
    zeros = jnp.zeros(shape, dtype, device=sharding)
    return lax.with_sharding_constraint(zeros, sharding) if sharding and isinstance(zeros, Tracer) else zeros


class Cache(eqx.Module):
    """What a decoder remembers of the places that it has seen; all rows advance together.

    `segments` holds the segment id of every place (0: padding, or not written yet), so that left padding and packed
    rows stay apart in later calls too. `lengths` are the lengths, in tokens, that rotary embeddings which depend on a
    row's length go by.
    """

    layers: tuple[AnyCache, ...]
    segments: Int[Array, "batch length"]
    filled: Int[Array, ""]
    lengths: Int[Array, " batch"]

    def __init__(self, layers: tuple[AnyCache, ...], batch: int, length: int, mesh: Mesh | None = None):
        """Around the empty caches of the layers. On a mesh the rows are split like those of a batch."""
        self.layers = layers
        self.segments = put(jnp.zeros((batch, length), jnp.int32), mesh, rows=True)
        self.filled = put(jnp.zeros((), jnp.int32), mesh)
        self.lengths = put(jnp.full(batch, length, jnp.int32), mesh, rows=True)

    @property
    def length(self) -> int:
        return self.segments.shape[1]
