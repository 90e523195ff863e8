"""Dropless: the (token, expert) pairs sorted by expert, each expert's rows multiplied together."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eqx_moe.execution.base import AbstractExecution, ExpertFunction, Routing
from eqx_moe.kernels.grouped_matmul import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Grouped(AbstractExecution):
    """Sorts the (token, expert) pairs by expert, runs each expert on its rows alone, and adds up. Drops nothing.

    MegaBlocks (Gale et al. 2022) describes the dropless formulation; here the blocks are visited in a loop.
    """

    def __call__(
        self, x: Float[Array, "tokens hidden"], routing: Routing, experts: ExpertFunction
    ) -> tuple[Float[Array, "tokens hidden"], Int[Array, ""]]:
        tokens, k = routing.experts.shape
        flat = routing.experts.reshape(-1)
        # Stable, so that an expert sees its tokens in their order and a result does not depend on the sort's whims.
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=experts.num_experts)
        expert_of_row = flat[order]

        def linear(rows, stack, bias=None):
            y = grouped_matmul(rows, stack, sizes)
            return y if bias is None else y + bias[expert_of_row]

        y = experts(x[order // k], linear)
        # Back to token order by a gather, so that the k summands of a token are added in the router's order.
        back = jnp.argsort(order).reshape(tokens, k)
        y = jnp.einsum("tk,tkh->th", routing.weights, y[back].astype(routing.weights.dtype))
        return y.astype(x.dtype), jnp.zeros((), jnp.int32)
