"""How the experts of a MoE block run: one `Routing` in, one output out, interchangeable ways between.

    execution(x, routing, experts, mask) -> [batch, seq, hidden], dropped pairs

`"dense"` is the slow oracle, `"grouped"` the dropless way for one device, `"expert_parallel"` the one for a mesh.
`"capacity"` gives every expert the same number of places and drops what does not fit.
"""

from jax.sharding import Mesh

from eqx_moe.execution.base import AbstractExecution as AbstractExecution
from eqx_moe.execution.base import ExpertFunction as ExpertFunction
from eqx_moe.execution.base import Routing as Routing
from eqx_moe.execution.base import StackedLinear as StackedLinear
from eqx_moe.execution.capacity import Capacity as Capacity
from eqx_moe.execution.dense import Dense as Dense
from eqx_moe.execution.expert_parallel import ExpertParallel as ExpertParallel
from eqx_moe.execution.expert_parallel import save_collectives as save_collectives
from eqx_moe.execution.grouped import Grouped as Grouped
from eqx_moe.sharding import check_mesh

_BY_NAME = {"capacity": Capacity(), "dense": Dense(), "grouped": Grouped()}


def resolve(execution: str | AbstractExecution | None, mesh: Mesh | None = None) -> AbstractExecution:
    """The execution that a user means by a name, by an object, or by None (the dropless one of this platform).

    With a mesh it is always an `ExpertParallel` on that mesh, with what the user named as its `inner`.
    """
    if execution is None:
        execution = "grouped" if mesh is None else "expert_parallel"
    if not isinstance(execution, AbstractExecution):
        execution = _by_name(execution, mesh)
    if mesh is None:
        return execution
    if not isinstance(execution, ExpertParallel):
        return ExpertParallel(mesh, inner=execution)
    if execution.mesh != check_mesh(mesh):
        raise ValueError(
            f"`execution` and `mesh` must name the same mesh; got {execution.mesh} and {mesh}. Give only one of them."
        )
    return execution


def _by_name(name: str, mesh: Mesh | None) -> AbstractExecution:
    if name == "expert_parallel":
        if mesh is None:
            raise ValueError("`execution='expert_parallel'` needs a `mesh` to spread the experts over; got mesh=None.")
        return ExpertParallel(mesh)
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(
            "`execution` must be None, an object of `eqx_moe.execution` or one of "
            f"{sorted([*_BY_NAME, 'expert_parallel'])}; got {name!r}."
        )
    return _BY_NAME[name]
