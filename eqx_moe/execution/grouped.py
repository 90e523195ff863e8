"""Dropless: the (token, expert) pairs sorted by expert, each expert's rows multiplied together."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eqx_moe.execution.base import AbstractExecution, ExpertFunction, Routing
from eqx_moe.kernels.grouped_matmul import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Grouped(AbstractExecution):
    """Sorts the (token, expert) pairs by expert, runs each expert on its rows alone, and adds up. Drops nothing.

    MegaBlocks (Gale et al. 2022) describes the dropless formulation; here the blocks are visited in a loop.
    """

    @property
    def by_row(self) -> bool:
        return False

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        routing: Routing,
        experts: ExpertFunction,
        mask: Bool[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq hidden"], Int[Array, ""]]:
        shape, k = x.shape, routing.experts.shape[-1]
        x = x.reshape(-1, shape[-1])
        flat = routing.experts.reshape(-1)
        # Stable, so that an expert sees its tokens in their order and a result does not depend on the sort's whims.
        # Pairs that go nowhere come last, past the end of all groups.
        order = jnp.argsort(flat, stable=True)
        # The choices of a token are distinct: with one expert of many here, at most one of them stays.
        rows = order[: x.shape[0] * min(k, experts.num_experts)]
        sizes = jnp.sum(flat[:, None] == jnp.arange(experts.num_experts), axis=0, dtype=jnp.int32)
        expert_of_row = flat[rows]
        # With a share of a block's experts, about that share of the pairs goes to them.
        everyone = routing.num_experts or experts.num_experts
        expected = routing.expected or -(-flat.size * experts.num_experts // everyone)

        def linear(x, stack, bias=None):
            y = grouped_matmul(x, stack, sizes, expected)
            return y if bias is None else y + bias[expert_of_row]

        y = experts(x[rows // k], linear)
        # Back to token order by a gather, so that the k summands of a token are added in the router's order.
        back = jnp.argsort(order).reshape(-1, k)
        ran = (routing.experts < experts.num_experts).reshape(-1, k)
        weights = jnp.where(ran, routing.weights.reshape(-1, k), 0)
        # A pair that goes nowhere may have no row; it must not read an infinity in another's.
        y = jnp.where(ran[..., None], jnp.take(y, back, axis=0, mode="clip"), 0)
        y = jnp.einsum("tk,tkh->th", weights, y.astype(weights.dtype))
        return y.astype(x.dtype).reshape(shape), jnp.zeros((), jnp.int32)
