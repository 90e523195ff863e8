"""Routers: they score the experts for each token and decide. What follows from it is not their business."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

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
    """Softmax over all experts, the k most probable chosen; with `normalise` their probabilities divided by their sum.

    Mixtral of Experts (Jiang et al. 2024) section 2.1, where the softmax is over the k chosen logits, as in gpt-oss:
    with `normalise` the same numbers. Whatever the dtype of `x`, logits are summed in float32, and all that follows is
    float32: bias, softmax, top-k, weights. transformers' routers round logits, and some their weights, to the dtype of
    the model, which is the same in float32 alone. Equal scores: the lower expert wins.
    """

    weight: Float[Array, "experts hidden"]
    bias: Float[Array, " experts"] | None
    k: int = eqx.field(static=True)
    normalise: bool = eqx.field(static=True)

    def __init__(
        self,
        hidden: int,
        experts: int,
        k: int,
        *,
        normalise: bool = True,
        bias: bool = False,
        std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        """`bias`: whether logits have one; it starts as zero."""
        _check(k, experts)
        self.weight = normal(key, (experts, hidden), std, dtype)
        self.bias = jnp.zeros(experts, dtype) if bias else None
        self.k, self.normalise = k, normalise

    def logits(self, x: Float[Array, "*tokens hidden"]) -> Float32[Array, "*tokens experts"]:
        logits = _float32_logits(x, self.weight.astype(x.dtype))
        return logits if self.bias is None else logits + self.bias.astype(jnp.float32)

    def route(self, logits: Float32[Array, "*tokens experts"]) -> Routing:
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.k)
        if self.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(experts=experts, weights=weights)


class SigmoidTopKRouter(AbstractRouter):
    """A sigmoid for each expert; the k with the largest score plus bias are chosen, and weigh their score without it.

    DeepSeek-V3 (2024) section 2.1.2; reference: `DeepseekV3TopkRouter` of transformers 5.23,
    `models/deepseek_v3/modeling_deepseek_v3.py`. Experts are chosen from `kept_groups` of `groups` groups of
    neighbours, those whose two best experts have the largest sum of score plus bias. With `normalise` the weights are
    divided by their sum plus 1e-20. They are multiplied by `scale` last.

    `selection_bias` balances the load (`updated_selection_bias`); it is float32, but for checkpoints that hold it in
    less and are loaded as they are. It decides who is chosen and nothing else, so that it has no gradient. Logits,
    scores and weights are float32, whatever the dtype of `x` and `weight`. Equal scores: the lower expert wins.
    """

    weight: Float[Array, "experts hidden"]
    selection_bias: Float[Array, " experts"]
    k: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    kept_groups: int = eqx.field(static=True)
    normalise: bool = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        hidden: int,
        experts: int,
        k: int,
        *,
        groups: int = 1,
        kept_groups: int = 1,
        normalise: bool,
        scale: float,
        std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        _check(k, experts)
        _check_groups(k, experts, groups, kept_groups)
        self.weight = normal(key, (experts, hidden), std, dtype)
        self.selection_bias = jnp.zeros(experts, jnp.float32)
        self.k, self.groups, self.kept_groups = k, groups, kept_groups
        self.normalise, self.scale = normalise, scale

    def logits(self, x: Float[Array, "*tokens hidden"]) -> Float32[Array, "*tokens experts"]:
        return _float32_logits(x.astype(jnp.float32), self.weight.astype(jnp.float32))

    def route(self, logits: Float32[Array, "*tokens experts"]) -> Routing:
        scores = jax.nn.sigmoid(logits)
        choice = scores + self.selection_bias
        if self.kept_groups < self.groups:
            choice = _within_groups(choice, self.groups, self.kept_groups)
        _, experts = jax.lax.top_k(choice, self.k)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.normalise:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return Routing(experts=experts, weights=weights * self.scale)


def updated_selection_bias(
    bias: Float[Array, " experts"], tokens_per_expert: Int[Array, " experts"], rate: float
) -> Float32[Array, " experts"]:
    """The bias for the next step: `rate` more where an expert had less than the mean load of a step, less where more.

    Balances the load without a loss: Wang et al. 2024, algorithm 1; DeepSeek-V3 (2024) section 2.1.2, where the rate is
    1e-3. `tokens_per_expert` counts a whole training batch, as `RouterStats` does. Changes no other weight and needs no
    gradient: apply it beside the optimizer's update.
    """
    if bias.shape != tokens_per_expert.shape:
        raise ValueError(
            f"`bias` and `tokens_per_expert` must have an entry for each expert; got {bias.shape} and "
            f"{tokens_per_expert.shape}."
        )
    load = tokens_per_expert.astype(jnp.float32)
    return bias.astype(jnp.float32) + rate * jnp.sign(jnp.mean(load) - load)


def _check(k: int, experts: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= experts:
        raise ValueError(f"`k` must be an integer in [1, experts]; got {k=} and {experts=}.")


def _check_groups(k: int, experts: int, groups: int, kept_groups: int) -> None:
    if not 1 <= groups <= experts or experts % groups:
        raise ValueError(f"`groups` must divide the experts; got {groups=} and {experts=}.")
    if not 1 <= kept_groups <= groups:
        raise ValueError(f"`kept_groups` must be in [1, groups]; got {kept_groups=} and {groups=}.")
    if kept_groups < groups and experts // groups < 2:
        raise ValueError(f"A group is judged by its two best experts; got {experts=} in {groups=}.")
    if k > experts // groups * kept_groups:
        raise ValueError(
            f"`k` must be at most the experts of the kept groups; got {k=} and {kept_groups=} groups of "
            f"{experts // groups}."
        )


def _within_groups(choice: Float32[Array, "*tokens experts"], groups: int, kept: int):
    """The same, minus infinity outside the groups whose two largest entries have the largest sums."""
    grouped = choice.reshape(*choice.shape[:-1], groups, -1)
    best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    _, chosen = jax.lax.top_k(best, kept)
    stays = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(stays[..., None], grouped, -jnp.inf).reshape(choice.shape)


def _float32_logits(x, weight):
    # Accelerators by default multiply float32 with fewer bits, and near scores would change places.
    return jnp.einsum("...h,eh->...e", x, weight, precision="highest", preferred_element_type=jnp.float32)
