"""The mixture-of-experts block, and figures of how busy its experts are."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from eqx_moe.execution import AbstractExecution, Routing
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.mlp import MLP
from eqx_moe.nn.router import AbstractRouter


class LayerRouting(eqx.Module):
    """What one MoE block decided for its tokens."""

    logits: Float32[Array, "*tokens experts"]
    choices: Int[Array, "*tokens k"]
    weights: Float[Array, "*tokens k"]
    drops: Int[Array, ""]

    def last(self) -> "LayerRouting":
        """For the last token of each row; `drops` stays."""
        return LayerRouting(self.logits[:, -1:], self.choices[:, -1:], self.weights[:, -1:], self.drops)


class MoE(eqx.Module):
    """Router, experts, and the execution that brings them together; `shared` is an expert that every token visits."""

    router: AbstractRouter
    experts: Experts
    shared: MLP | None = None
    execution: AbstractExecution = eqx.field(static=True, kw_only=True)
    jitter: float = eqx.field(static=True, default=0.0, kw_only=True)

    def __check_init__(self):
        if not isinstance(self.execution, AbstractExecution):
            raise ValueError(
                "`execution` must be an object such as `eqx_moe.execution.Grouped()`; got "
                f"{self.execution!r}. `eqx_moe.execution.resolve` makes one of a name."
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"`jitter` must be in [0, 1), so that inputs keep their sign; got {self.jitter}.")

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        mask: Bool[Array, "batch seq"],
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], LayerRouting]:
        """Tokens where `mask` is False are padding: they visit no expert.

        With a key (training) the input is multiplied by uniform noise in [1 - jitter, 1 + jitter] first, float32
        before it is rounded: in bfloat16 the noise itself would have a handful of values.

        The experts see the noise too, as in transformers' Mixtral; in Switch Transformers (Fedus et al. 2021, section
        2.4) only the router does.
        """
        if key is not None and self.jitter > 0:
            noise = jax.random.uniform(key, x.shape, jnp.float32, 1 - self.jitter, 1 + self.jitter)
            x = (x * noise).astype(x.dtype)
        logits = self.router.logits(x)
        # A router that scores more experts than there are would send tokens nowhere.
        if logits.shape[-1] != self.experts.num_experts:
            raise ValueError(
                f"`router` and `experts` must have the same number of experts; got {logits.shape[-1]} and "
                f"{self.experts.num_experts}."
            )
        routing = self.router.route(logits)
        # Padding goes nowhere: it costs no work and takes no capacity.
        visits = jnp.where(mask[:, :, None], routing.experts, self.experts.num_experts)
        y, drops = self.execution(x, Routing(visits, routing.weights), self.experts, mask)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, LayerRouting(logits=logits, choices=routing.experts, weights=routing.weights, drops=drops)


class RouterStats(eqx.Module):
    """How one MoE block's experts were used; padding counts nowhere, and without any other token all is zero.

    `entropy` is the mean, over tokens, of the entropy of the softmax over all experts, in nats. `max_violation` is the
    largest load divided by the mean load, less one: 0 when all experts are equally busy (Wang et al. 2024, 4.1).
    `drops` are the (token, expert) pairs that the execution left out; `tokens_per_expert` counts them too.
    """

    tokens_per_expert: Int[Array, " experts"]
    entropy: Float32[Array, ""]
    max_violation: Float32[Array, ""]
    drops: Int[Array, ""]

    def __init__(self, routing: LayerRouting, mask: Bool[Array, "*tokens"]):
        experts, k = routing.logits.shape[-1], routing.choices.shape[-1]
        load = jnp.zeros(experts, jnp.int32).at[routing.choices].add(mask[..., None].astype(jnp.int32))
        tokens = jnp.sum(mask, dtype=jnp.int32)
        logs = jax.nn.log_softmax(routing.logits, axis=-1)
        each = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
        some = jnp.maximum(tokens, 1).astype(jnp.float32)
        self.tokens_per_expert = load
        self.entropy = jnp.sum(jnp.where(mask, each, 0.0)) / some
        violation = jnp.max(load).astype(jnp.float32) * experts / (some * k) - 1
        self.max_violation = jnp.where(tokens > 0, violation, 0.0)
        self.drops = routing.drops
