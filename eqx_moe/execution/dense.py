"""Every expert for every token: the oracle."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eqx_moe.execution.base import AbstractExecution, ExpertFunction, Routing


def batched_linear(x, stack, bias=None):
    """A `StackedLinear` for rows that lie [experts, tokens, in]."""
    y = jnp.einsum("eti,eoi->eto", x, stack)
    return y if bias is None else y + bias[:, None]


@dataclasses.dataclass(frozen=True)
class Dense(AbstractExecution):
    """Runs all experts on all tokens and weighs the results; experts that a token did not choose weigh nothing.

    Slow: the definition that every other execution is tested against. Drops nothing.
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
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        outputs = experts(jnp.broadcast_to(x, (experts.num_experts, *x.shape)), batched_linear)
        k = routing.experts.shape[-1]
        chosen = routing.experts.reshape(-1, k, 1) == jnp.arange(experts.num_experts)
        weights = jnp.sum(jnp.where(chosen, routing.weights.reshape(-1, k, 1), 0), axis=1)
        # An output that is not finite must not reach a token that never chose its expert.
        outputs = jnp.where(jnp.any(chosen, axis=1).T[:, :, None], outputs, 0)
        y = jnp.einsum("te,eth->th", weights, outputs.astype(weights.dtype))
        return y.astype(x.dtype).reshape(shape), jnp.zeros((), jnp.int32)
