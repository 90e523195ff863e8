"""The decoder: blocks between an embedding and a head. Every model here is one."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from eqx_moe.kernels.linear import linear
from eqx_moe.nn.attention import Rows, segment_layout
from eqx_moe.nn.cache import AnyCache, Cache
from eqx_moe.nn.embedding import Embedding
from eqx_moe.nn.linear import Linear
from eqx_moe.nn.moe import LayerRouting, RouterStats
from eqx_moe.nn.norm import RMSNorm
from eqx_moe.nn.rope import AbstractRope
from eqx_moe.nn.stack import Stack, blocks_of
from eqx_moe.sharding import check_surroundings, gather_weights, split_rows


class RouterOutput(eqx.Module):
    """What the routers decided: one entry per MoE layer, in order; empty for a dense model."""

    logits: tuple[Float32[Array, "*batch seq experts"], ...]
    choices: tuple[Int[Array, "*batch seq k"], ...]
    weights: tuple[Float[Array, "*batch seq k"], ...]
    drops: tuple[Int[Array, ""], ...]
    stats: tuple[RouterStats, ...]


class Output(eqx.Module):
    """What `forward` returns. `hidden` is normalised: `unembed` turns it into logits."""

    hidden: Float[Array, "*batch seq hidden"]
    cache: Cache | None
    router: RouterOutput


class Decoder(eqx.Module):
    """A decoder-only language model.

    `layers` holds a block for each layer, or what `eqx_moe.stack` made of them. `config` and `generation_config` are
    what it was built from: hashable records that this class only carries. `mesh` is that of the devices which its
    weights are spread over, None for one device; see `eqx_moe.sharding`.
    """

    embed: Embedding
    # Of `Block`, and of `Stack` where stacked; `Any`, so that a program may take a block for granted.
    layers: tuple[Any, ...]
    norm: RMSNorm
    head: Linear | None
    config: Any = eqx.field(static=True)
    generation_config: Any = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True, default=None)

    def __call__(
        self,
        tokens: Int[Array, "*batch seq"],
        positions: Int[Array, "*batch seq"] | None = None,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> Float32[Array, "*batch seq vocab"]:
        """Next-token logits, float32. The arguments are those of `forward`."""
        return self.unembed(self.forward(tokens, positions, segment_ids).hidden)

    def forward(
        self,
        tokens: Int[Array, "*batch seq"],
        positions: Int[Array, "*batch seq"] | None = None,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        last_only: bool = False,
    ) -> Output:
        """Hidden states before the head, the advanced cache, and what the routers decided.

        Args:
            tokens: ids below the vocabulary size. Outside jit others are an error; under jit they give NaN.
            positions: rotary positions, by default counted from 0 in every segment (with a cache: from where it
                stands). They change nothing else: who sees whom goes by places in the row.
            segment_ids: tokens see only their own segment; 0 is padding, whose outputs are finite and mean nothing.
                All ones by default.
            cache: from `init_cache` or an earlier call; the tokens are taken as its next places. Without jit, an
                error if they do not fit; under jit the hidden states are then NaN.
            key: given in training only; the router's jitter draws from it.
            last_only: give `hidden` and `router` for the last place of each row alone, [*batch, 1, ...]: all that the
                prefill of a prompt needs, and less work in the last layer. Drops, in `stats` too, are those of all
                places.
        """
        if tokens.size == 0:
            raise ValueError(f"`tokens` must hold at least one token; got an array of shape {tokens.shape}.")
        for name, given in (("positions", positions), ("segment_ids", segment_ids)):
            # Of another shape and the same size they would be taken for other tokens'.
            if given is not None and given.shape != tokens.shape:
                raise ValueError(f"`{name}` must have the shape of `tokens`; got {given.shape} and {tokens.shape}.")
        _refuse_bad_ids(tokens, self.embed.weight.shape[0])
        if cache is not None:
            self._refuse_stacks("decode with a cache")
        shape = tokens.shape
        tokens = tokens.reshape(-1, shape[-1])
        if self.mesh is not None:
            tokens = split_rows(check_surroundings(tokens), self.mesh)
        if cache is not None and cache.segments.shape[0] != tokens.shape[0]:
            raise ValueError(f"`cache` is for {cache.segments.shape[0]} rows; got {tokens.shape[0]} rows of tokens.")
        if segment_ids is not None:
            segment_ids = split_rows(segment_ids.reshape(tokens.shape), self.mesh)
        rows, default_positions, lengths = _rows(tokens, segment_ids, cache, self.mesh)
        positions = default_positions if positions is None else positions.reshape(tokens.shape)

        tables = {rope: _tables(rope, positions, lengths) for rope in self._ropes()}
        x = split_rows(gather_weights(self.embed, self.mesh, at="embed")(tokens), self.mesh)
        keys = None if key is None else jax.random.split(key, self.depth)
        caches: list[AnyCache | None]
        caches = [None] * len(self.layers) if cache is None else list(cache.layers)
        routings: list[LayerRouting] = []
        first = 0
        for i, layer in enumerate(self.layers):
            blocks = blocks_of(layer)
            prepare = [
                functools.partial(gather_weights, mesh=self.mesh, at=f"layers.{i}{path}", head_sizes=self.head_sizes)
                for path in blocks
            ]
            table = [tables[block.attention.rope] for block in blocks.values()]
            if isinstance(layer, Stack):
                own = None if keys is None else keys[first : first + layer.count]
                x, some = layer(x, rows, table, own, prepare, functools.partial(split_rows, mesh=self.mesh))
                routings += some
                first += layer.count
                continue
            key = None if keys is None else keys[first]
            narrow = last_only and i == len(self.layers) - 1
            x, caches[i], routing = prepare[0](layer)(x, rows, table[0], caches[i], key, narrow)
            x = split_rows(x, self.mesh)
            routings += [] if routing is None else [routing]
            first += 1
        mask = rows.segments != 0
        if last_only:
            shape = (*shape[:-1], 1)
            x, mask, routings = x[:, -1:], mask[:, -1:], [routing.last() for routing in routings]
        hidden = self.norm(x)
        if cache is not None:
            hidden = jnp.where(cache.filled + tokens.shape[1] <= cache.length, hidden, jnp.nan)
            cache = eqx.tree_at(
                lambda c: (c.layers, c.segments, c.filled),
                cache,
                (tuple(caches), rows.key_segments, cache.filled + tokens.shape[1]),
            )
        return Output(
            hidden=hidden.reshape(*shape, -1),
            cache=cache,
            router=RouterOutput(
                logits=tuple(routing.logits.reshape(*shape, -1) for routing in routings),
                choices=tuple(routing.choices.reshape(*shape, -1) for routing in routings),
                weights=tuple(routing.weights.reshape(*shape, -1) for routing in routings),
                drops=tuple(routing.drops for routing in routings),
                stats=tuple(RouterStats(routing, mask) for routing in routings),
            ),
        )

    def unembed(self, hidden: Float[Array, "*batch hidden"]) -> Float32[Array, "*batch vocab"]:
        """Logits of hidden states, float32."""
        return linear(hidden, self.unembedding, jnp.float32)

    @property
    def unembedding(self) -> Float[Array, "vocab hidden"]:
        """What `unembed` multiplies with: the head's weight, or with tied embeddings the embedding's."""
        if self.head is None:
            return gather_weights(self.embed, self.mesh, at="embed").weight
        return gather_weights(self.head, self.mesh, at="head").weight

    @property
    def head_sizes(self) -> dict[str, int]:
        """The path of each linear map that is made of heads -> the size of these, for `eqx_moe.sharding`."""
        return {
            f"layers.{i}{path}.attention.{name}": size
            for i, layer in enumerate(self.layers)
            for path, block in blocks_of(layer).items()
            for name, size in block.attention.head_sizes.items()
        }

    @property
    def depth(self) -> int:
        """How many layers there are, those in stacks counted one by one."""
        return sum(layer.count if isinstance(layer, Stack) else 1 for layer in self.layers)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` places, in the dtype of the embedding.

        Rotary embeddings that go by a row's length take it from `cache.lengths`, which starts as `length` for every
        row: with them, make the cache as long as the rows will be, or set `lengths` to what they will be.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"`batch` and `length` must be at least 1; got {batch=} and {length=}.")
        self._refuse_stacks("make a cache")
        dtype = self.embed.weight.dtype
        layers = tuple(layer.attention.init_cache(batch, length, dtype, self.mesh) for layer in self.layers)
        return Cache(layers, batch, length, self.mesh)

    def _ropes(self) -> set[AbstractRope]:
        return {block.attention.rope for layer in self.layers for block in blocks_of(layer).values()}

    def _refuse_stacks(self, doing: str) -> None:
        stacks = sum(isinstance(layer, Stack) for layer in self.layers)
        if stacks:
            raise ValueError(
                f"To {doing}, a model must have each layer on its own; got {stacks} stacks for {self.depth} layers. "
                "Take `eqx_moe.unstack(model)`."
            )


def _rows(tokens, segment_ids, cache: Cache | None, mesh: Mesh | None):
    """Places and segments of a call's tokens, their default positions, and the lengths of their segments."""
    batch, seq = tokens.shape
    index = jnp.arange(seq)
    if segment_ids is None:
        segments = jnp.ones((batch, seq), jnp.int32)
        positions, lengths = jnp.broadcast_to(index, (batch, seq)), jnp.full((batch, 1), seq)
    else:
        segments = segment_ids.astype(jnp.int32)
        positions, lengths = segment_layout(segments)
    if cache is None:
        key_segments = None if segment_ids is None else segments
        return Rows(segments=segments, start=None, key_segments=key_segments, mesh=mesh), positions, lengths
    _refuse_overflow(cache, seq)
    earlier = jnp.arange(cache.length) < cache.filled
    same = earlier & (cache.segments[:, None, :] == segments[:, :, None])
    key_segments = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.filled, axis=1)
    rows = Rows(segments=segments, start=cache.filled, key_segments=key_segments, mesh=mesh)
    return rows, positions + jnp.sum(same, axis=-1), cache.lengths[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _tables(rope: AbstractRope, positions, lengths):
    """The rope's tables. XLA's CPU back end otherwise fuses the cosines and sines into each product with them, and
    computes them anew for every head of every layer. It fuses nothing into a conditional, if it cannot tell that the
    other branch is never taken."""

    def apart(positions, lengths):
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(rope.tables, positions, lengths))
        some = jnp.max(jax.lax.optimization_barrier(lengths)) > 0
        return jax.lax.cond(some, rope.tables, lambda *_: zeros, positions, lengths)

    return jax.lax.platform_dependent(positions, lengths, cpu=apart, default=rope.tables)


def _refuse_bad_ids(tokens, vocab: int) -> None:
    if isinstance(tokens, Tracer):
        return
    ids = np.asarray(tokens)  # concrete even where a trace goes on around it
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"Token ids must be in [0, {vocab}), the model's vocabulary; got {low if low < 0 else high}.")


def _refuse_overflow(cache: Cache, seq: int) -> None:
    if not isinstance(cache.filled, Tracer) and int(cache.filled) + seq > cache.length:
        raise ValueError(
            f"The cache holds {cache.length} places, {int(cache.filled)} of them filled; got {seq} more tokens. "
            "Make a longer one with `init_cache`."
        )
