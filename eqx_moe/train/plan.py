"""What a training step takes on a mesh, from shapes alone: bytes on a device, and bytes that it sends."""

import dataclasses
import math

import equinox as eqx
import jax
import numpy as np
import optax

from eqx_moe.models import plan_sharding, stack, unstack
from eqx_moe.nn.block import Block
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.mla import MLA
from eqx_moe.nn.stack import Stack, blocks_of
from eqx_moe.sharding import (
    DATA,
    EXPERT,
    TENSOR,
    AnyMesh,
    Placement,
    Plan,
    expert_split,
    like_weights,
    rows_axes,
    without_data,
)

# How often each part of a layer is there at once when the backward pass takes most, and the embedding and the head all
# the while: what XLA's CPU back end makes of the step (jax 0.10.2), rounded. tests/test_train_plan.py compares.
# Experts have a row for each pair (token, expert) that an expert of the device may take; what comes of them is put back
# in the place of all pairs of the tokens.
_WEIGHTS, _VOCAB, _ATTENTION_ROWS, _FFN_ROWS, _HIDDEN_ROWS, _EXPERT_ROWS, _COMBINED_ROWS = 2.25, 3, 1, 4.5, 5, 4, 2

# The part of all weights that is there once more, laid out to be gathered or about to be updated.
_COPIED = 0.4

