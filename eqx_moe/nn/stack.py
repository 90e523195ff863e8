"""Runs of equal layers as one, which a program scans over: it compiles in the time of a single layer."""

import itertools
from collections.abc import Callable

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
    """Layers that differ in their weights only: one block, whose arrays all have a leading axis `layers`.

    With `rematerialise` the backward pass computes a layer again, so that only what stands between layers is kept; what
    came out of a collective is kept too, so that none is run twice. There is no cache: decoding runs layer by layer.
    """

    block: Block
    rematerialise: bool = eqx.field(static=True, default=False)

    @property
    def count(self) -> int:
        return jax.tree.leaves(self.block)[0].shape[0]

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rows: Rows,
        tables: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
        keys: Shaped[Array, "layers ..."] | None,
        prepare: Callable[[Block], Block],
        finish: Callable[[Float[Array, "batch seq hidden"]], Float[Array, "batch seq hidden"]],
    ) -> tuple[Float[Array, "batch seq hidden"], list[LayerRouting]]:
        """As `Block` without a cache. `keys` has a key for each layer. Each layer is run as `prepare` returns it, and
        what it gives goes through `finish`."""

        def layer(x, given):
            block, key = given
            x, _, routing = prepare(block)(x, rows, tables, None, key)
            return finish(x), routing

        if self.rematerialise:
            layer = jax.checkpoint(layer, prevent_cse=False, policy=save_collectives)
        x, routings = lax.scan(layer, x, (self.block, keys))
        if routings is None:
            return x, []
        return x, [jax.tree.map(lambda leaf, i=i: leaf[i], routings) for i in range(self.count)]


def block_of(layer: Block | Stack) -> Block:
    """The block of a layer: a stack's has a leading axis [layers] on every array."""
    return layer.block if isinstance(layer, Stack) else layer


def stack_layers(layers: tuple[Block | Stack, ...], rematerialise: bool) -> tuple[Block | Stack, ...]:
    """Runs of two and more equal blocks become one `Stack` each."""
    result: list[Block | Stack] = []
    for (stacked, *_), run in itertools.groupby(layers, _kind):
        blocks = list(run)
        if stacked or len(blocks) == 1:
            result += blocks
        else:
            result.append(Stack(jax.tree.map(lambda *leaves: _stack(leaves), *blocks), rematerialise))
    return tuple(result)


def unstack_layers(layers: tuple[Block | Stack, ...]) -> tuple[Block, ...]:
    """Every layer a block of its own again."""
    result: list[Block] = []
    for layer in layers:
        if isinstance(layer, Stack):
            columns, structure = jax.tree.flatten(layer.block)
            rows = zip(*map(_unstack, columns), strict=True)
            result += [jax.tree.unflatten(structure, row) for row in rows]
        else:
            result.append(layer)
    return tuple(result)


def _kind(layer: Block | Stack):
    """Equal for blocks that one scan can run."""
    leaves, structure = jax.tree.flatten(layer)
    return isinstance(layer, Stack), structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


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
