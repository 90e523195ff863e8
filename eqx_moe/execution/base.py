"""What a router decides (`Routing`) and what carries it out (`AbstractExecution`)."""

import abc
import math
from typing import Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int


class Routing(eqx.Module):
    """Which experts each token visits, and how much each one counts. The k experts of a token are distinct.

    The index `experts.num_experts` of the experts that a call is given is nowhere: such a pair (token, expert) is not
    run and adds nothing. Padding goes there, and where experts are spread over devices, so does what another device
    runs.

    The three numbers are for an execution that is called with a part of a block, as on one device of many, such that
    the sum over all calls is the block: `num_experts` is how many experts the whole block has (None: the call has them
    all), and `shares` how many calls run the very same pairs, each with a part of every expert's ffn dimension. What an
    execution adds beside the experts' outputs it divides by `shares`. `expected` is about how many pairs are to be run,
    None for the experts' share of all pairs; it changes no result.
    """

    experts: Int[Array, "*tokens k"]
    weights: Float[Array, "*tokens k"]
    num_experts: int | None = eqx.field(static=True, default=None)
    shares: int = eqx.field(static=True, default=1)
    expected: int | None = eqx.field(static=True, default=None)


def check_factor(factor: object, why: str) -> None:
    """Raises `ValueError` unless `factor`, the size of buffers in units of a mean, is a finite number above zero."""
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
        raise ValueError(f"`factor` must be in (0, inf), an int or a float, {why}; got {factor!r}.")


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

    @property
    @abc.abstractmethod
    def by_row(self) -> bool:
        """Whether what a token gets depends on other tokens: rows then have to stay in one piece."""

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
