"""Random weights."""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray


def normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> Float[Array, "..."]:
    """Normal with mean 0 and standard deviation `std`.

    The barrier keeps XLA from folding `std` into a constant of the draw, so that weights made by one compiled program
    (the way to make them on a mesh) equal those made step by step, bit for bit.
    """
    return std * jax.lax.optimization_barrier(jax.random.normal(key, shape, dtype))
