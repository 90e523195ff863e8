"""Experts spread over a mesh of devices.

Everything here runs inside `jax.shard_map` with its check of which values differ between devices (`check_vma`), by
which gradients are summed where they must be and nowhere else.
"""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from eqx_moe.execution.base import AbstractExecution, ExpertFunction, Routing, check_factor
from eqx_moe.execution.exchange import departures, ragged, seat_of, seats
from eqx_moe.execution.grouped import Grouped
from eqx_moe.execution.layout import Layout, like_input, sum_over
from eqx_moe.sharding import EXPERT, check_devices

#: The names (`jax.ad_checkpoint.checkpoint_name`) of what collectives bring to the experts and back.
DISPATCHED, COMBINED = "moe_dispatched", "moe_combined"

#: A policy for `jax.checkpoint`: what came out of a collective is kept, so that the backward pass sends nothing twice.
save_collectives = jax.checkpoint_policies.save_only_these_names(DISPATCHED, COMBINED)

_METHODS = ("ring", "all_to_all", "ragged_all_to_all")

#: Platforms for which XLA has no `ragged_all_to_all` (jax 0.10 to 0.12).
_WITHOUT_RAGGED = ("cpu",)


@dataclasses.dataclass(frozen=True)
class ExpertParallel(AbstractExecution):
    """Each device along the mesh's axis `expert` holds and runs its share of the experts.

    Rows of the batch are split over `data` and `expert` as far as they divide; if `expert` does not divide them, it
    splits the sequence; else its devices have the same tokens. An expert's matrices are split over `tensor` along ffn
    where that divides it, and repeated where not.

    `method` says how tokens and experts meet, on a mesh whose axis `expert` splits the tokens:

    - `"ring"`: the devices along `expert` gather each other's tokens, run their own experts on them, and scatter the
      sums.
    - `"all_to_all"`: each device sends its tokens to those that hold their experts, in buffers of a fixed size. Without
      a `factor` they hold the worst case, and nothing is dropped; with it ceil(factor * mean) pairs for each receiver,
      the mean being all pairs / devices. What does not fit is dropped and counted; first choices of all tokens come
      before second choices, earlier tokens before later ones.
    - `"ragged_all_to_all"`: as before, but only what there is to send is sent. XLA has it on GPU and TPU, not on CPU.

    Where the axis does not split the tokens, each device runs its own experts on all of them, whatever the method.
    Partial sums are added in the dtype of `x`.

    `inner` is how one device runs its experts. An axis that the mesh lacks counts as one of size 1. A mesh, or inputs,
    with axes of the type Explicit are accepted too; the output then lies as `x` does.
    """

    mesh: Mesh
    method: str = "ring"
    inner: AbstractExecution = Grouped()
    factor: float | int | None = None

    def __post_init__(self):
        object.__setattr__(self, "mesh", check_devices(self.mesh))
        if self.method not in _METHODS:
            raise ValueError(f"`method` must be one of {list(_METHODS)}; got {self.method!r}.")
        if not isinstance(self.inner, AbstractExecution) or isinstance(self.inner, ExpertParallel):
            raise ValueError(
                "`inner` must be an execution for one device, an object such as `eqx_moe.execution.Grouped()`; got "
                f"{'an `ExpertParallel` in another' if isinstance(self.inner, ExpertParallel) else repr(self.inner)}."
            )
        if self.inner.by_row and self.method != "ring":
            raise ValueError(
                f"`inner={self.inner}` looks at whole rows, which `method={self.method!r}` takes apart. Use 'ring'."
            )
        if self.factor is not None and self.method != "all_to_all":
            raise ValueError(
                f"`factor` is the size of the buffers of `method='all_to_all'`; got factor={self.factor} with "
                f"method={self.method!r}, which has none."
            )
        if self.factor is not None:
            check_factor(self.factor, "or None to drop nothing")
        if self.method == "ragged_all_to_all" and self.mesh.devices.flat[0].platform in _WITHOUT_RAGGED:
            raise ValueError(
                f"`method={self.method!r}` does not exist on the platform of `mesh`, "
                f"{self.mesh.devices.flat[0].platform!r}. Use 'ring' or 'all_to_all'."
            )

    @property
    def by_row(self) -> bool:
        # Who finds a buffer full depends on who came before.
        return self.inner.by_row or self.factor is not None

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        routing: Routing,
        experts: ExpertFunction,
        mask: Bool[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq hidden"], Int[Array, ""]]:
        mesh = like_input(self.mesh, x)
        layout = Layout.of(mesh, x.shape[0], x.shape[1], experts)
        inputs = (x, routing.experts, routing.weights, mask, experts)
        tokens = layout.tokens
        specs = (tokens, tokens, tokens, tokens, layout.experts)
        explicit = AxisType.Explicit in mesh.axis_types
        if explicit:
            inputs = jax.tree.map(lambda leaf, spec: jax.reshard(leaf, NamedSharding(mesh, spec)), inputs, specs)

        def local(x, chosen, weights, mask, experts):
            experts = layout.vary(experts, layout.experts).share(layout.tensor_shards)
            arrays = layout.vary((x, chosen, weights, mask), (tokens, tokens, tokens, tokens))
            if layout.split is None or self.method == "ring":
                y, drops = _ring(self.inner, layout, *arrays, experts)
            elif self.method == "all_to_all":
                y, drops = _all_to_all(self.inner, layout, self.factor, *arrays, experts)
            else:
                y, drops = _ragged_all_to_all(self.inner, layout, *arrays, experts)
            return y, layout.sum_drops(drops, like=arrays[0])

        y, drops = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(tokens, PartitionSpec()))(*inputs)
        # With Explicit axes an output has to lie as what it is added to.
        return (jax.reshard(y, NamedSharding(mesh, jax.typeof(x).sharding.spec)) if explicit else y), drops


