"""How the experts of a MoE block run: one `Routing` in, one output out, interchangeable ways between.

    execution(x, routing, experts, mask) -> [batch, seq, hidden], dropped pairs

`"dense"` is the slow oracle, `"grouped"` the dropless way for one device. `"capacity"` gives every expert the same
number of places and drops what does not fit.
"""

from eqx_moe.execution.base import AbstractExecution as AbstractExecution
from eqx_moe.execution.base import ExpertFunction as ExpertFunction
from eqx_moe.execution.base import Routing as Routing
from eqx_moe.execution.base import StackedLinear as StackedLinear
from eqx_moe.execution.capacity import Capacity as Capacity
from eqx_moe.execution.dense import Dense as Dense
from eqx_moe.execution.grouped import Grouped as Grouped

_BY_NAME = {"capacity": Capacity(), "dense": Dense(), "grouped": Grouped()}


def resolve(execution: str | AbstractExecution | None) -> AbstractExecution:
    """The execution that a user means by a name, by an object, or by None (the dropless one of this platform)."""
    if execution is None:
        return _BY_NAME["grouped"]
    if isinstance(execution, AbstractExecution):
        return execution
    if execution not in _BY_NAME:
        raise ValueError(
            "`execution` must be None, an object of `eqx_moe.execution` or one of "
            f"{sorted(_BY_NAME)}; got {execution!r}."
        )
    return _BY_NAME[execution]
