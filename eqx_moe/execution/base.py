"""What a router decides (`Routing`) and what carries it out (`AbstractExecution`)."""

import abc
from typing import Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int


class Routing(eqx.Module):
    """Which experts each token visits, and how much each one counts. The k experts of a token are distinct.

    The index `num_experts` is nowhere: such a pair (token, expert) is not run and adds nothing. Padding goes there, and
    where experts are spread over devices, so does what another device runs.
    """

    experts: Int[Array, "*tokens k"]
    weights: Float[Array, "*tokens k"]


@runtime_checkable
class StackedLinear(Protocol):
    """`y[r] = stack[expert of row r] @ x[r] (+ bias[expert of row r])`. Which expert that is, the execution knows."""

    def __call__(
        self,
        x: Float[Array, "*rows in"],
        stack: Float[Array, "experts out in"],
        bias: Float[Array, "experts out"] | None = None,
        /,
    ) -> Float[Array, "*rows out"]: ...


@runtime_checkable
class ExpertFunction(Protocol):
    """What one expert computes with a row, written with a `StackedLinear` in place of its matrices."""

    @property
    def num_experts(self) -> int: ...

    def __call__(self, x: Float[Array, "*rows hidden"], linear: StackedLinear, /) -> Float[Array, "*rows hidden"]: ...

    def partition(self, expert: str | None, tensor: str | None, /) -> "ExpertFunction":
        """A `PartitionSpec` in place of every array: experts over the mesh axis `expert`, ffn over `tensor`.

        Devices along `tensor` then each compute a part of the ffn dimension, and their outputs are summed.
        """
        ...

    def share(self, parts: int, /) -> "ExpertFunction":
        """The experts of one among `parts` devices whose outputs are summed: what is added to the output itself (a bias
        of the last product) is divided by `parts`, all else is the same."""
        ...


class AbstractExecution(abc.ABC):
    """A way to run the experts. Final subclasses are frozen dataclasses of their options, without arrays."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        routing: Routing,
        experts: ExpertFunction,
        mask: Bool[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq hidden"], Int[Array, ""]]:
        """For each token the sum of its experts' outputs times their weights, and how many (token, expert) pairs it
        dropped (those that go nowhere are not among them).

        `routing` is of the shape [batch, seq, k]. `mask` says which tokens are no padding; the routing of the others
        goes nowhere already. Weights multiply and sum in their own dtype (float32 from a router); the result has the
        dtype of `x`.
        """
