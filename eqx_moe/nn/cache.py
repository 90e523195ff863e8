"""The key-value cache of a decoder."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eqx_moe.sharding import cache_sharding, put


class LayerCache(eqx.Module):
    """Keys and values of one attention layer, a place of the row each."""

    keys: Float[Array, "batch length kv_heads head_dim"]
    values: Float[Array, "batch length kv_heads head_dim"]

    def write(
        self,
        keys: Float[Array, "batch seq kv_heads head_dim"],
        values: Float[Array, "batch seq kv_heads head_dim"],
        at: Int[Array, ""],
    ) -> "LayerCache":
        return LayerCache(
            keys=lax.dynamic_update_slice_in_dim(self.keys, keys.astype(self.keys.dtype), at, axis=1),
            values=lax.dynamic_update_slice_in_dim(self.values, values.astype(self.values.dtype), at, axis=1),
        )


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
                    jnp.zeros((batch, length, *shape), dtype, device=cache_sharding(mesh, batch, shape[0]))
                    for _ in ("keys", "values")
                )
            )
            for shape in shapes
        )
        self.segments = put(jnp.zeros((batch, length), jnp.int32), mesh, rows=True)
        self.filled = put(jnp.zeros((), jnp.int32), mesh)
        self.lengths = put(jnp.full(batch, length, jnp.int32), mesh, rows=True)

    @property
    def length(self) -> int:
        return self.segments.shape[1]
