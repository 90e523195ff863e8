"""How the two hidden products of a gated feed-forward network become one."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class AbstractGating(abc.ABC):
    """A function of gate and up, element by element. Records are hashable: a module carries one as a static field."""

    def __call__(self, gate: Float[Array, "*rows ffn"], up: Float[Array, "*rows ffn"]) -> Float[Array, "*rows ffn"]:
        """A backward pass keeps gate and up alone and computes again what lies between, two to six times `gate`."""
        return jax.checkpoint(self.combine)(gate, up)

    @abc.abstractmethod
    def combine(self, gate: Float[Array, "*rows ffn"], up: Float[Array, "*rows ffn"]) -> Float[Array, "*rows ffn"]: ...


@dataclasses.dataclass(frozen=True)
class SwiGLU(AbstractGating):
    """`silu(gate) * up` (Shazeer 2020)."""

    def combine(self, gate: Float[Array, "*rows ffn"], up: Float[Array, "*rows ffn"]) -> Float[Array, "*rows ffn"]:
        return jax.nn.silu(gate) * up


SWIGLU = SwiGLU()


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU(AbstractGating):
    """`gate * sigmoid(alpha * gate) * (up + 1)`, with gate at most `limit` and up within `limit` of zero.

    gpt-oss (2025); reference: `GptOssExperts._apply_gate` of transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`.
    """

    alpha: float
    limit: float

    def combine(self, gate: Float[Array, "*rows ffn"], up: Float[Array, "*rows ffn"]) -> Float[Array, "*rows ffn"]:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