def _ring(inner: AbstractExecution, layout: Layout, x, chosen, weights, mask, experts: ExpertFunction):
    """All arrays are this device's part. Gather over `expert`, run the own experts, scatter the sums."""
    if layout.split is not None:
        gathered = lax.all_gather((x, chosen, weights, mask), EXPERT, axis=layout.split, tiled=True)
        x, chosen, weights, mask = checkpoint_name(gathered, DISPATCHED)
    visits = layout.local_choices(chosen, experts.num_experts)
    routing = Routing(visits, weights, layout.num_experts, layout.tensor_shards)
    y, drops = inner(x, routing, experts, mask)
    if layout.split is None:
        y = sum_over(y, layout.expert + layout.tensor)
    else:
        y = lax.psum_scatter(y, EXPERT, scatter_dimension=layout.split, tiled=True)
        y = sum_over(y, layout.tensor)
    return checkpoint_name(y, COMBINED), drops


def _pairs(layout: Layout, chosen: Int[Array, "batch seq k"], local_experts: int):
    """First choices of all tokens, then their second choices: the expert of each pair, and the device that holds it."""
    expert = chosen.reshape(-1, chosen.shape[-1]).T.reshape(-1)
    # Nowhere, the number of all experts, becomes the number of devices.
    return expert, expert // local_experts


def _run_received(inner: AbstractExecution, layout: Layout, rows, expert, weights, experts: ExpertFunction):
    """The own experts on rows that came for them; an `expert` past the last marks a row that is none."""
    expert = jnp.minimum(expert, experts.num_experts)[None, :, None]
    ones = jnp.ones_like(expert, dtype=weights.dtype)
    # As many pairs come as go, on average; the rest of the rows is room.
    routing = Routing(expert, ones, layout.num_experts, layout.tensor_shards, expected=min(weights.size, expert.size))
    y, drops = inner(rows[None], routing, experts, expert[..., 0] < experts.num_experts)
    return y[0], drops


