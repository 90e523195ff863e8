"""Routers: they score the experts for each token and decide. What follows from it is not their business."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from eqx_moe.execution import Routing
from eqx_moe.nn.init import normal


class AbstractRouter(eqx.Module):
    """Scores (`logits`) and a rule that turns them into a decision (`route`), apart so that either can be replaced.

    `k` is how many experts a token visits.
    """

    k: eqx.AbstractVar[int]

    @abc.abstractmethod
    def logits(self, x: Float[Array, "*tokens hidden"]) -> Float32[Array, "*tokens experts"]: ...

    @abc.abstractmethod
    def route(self, logits: Float32[Array, "*tokens experts"]) -> Routing: ...


class SoftmaxTopKRouter(AbstractRouter):
    """Softmax over all experts, the k most probable chosen, their probabilities divided by their sum.

    Mixtral of Experts (Jiang et al. 2024) section 2.1, where the softmax is over the k chosen logits: the same numbers.
    Logits accumulate in float32 whatever the dtype of `x`; weights are float32. Equal scores: the lower expert wins.
    """

    weight: Float[Array, "experts hidden"]
    k: int = eqx.field(static=True)

    def __init__(self, hidden: int, experts: int, k: int, *, std: float, dtype: DTypeLike, key: PRNGKeyArray):
        if not 1 <= k <= experts:
            raise ValueError(f"`k` must be in [1, experts]; got {k=} and {experts=}.")
        self.weight = normal(key, (experts, hidden), std, dtype)
        self.k = k

    def logits(self, x: Float[Array, "*tokens hidden"]) -> Float32[Array, "*tokens experts"]:
        return jnp.einsum("...h,eh->...e", x, self.weight.astype(x.dtype), preferred_element_type=jnp.float32)

    def route(self, logits: Float32[Array, "*tokens experts"]) -> Routing:
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.k)
        return Routing(experts=experts, weights=weights / jnp.sum(weights, axis=-1, keepdims=True))