# Hidden states beside these where layers are split over `tensor`: each product has its own gradient for what it reads.
_PARTIAL_SUMS = 8


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Bytes of a training step on one device; `str` gives them as a table. See `plan_step`.

    `weights`, `optimizer` and `batch` are there between steps, and exact. The others are estimates of what a step takes
    beside them: `gradients`; `copies` (XLA holds some weights twice, to gather or to update them); `kept`, what the
    forward pass leaves for the backward pass; `working`, what one layer, the embedding and the head take at once.
    `sent` are the bytes that a device sends in a step, by purpose, with collectives that go around a ring.
    """

    sharding: Plan
    rows: int
    length: int
    weights: int
    optimizer: int
    batch: int
    gradients: int
    copies: int
    kept: int
    working: int
    sent: dict[str, int]

    @property
    def arguments(self) -> int:
        """What stays between steps."""
        return self.weights + self.optimizer + self.batch

    @property
    def temporaries(self) -> int:
        """What a step takes beside its arguments."""
        return self.gradients + self.copies + self.kept + self.working

    def __str__(self) -> str:
        taken = {
            "weights": self.weights,
            "optimizer state": self.optimizer,
            "batch": self.batch,
            "gradients (estimated, as all below)": self.gradients,
            "copies of weights": self.copies,
            "activations kept for the backward pass": self.kept,
            "activations and weights at work": self.working,
            "all": self.arguments + self.temporaries,
        }
        lines = [f"a training step of {self.rows} rows of {self.length} tokens, bytes per device"]
        lines += _table(taken)
        lines += ["sent by a device in a step, bytes", *_table({**self.sent, "all": sum(self.sent.values())})]
        return "\n".join(lines)


def _table(rows: dict[str, int]) -> list[str]:
    unit, divisor = ("GiB", 2**30) if max(rows.values()) >= 2**30 else ("MiB", 2**20)
    return [f"  {name:<40} {size:>22,}  {size / divisor:>10,.2f} {unit}" for name, size in rows.items()]


def plan_step(
    model: Decoder, mesh: AnyMesh, *, rows: int, length: int, optimizer: optax.GradientTransformation
) -> StepPlan:
    """Plans one step of `make_step` on a mesh, without a device or a weight.

    The step is planned as `fit` makes it on a mesh: layers stacked and rematerialised, experts in a ring. (`fit` itself
    leaves the model that it is given as it is: as long as somebody holds that, its weights are there once more.)

    Args:
        model: a model, or what `eqx_moe.models.skeleton` gives; weights and activations in its dtype.
        mesh: an `AbstractMesh` will do.
        rows, length: the batch of a step, on all devices together.
        optimizer: its state is planned as `init_optimizer` makes it.

    Raises:
        ValueError: what `plan_sharding` refuses.
    """
    if rows < 1 or length < 1:
        raise ValueError(f"`rows` and `length` must be at least 1; got {rows=} and {length=}.")
    model = eqx.filter_eval_shape(unstack, model)
    sharding = plan_sharding(model, mesh)
    state = jax.eval_shape(optimizer.init, model)
    places = jax.tree.leaves(like_weights(state, sharding))
    held = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for place, leaf in zip(places, jax.tree.leaves(state), strict=True)
    )
    step = _Step(model, sharding, rows, length)
    layers = [step.layer(i, block) for i, block in enumerate(model.layers)]
    again, once = _turns(model, layers)
    vocabulary = [step.weight(place) for path, place in sharding.items() if path.split(".")[0] in _ENDS]
    return StepPlan(
        sharding=sharding,
        rows=rows,
        length=length,
        weights=sharding.bytes_per_device,
        optimizer=held,
        # Tokens, segments and labels.
        batch=3 * step.tokens * 4,
        gradients=sharding.bytes_per_device,
        copies=int(_COPIED * sharding.bytes_per_device),
        # What is not computed again stays, all of it.
        kept=sum(layer.kept for layer in layers) + sum(map(_working, once)),
        working=max(map(_working, again), default=0) + _VOCAB * max(weight.gathered for weight in vocabulary),
        sent=step.sent(layers, vocabulary),
    )


def _turns(model: Decoder, layers: list["_Layer"]) -> tuple[list[list["_Layer"]], list[list["_Layer"]]]:
    """The layers that a turn of each scan runs, which the backward pass computes again; and those in no stack."""
    again, once, first = [], [], 0
    for layer in eqx.filter_eval_shape(stack, model).layers:
        turns = again if isinstance(layer, Stack) else once
        turns.append(layers[first : first + len(blocks_of(layer))])
        first += layer.count if isinstance(layer, Stack) else 1
    return again, once


def _working(turn: list["_Layer"]) -> int:
    """XLA gathers the weights of all layers of a turn, and runs one after the other."""
    gathered = sum(weight.gathered for layer in turn for weight in layer.weights)
    return int(_WEIGHTS * gathered) + max(layer.working for layer in turn)


# The parts that have a row of weights for each id, and the norm between.
_ENDS = ("embed", "head", "norm")


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Bytes of one weight on a device, gathered along `data`; what it sends to gather it, and to add its gradient."""

    gathered: int
    to_gather: float
    to_add: float


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Bytes of a layer on a device; `working` is without the weights."""

    weights: list[_Weight]
    kept: int
    working: int
    to_experts: float
    over_tensor: float


class _Step:
    """A step's batch on a mesh, as one device has it."""

    def __init__(self, model: Decoder, sharding: Plan, rows: int, length: int):
        self.sharding = sharding
        self.ways = {axis: sharding.mesh.shape.get(axis, 1) for axis in (DATA, EXPERT, TENSOR)}
        self.axes = rows_axes(sharding.mesh, rows)
        split = math.prod(self.ways[axis] for axis in self.axes)
        self.tokens = rows // split * length
        self.width = model.embed.weight.shape[1]
        self.itemsize = np.dtype(model.embed.weight.dtype).itemsize
        self.meet = self.ways[EXPERT] > 1 and expert_split(sharding.mesh, rows, length) is not None

    def rows(self, width: int, tokens: int | None = None) -> int:
        """Bytes of so many numbers for each of the tokens, by default those of the device."""
        return (self.tokens if tokens is None else tokens) * width * self.itemsize

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states of all tokens of the device."""
        return self.rows(self.width)

    def weight(self, place: Placement) -> _Weight:
        gathered = place.bytes_per_device * (self.ways[DATA] if DATA in place.spec else 1)
        apart = math.prod(self.ways[axis] for axis in self.axes if axis != EXPERT or EXPERT not in place.spec)
        to_gather = gathered * _others(self.ways[DATA]) if DATA in place.spec else 0.0
        return _Weight(gathered, to_gather, 2 * gathered * _others(apart))

    def layer(self, i: int, block: Block) -> _Layer:
        at = f"layers.{i}."
        weights = [self.weight(place) for path, place in self.sharding.items() if path.startswith(at)]
        working = _PARTIAL_SUMS * self.hidden if self.ways[TENSOR] > 1 else 0
        kept, to_experts = self.hidden, 0.0
        # Queries, keys, values and what comes of them; and added up: what attention gives, once more when it is
        # computed again, and the gradient of what each map reads.
        mla = isinstance(block.attention, MLA)
        maps = [f"{at}attention.{name}.weight" for name in (("q", "kv_b") if mla else ("q", "k", "v"))]
        o = f"{at}attention.o.weight"
        # Of latents keys are put together anew, as wide as queries.
        made = [self.shape(path)[-2] for path in [*maps, *maps[:mla]]] + [self.shape(o)[-1]]
        working += _ATTENTION_ROWS * self.rows(sum(made))
        added = 2 * self.added(o) + sum(map(self.read, maps))
        for mlp in ("mlp", "moe.shared"):
            gate, up, down = (f"{at}{mlp}.{name}.weight" for name in ("gate", "up", "down"))
            if gate in self.sharding:
                working += _FFN_ROWS * self.rows(self.shape(gate)[-2])
                added += self.added(down) + self.read(gate) + self.read(up)
        if block.moe is None:
            working += _HIDDEN_ROWS * self.hidden
        else:
            together = self.tokens * (self.ways[EXPERT] if self.meet and EXPERT in self.axes else 1)
            gate, k = f"{at}moe.experts.gate", block.moe.router.k
            experts, ffn, hidden = self.shape(gate)[0], self.shape(gate)[1], self.width
            pairs = together * min(k, experts)
            working += _EXPERT_ROWS * self.rows(ffn, pairs) + _COMBINED_ROWS * self.rows(hidden, together * k)
            if block.moe.experts.gate_bias is not None:
                # Each pair's bias of each of the three maps.
                working += self.rows(2 * ffn + hidden, pairs)
            # What the experts give, and the gradient of what they read, as one.
            added += 2 * self.hidden if TENSOR in self.sharding[gate].spec else 0
            # What the experts gave, and the router's logits, which are float32.
            kept += self.hidden + 4 * self.tokens * self.sharding[gate].shape[0]
            if self.meet:
                # Gathered and scattered, forward and backward; of these the tokens and the results are kept.
                to_experts = 4 * self.rows(hidden, together) * _others(self.ways[EXPERT])
                kept += self.rows(hidden, together)
        return _Layer(weights, kept, int(working), to_experts, 2 * added * _others(self.ways[TENSOR]))

    def shape(self, path: str) -> tuple[int, ...]:
        """Of a device's part of a weight, gathered along `data`."""
        place = self.sharding[path]
        return without_data(place.sharding).shard_shape(place.shape)

    def read(self, path: str) -> int:
        """Bytes of what a map reads, if `tensor` splits what it gives: then each device has a part of its gradient."""
        out_split, shape = self.sharding[path].spec[-2], self.sharding[path].shape
        return self.rows(shape[-1]) if out_split == TENSOR else 0

    def added(self, path: str) -> int:
        """Bytes of what a map gives, if `tensor` splits what it reads: then each device has a part of it."""
        in_split, shape = self.sharding[path].spec[-1], self.sharding[path].shape
        return self.rows(shape[-2]) if in_split == TENSOR else 0

    def sent(self, layers: list[_Layer], vocabulary: list[_Weight]) -> dict[str, int]:
        inner = [weight for layer in layers for weight in layer.weights]
        gathering = 2 * sum(weight.to_gather for weight in inner) + sum(weight.to_gather for weight in vocabulary)
        # The embedding's output and the gradient of what the head reads.
        tensor = 2 * 2 * self.hidden * _others(self.ways[TENSOR])
        return {
            "to gather weights along data": int(gathering),
            "to add gradients": int(sum(weight.to_add for weight in [*inner, *vocabulary])),
            "to bring tokens and experts together": int(sum(layer.to_experts for layer in layers)),
            "to add activations along tensor": int(tensor + sum(layer.over_tensor for layer in layers)),
        }


def _others(ways: int) -> float:
    """The share of a whole that a device gets from others, each of them holding as much."""
    return (ways - 1) / ways