def _combine(y: Float[Array, "pairs hidden"], ran: Bool[Array, " pairs"], weights, x):
    """Sum over the choices of each token."""
    k = weights.shape[-1]
    y = jnp.where(ran[:, None], y, 0).reshape(k, -1, x.shape[-1]).astype(weights.dtype)
    weights = jnp.where(ran.reshape(k, -1), weights.reshape(-1, k).T, 0)
    return jnp.einsum("kt,kth->th", weights, y).astype(x.dtype).reshape(x.shape)


def _all_to_all(inner: AbstractExecution, layout: Layout, factor, x, chosen, weights, mask, experts: ExpertFunction):
    """All arrays are this device's part. Send rows to their experts in buffers of one size, and the results back."""
    devices, tokens, k = layout.expert_shards, mask.size, chosen.shape[-1]
    # The choices of a token are distinct: no more of them meet on one device than it has experts.
    places = tokens * min(k, experts.num_experts)
    if factor is not None:
        places = min(places, math.ceil(Fraction(str(factor)) * tokens * k / devices))
    expert, to = _pairs(layout, chosen, experts.num_experts)
    queue = departures(to, devices)
    pair, taken = seats(queue, places)
    rows = jnp.where(taken[..., None], x.reshape(tokens, -1)[pair % tokens], 0)
    theirs = jnp.where(taken, expert[pair] - jnp.arange(devices)[:, None] * experts.num_experts, experts.num_experts)
    sent = lax.all_to_all((rows, theirs), EXPERT, split_axis=0, concat_axis=0, tiled=True)
    rows, mine = checkpoint_name(sent, DISPATCHED)

    y, drops = _run_received(inner, layout, rows.reshape(-1, rows.shape[-1]), mine.reshape(-1), weights, experts)
    y = lax.all_to_all(y.reshape(rows.shape), EXPERT, split_axis=0, concat_axis=0, tiled=True)
    y = checkpoint_name(y, COMBINED).reshape(-1, rows.shape[-1])
    at, seated = seat_of(queue, to, places)
    y = sum_over(_combine(y[at], seated, weights, x), layout.tensor)
    return checkpoint_name(y, COMBINED), drops + jnp.sum((to < devices) & ~seated, dtype=jnp.int32)


def _ragged_all_to_all(inner: AbstractExecution, layout: Layout, x, chosen, weights, mask, experts: ExpertFunction):
    """All arrays are this device's part. Send rows to their experts, as many as there are, and the results back."""
    devices, tokens, k = layout.expert_shards, mask.size, chosen.shape[-1]
    expert, to = _pairs(layout, chosen, experts.num_experts)
    queue = departures(to, devices)
    me = lax.axis_index(EXPERT)
    counts = checkpoint_name(lax.all_gather(queue.counts, EXPERT), DISPATCHED)
    there, back = ragged(counts, me)
    room = devices * tokens * min(k, experts.num_experts)
    # Outputs start from `zeros_like`, so that they differ by device as what is written into them does.
    rows = x.reshape(tokens, -1)[queue.order % tokens]
    received = jnp.zeros_like(rows, shape=(room, rows.shape[-1]))
    received = lax.ragged_all_to_all(rows, received, *there, axis_name=EXPERT)
    nobody = jnp.full_like(expert, layout.num_experts, shape=room)
    mine = lax.ragged_all_to_all(expert[queue.order], nobody, *there, axis_name=EXPERT)
    received, mine = checkpoint_name((received, mine), DISPATCHED)

    mine = layout.local_choices(mine, experts.num_experts)
    y, drops = _run_received(inner, layout, received, mine, weights, experts)
    y = lax.ragged_all_to_all(y, jnp.zeros_like(rows), *back, axis_name=EXPERT)
    y = checkpoint_name(y, COMBINED)[jnp.argsort(queue.order)]
    y = sum_over(_combine(y, to < devices, weights, x), layout.tensor)
    return checkpoint_name(y, COMBINED), drops
