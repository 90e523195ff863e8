"""A fixed number of places per expert: what does not fit is dropped."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eqx_moe.execution.base import AbstractExecution, ExpertFunction, Routing, check_factor
from eqx_moe.execution.dense import batched_linear


@dataclasses.dataclass(frozen=True)
class Capacity(AbstractExecution):
    """Each expert takes at most C = ceil(factor * k * T / experts) tokens of a row of the batch; the rest are dropped.

    T counts the row's tokens that are no padding, and `experts` those of the whole block, so that a result depends
    neither on the other rows nor on padding nor on how a block is spread over devices. First choices of all tokens come
    before second choices, and earlier tokens before later ones: GShard (Lepikhin et al. 2020, algorithm 1) and Switch
    Transformers (Fedus et al. 2021, section 2.2), whose groups of tokens are rows here. The weights of what is kept are
    not normalised again. That an earlier token's second choice gives way to a later token's first makes what a token
    gets depend on its future: for training, not for generation.

    All experts run on buffers of the same size, [experts, batch * C, hidden] with the C of a row without padding: one
    batched product whatever the routing, and as much work as all experts have places. A single token per row is never
    dropped, but is slow: every expert runs.

    Args:
        factor: how many places all experts have together, in units of how many choices there are; above zero. Taken as
            the decimal number that it is written as: 1.1 * 10 / 11 is 1. The default is that of Switch Transformers.
        dropped: what a dropped pair adds. `"zero"`: nothing; the residual connection around the block carries the
            token, as in both papers. `"residual"`: its weight times the block's input, as an expert that does nothing.
    """

    factor: float | int = 1.25
    dropped: str = "zero"

    def __post_init__(self):
        check_factor(self.factor, "so that an expert has places")
        if self.dropped not in ("zero", "residual"):
            raise ValueError(f"`dropped` must be one of ['zero', 'residual']; got {self.dropped!r}.")

    @property
    def by_row(self) -> bool:
        return True

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        routing: Routing,
        experts: ExpertFunction,
        mask: Bool[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq hidden"], Int[Array, ""]]:
        batch, seq, hidden = x.shape
        count, k = experts.num_experts, routing.experts.shape[-1]
        needed = self._tokens_needed(seq, k, count if routing.num_experts is None else routing.num_experts)
        places = len(needed)
        capacity = jnp.sum(needed <= jnp.sum(mask, axis=1)[:, None], axis=1, dtype=jnp.int32)

        # Pairs in the order in which they are served, choices before tokens; and sorted by expert, nowhere last.
        chosen = jnp.swapaxes(routing.experts, 1, 2).reshape(batch, k * seq)
        order = jnp.argsort(chosen, axis=1, stable=True)
        load = jnp.sum(chosen[:, :, None] == jnp.arange(count), axis=1, dtype=jnp.int32)
        start = jnp.cumsum(load, axis=1) - load

        # Which pair stands at place c of expert e: the c-th of its pairs.
        place = jnp.arange(places)
        filled = (place < jnp.minimum(load, capacity[:, None])[:, :, None]).reshape(batch, count * places)
        at = (start[:, :, None] + place).reshape(batch, count * places)
        pair = jnp.take_along_axis(order, jnp.where(filled, at, 0), axis=1)
        # And at which place a pair stands, by its rank among those of its expert.
        expert = jnp.minimum(chosen, count - 1)
        rank = jnp.argsort(order, axis=1) - jnp.take_along_axis(start, expert, axis=1)
        kept = (chosen < count) & (rank < capacity[:, None])
        place_of_pair = jnp.where(kept, expert * places + rank, 0)

        def by_token(pairs):
            return jnp.swapaxes(pairs.reshape(batch, k, seq), 1, 2)

        rows = _gather(x, pair % seq, filled, by_token(place_of_pair), by_token(kept))
        rows = jnp.swapaxes(rows.reshape(batch, count, places, hidden), 0, 1).reshape(count, batch * places, hidden)
        y = experts(rows, batched_linear)
        y = jnp.swapaxes(y.reshape(count, batch, places, hidden), 0, 1).reshape(batch, count * places, hidden)
        y = _gather(y, place_of_pair, kept, pair[:, :, None], filled[:, :, None]).reshape(batch, k, seq, hidden)

        kept, weights = by_token(kept), routing.weights
        lost = (routing.experts < count) & ~kept
        y = jnp.einsum("bsk,bksh->bsh", jnp.where(kept, weights, 0), y.astype(weights.dtype))
        if self.dropped == "residual":
            own = jnp.where(jnp.any(lost, axis=-1, keepdims=True), x, 0).astype(weights.dtype)
            y = y + own * jnp.sum(jnp.where(lost, weights, 0), axis=-1, keepdims=True) / routing.shares
        return y.astype(x.dtype), jnp.sum(lost, dtype=jnp.int32)

    def _tokens_needed(self, seq: int, k: int, experts: int) -> Int[np.ndarray, " places"]:
        """For each place of an expert, how many tokens a row must have for the place to exist, up to `seq` tokens.

        Place c exists if c < factor * k * T / experts. Whole numbers from fractions: no rounding adds or takes a place.
        """
        up, down = (Fraction(str(self.factor)) * k / experts).as_integer_ratio()
        # An expert that has a place for every token needs no more.
        places = min(-(-up * seq // down), seq)
        return np.asarray([c * down // up + 1 for c in range(places)], np.int32)


@jax.custom_vjp
def _gather(
    x: Float[Array, "batch rows hidden"],
    index: Int[Array, "batch places"],
    valid: Bool[Array, "batch places"],
    places: Int[Array, "batch rows uses"],
    used: Bool[Array, "batch rows uses"],
) -> Float[Array, "batch places hidden"]:
    """`x[index]`, and zeros where not `valid`: a free place must not hold some token, which may not be finite.

    `places` says the same the other way round: where each row went, as far as `used`. So the gradient is a gather too,
    where differentiating would scatter: the whole gradient takes 5 to 10 % less time on a CPU.
    """
    return jnp.where(valid[:, :, None], jnp.take_along_axis(x, index[:, :, None], axis=1), 0)


def _gather_fwd(x, index, valid, places, used):
    return _gather(x, index, valid, places, used), (places, used)


def _gather_bwd(residuals, dy):
    places, used = residuals
    batch, rows, uses = places.shape
    dx = jnp.take_along_axis(dy, places.reshape(batch, rows * uses, 1), axis=1).reshape(batch, rows, uses, -1)
    return jnp.sum(jnp.where(used[..., None], dx, 0), axis=2), None, None, None, None


_gather.defvjp(_gather_fwd, _gather_bwd)


def capacity_oracle(
    chosen: Int[np.ndarray, "batch seq k"], mask: Bool[np.ndarray, "batch seq"], factor: float | int, num_experts: int
) -> Bool[np.ndarray, "batch seq k"]:
    """Which pairs `Capacity` keeps, one after another. Slow; the definition to test against.

    Of the pairs that it does not keep, those with an index below `num_experts` are dropped. What `Capacity` computes is
    what `Dense` does when the others go nowhere.
    """
    kept = np.zeros(chosen.shape, bool)
    for row, real, keep in zip(chosen, mask, kept, strict=True):
        seq, k = row.shape
        capacity = math.ceil(Fraction(str(factor)) * k * int(real.sum()) / num_experts)
        taken = [0] * num_experts
        for choice in range(k):
            for token in range(seq):
                expert = row[token, choice]
                if expert < num_experts and taken[expert] < capacity:
                    taken[expert] += 1
                    keep[token, choice] = True
    return kept
