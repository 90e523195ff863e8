"""Layers that repeat as one, which a program scans over: it compiles in the time of those that differ."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from eqx_moe.execution import save_collectives
from eqx_moe.nn.attention import Rows
from eqx_moe.nn.block import Block
from eqx_moe.nn.moe import LayerRouting


class Stack(eqx.Module):
    """Layers of a pattern that repeats, [sliding, full, sliding, full, ...] say: a block for each layer of the pattern,
    whose arrays all have a leading axis `repeats`. Where all layers are alike the pattern is one block.

    With `rematerialise` the backward pass computes a layer again, so that only what stands between layers is kept; what
    came out of a collective is kept too, so that none is run twice. There is no cache: decoding runs layer by layer.
    """

    blocks: tuple[Block, ...]
    rematerialise: bool = eqx.field(static=True, default=False)

    @property
    def repeats(self) -> int:
        return jax.tree.leaves(self.blocks)[0].shape[0]

    @property
    def count(self) -> int:
        """How many layers there are."""
        return self.repeats * len(self.blocks)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rows: Rows,
        tables: Sequence[tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]],
        keys: Shaped[Array, "layers ..."] | None,
        prepare: Sequence[Callable[[Block], Block]],
        finish: Callable[[Float[Array, "batch seq hidden"]], Float[Array, "batch seq hidden"]],
    ) -> tuple[Float[Array, "batch seq hidden"], list[LayerRouting]]:
        """As `Block` without a cache. `keys` has a key for each layer; `tables` and `prepare` have an entry for each
        block. Each layer is run as `prepare` returns it, and what it gives goes through `finish`."""

        def layer(i, x, block, key):
            x, _, routing = prepare[i](block)(x, rows, tables[i], None, key)
            return finish(x), routing

        if self.rematerialise:
            # In a scan no forward pass stands beside its repetition, to be merged with it. Of several layers in a
            # turn, one waits for the gradient of the next: so that they are not computed again all at once.
            several = len(self.blocks) > 1
            layer = jax.checkpoint(layer, prevent_cse=several, policy=save_collectives, static_argnums=0)

        def turn(x, given):
            routings = []
            for i, (block, key) in enumerate(zip(*given, strict=True)):
                x, routing = layer(i, x, block, key)
                routings.append(routing)
            return x, routings

        if keys is None:
            in_turns = [None] * len(self.blocks)
        else:
            in_turns = [keys[i :: len(self.blocks)] for i in range(len(self.blocks))]
        x, routings = lax.scan(turn, x, (self.blocks, in_turns))
        in_order = [(turn, some) for turn in range(self.repeats) for some in routings if some is not None]
        return x, [jax.tree.map(lambda leaf, turn=turn: leaf[turn], some) for turn, some in in_order]


def blocks_of(layer: Block | Stack) -> dict[str, Block]:
    """The blocks of a layer, each by its path within: a stack's have a leading axis [repeats] on every array."""
    if isinstance(layer, Stack):
        return {f".blocks.{i}": block for i, block in enumerate(layer.blocks)}
    return {"": layer}


def stack_layers(layers: tuple[Block | Stack, ...], rematerialise: bool) -> tuple[Block | Stack, ...]:
    """What repeats becomes a `Stack`: of the patterns that start at a layer the one with most repeats, the shortest of
    these."""
    kinds = [_kind(layer) for layer in layers]
    result: list[Block | Stack] = []
    while len(layers) > 0:
        width, repeats = _pattern(kinds)
        taken = width * repeats
        if repeats > 1:
            columns = [layers[i:taken:width] for i in range(width)]
            blocks = (jax.tree.map(lambda *leaves: _stack(leaves), *column) for column in columns)
            result.append(Stack(tuple(blocks), rematerialise))
        else:
            result += layers[:taken]
        layers, kinds = layers[taken:], kinds[taken:]
    return tuple(result)


def unstack_layers(layers: tuple[Block | Stack, ...]) -> tuple[Block, ...]:
    """Every layer a block of its own again."""
    result: list[Block] = []
    for layer in layers:
        if isinstance(layer, Stack):
            columns, structure = jax.tree.flatten(layer.blocks)
            for row in zip(*map(_unstack, columns), strict=True):
                result += jax.tree.unflatten(structure, row)
        else:
            result.append(layer)
    return tuple(result)


def _kind(layer: Block | Stack) -> object:
    """Equal for blocks that one scan can run; a stack's is equal to nothing."""
    if isinstance(layer, Stack):
        return object()
    leaves, structure = jax.tree.flatten(layer)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _pattern(kinds: list[object]) -> tuple[int, int]:
    """How many layers the pattern has that the first are repeated in, and how often they are."""
    best = (1, 1)
    for width in range(1, len(kinds) // 2 + 1):
        repeats = 1
        while kinds[repeats * width : (repeats + 1) * width] == kinds[:width]:
            repeats += 1
        if repeats > best[1]:
            best = (width, repeats)
    return best


def _stack(leaves: tuple[Array, ...]) -> Array:
    sharding = None if isinstance(leaves[0], Tracer) else leaves[0].sharding
    if not isinstance(sharding, NamedSharding):
        return jnp.stack(leaves)
    out = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.jit(lambda leaves: jnp.stack(leaves), out_shardings=out)(leaves)


def _unstack(leaf: Array) -> list[Array]:
    sharding = None if isinstance(leaf, Tracer) else leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return [leaf[i] for i in range(leaf.shape[0])]
    out = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    entry = jax.jit(lambda leaf, i: lax.dynamic_index_in_dim(leaf, i, keepdims=False), out_shardings=out)
    return [entry(leaf, i) for i in range(leaf.shape[0])]
