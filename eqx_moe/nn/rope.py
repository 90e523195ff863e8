"""Rotary position embeddings (Su et al. 2021): dimension i turns together with i + dim / 2, or 2i with 2i + 1.

One frozen record per kind of frequencies. Records are hashable and hold numbers, no arrays: a model carries them as
static fields. The formulas are those of transformers 5.23 `modeling_rope_utils.py`; each class names the paper behind
it.
"""

import abc
import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def _powers(dim: int) -> Float32[np.ndarray, " half"]:
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _inverse(theta: float, dim: int) -> Float32[np.ndarray, " half"]:
    return np.float32(1.0) / np.float32(theta) ** _powers(dim)


class AbstractRope(abc.ABC):
    """Frequencies for `dim` rotated dimensions."""

    #: Whether `frequencies` reads `lengths`.
    by_length: bool = False
    #: Cosine and sine are both multiplied by this.
    scale: float = 1.0

    @abc.abstractmethod
    def frequencies(self, lengths: Int[Array, "*rows"]) -> Float[Array, "*#rows half"]:
        """Radians per position, float32, for rows of the given lengths (in tokens)."""

    def tables(
        self, positions: Int[Array, "batch seq"], lengths: Int[Array, "batch #seq"]
    ) -> tuple[Float32[Array, "batch seq half"], Float32[Array, "batch seq half"]]:
        """Cosines and sines of every position's angles, float32."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies(lengths)
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    tables: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
    interleaved: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns the pairs (i, i + half) of every head. Computed in float32, returned in the dtype of `x`.

    With `interleaved` the pairs are (2i, 2i + 1), and come out at (i, i + half): products of queries and keys that were
    both turned so do not see the order.
    """
    cos, sin = (table[:, :, None] for table in tables)
    wide = x.astype(jnp.float32)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class DefaultRope(AbstractRope):
    """theta ** (-2i / dim)."""

    dim: int
    theta: float

    def frequencies(self, lengths: Int[Array, "*rows"]) -> Float[Array, "*#rows half"]:
        return jnp.asarray(_inverse(self.theta, self.dim))


@dataclasses.dataclass(frozen=True)
class LinearRope(AbstractRope):
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    dim: int
    theta: float
    factor: float

    def frequencies(self, lengths: Int[Array, "*rows"]) -> Float[Array, "*#rows half"]:
        return jnp.asarray(_inverse(self.theta, self.dim) / np.float32(self.factor))


@dataclasses.dataclass(frozen=True)
class DynamicRope(AbstractRope):
    """Dynamic NTK scaling: theta grows with the length of a row past `max_positions`.

    transformers grows theta as a generation goes on, which turns keys that are already cached by other angles than
    new ones. Here a row keeps the frequencies of its whole length.
    """

    dim: int
    theta: float
    factor: float
    max_positions: int
    by_length = True

    def frequencies(self, lengths: Int[Array, "*rows"]) -> Float[Array, "*#rows half"]:
        length = jnp.maximum(lengths, self.max_positions).astype(jnp.float32)[..., None]
        growth = (self.factor * length / self.max_positions) - (self.factor - 1)
        theta = self.theta * growth ** (self.dim / (self.dim - 2))
        return 1.0 / theta ** jnp.asarray(_powers(self.dim))


@dataclasses.dataclass(frozen=True)
class Llama3Rope(AbstractRope):
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, a linear blend between."""

    dim: int
    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def frequencies(self, lengths: Int[Array, "*rows"]) -> Float[Array, "*#rows half"]:
        inverse = _inverse(self.theta, self.dim).astype(np.float64)
        turns = self.original_max_positions * inverse / (2 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return jnp.asarray(((1 - blend) * inverse / self.factor + blend * inverse).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class YarnRope(AbstractRope):
    """YaRN (Peng et al. 2023, section 3): slow frequencies divided by `factor`; `scale` is its attention factor."""

    dim: int
    theta: float
    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    scale: float

    def frequencies(self, lengths: Int[Array, "*rows"]) -> Float[Array, "*#rows half"]:
        def dimension(rotations: float) -> float:
            """The dimension that turns `rotations` times over the original context."""
            turns = self.original_max_positions / (rotations * 2 * math.pi)
            return self.dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(self.dim // 2) - low) / (high - low), 0, 1)
        inverse = _inverse(self.theta, self.dim).astype(np.float64)
        return jnp.asarray((inverse * (1 - ramp) + inverse / self.factor * ramp).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class LongRope(AbstractRope):
    """LongRoPE (Ding et al. 2024): one divisor per frequency, `short` up to `original_max_positions`, `long` for
    longer rows.

    A row keeps one of the two for its whole length; transformers switches in the middle of a generation.
    """

    dim: int
    theta: float
    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    scale: float
    by_length = True

    def frequencies(self, lengths: Int[Array, "*rows"]) -> Float[Array, "*#rows half"]:
        inverse = _inverse(self.theta, self.dim)
        short, long = (jnp.asarray(inverse / np.asarray(by, np.float32)) for by in (self.short, self.long))
        return jnp.where((lengths > self.original_max_positions)[..., None], long, short)
