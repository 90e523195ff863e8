"""The training step, the loop around it, and measuring."""

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped
from tqdm import tqdm

from eqx_moe.errors import EqxMoeError
from eqx_moe.models import plan_sharding, stack, unstack
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.stack import Stack
from eqx_moe.sharding import like_weights, put, replicate
from eqx_moe.train.batch import Batch
from eqx_moe.train.losses import loss

Metrics = dict[str, Shaped[Array, ""]]
Step = Callable[[Decoder, PyTree, Batch, PRNGKeyArray | None], tuple[Decoder, PyTree, Metrics]]


#: On one device deeper models train stacked. Scanning costs a tenth of a step on a CPU, compiling layer by layer a
#: second each. On a mesh all do: so the weights of one layer are gathered at a time.
_DEEP = 8


class DivergedError(EqxMoeError, ArithmeticError):
    """The loss or the gradient of a training step was not finite."""


def adamw(
    learning_rate: float,
    steps: int,
    *,
    warmup: int | None = None,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW as language models are usually trained: linear warm-up, cosine decay to a tenth, gradients clipped by
    their norm.

    Only matrices (and stacks of them) decay, not norms and biases. `warmup` is a twentieth of the steps by default.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be positive; got {steps}.")
    warmup = steps // 20 if warmup is None else warmup
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / (warmup + 1),
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=learning_rate / 10,
    )
    return optax.chain(
        _clip_by_global_norm(clip),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=are_matrices),
    )


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """As that of optax, but by one factor for all. Optax divides, multiplies and chooses for each number, which takes
    half of the update's time on CPU."""

    def clipped(grads: PyTree, params: PyTree | None) -> PyTree:
        factor = jnp.minimum(1, limit / optax.global_norm(grads))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(clipped)


def are_matrices(params: PyTree) -> PyTree[bool]:
    """True where a leaf is a matrix or a stack of matrices: what weight decay is for.

    The leading axis of stacked layers does not count: a stack of norms holds no matrix. Nor do the biases of experts,
    which are stacks of vectors.
    """

    def leaves(path: tuple[Any, ...], node: PyTree) -> PyTree[bool]:
        least = 2 if isinstance(node, Stack) else 1

        def is_matrix(inner: tuple[Any, ...], leaf: Any) -> bool:
            return leaf.ndim > least and not jax.tree_util.keystr((*path, *inner)).endswith("bias")

        return jax.tree_util.tree_map_with_path(is_matrix, node)

    return jax.tree_util.tree_map_with_path(leaves, params, is_leaf=lambda node: isinstance(node, Stack))


def init_optimizer(optimizer: optax.GradientTransformation, model: Decoder) -> PyTree:
    """The optimizer's state for a model's weights. On a mesh it is spread like the weights that it belongs to."""
    params = eqx.filter(model, eqx.is_inexact_array)
    if model.mesh is None:
        return optimizer.init(params)
    shardings = like_weights(jax.eval_shape(optimizer.init, params), plan_sharding(model, model.mesh))
    return jax.jit(optimizer.init, out_shardings=shardings)(params)


def make_step(optimizer: optax.GradientTransformation) -> Step:
    """One training step, compiled as one: `step(model, opt_state, batch, key) -> (model, opt_state, metrics)`.

    The model and the optimizer state that go in are donated: their memory is used again for those that come out, and
    neither may be used after the call. Nor may a model that `stack`, `unstack` or `with_options` made this one from:
    what they need not change is shared. (`fit` works on a copy.) What lies in a mapped file or in NumPy's memory is
    copied before the step runs, and let go. On a mesh the batch is spread over it, and both come out placed as they
    went in. If the loss or a gradient is not finite, both come out as they went in. The metrics are those of `loss`,
    `grad_norm`, and `finite`, which says whether the update was made.

    Of a model that is not what the latest call returned, and of the state beside it, the step raises a `ValueError` if
    an array was given to an earlier step or stands in two places.
    """

    @eqx.filter_jit(donate="all-except-first")
    def donating(given: tuple[Batch, PRNGKeyArray | None], model: Decoder, opt_state: PyTree):
        return update(optimizer, model, opt_state, *given)

    # An array of the model that the latest call gave: with it everything that comes lies in XLA's own memory.
    latest: weakref.WeakValueDictionary[str, Array] = weakref.WeakValueDictionary()

    def step(model: Decoder, opt_state: PyTree, batch: Batch, key: PRNGKeyArray | None = None):
        given = put(batch, model.mesh, rows=True), put(key, model.mesh)
        if model.embed.weight is not latest.get("embed"):
            # Not before the arguments are known to fit: it ends the caller's arrays.
            donating.lower(given, model, opt_state)
            model, opt_state = _owned(model, opt_state)
        model, opt_state, metrics = donating(given, model, opt_state)
        latest["embed"] = model.embed.weight
        return model, opt_state, metrics

    return step


def _owned(model: Decoder, opt_state: PyTree) -> tuple[Decoder, PyTree]:
    """Both in memory that XLA allocated: where they lie, or copied, an array at a time, from a mapped file or NumPy's.

    A program that is given memory of others copies all of it first, and holds both until it ends.
    """
    arrays, rest = eqx.partition((model, opt_state), eqx.is_array)
    paths: dict[int, str] = {}
    for (which, *path), leaf in jax.tree_util.tree_leaves_with_path(arrays):
        if isinstance(leaf, Tracer):
            return model, opt_state
        name = ("model", "opt_state")[which.idx] + jax.tree_util.keystr(tuple(path))
        if leaf.is_deleted():
            raise ValueError(f"`{name}` went into an earlier step and is gone; give what that step returned.")
        if id(leaf) in paths:
            raise ValueError(
                f"A step takes the memory of its arrays, and `{paths[id(leaf)]}` and `{name}` are one array; "
                "make one of them a copy."
            )
        paths[id(leaf)] = name
    return eqx.combine(jax.tree.map(_own, arrays), rest)


@functools.partial(jax.jit, donate_argnums=0)
def _own(leaf: Array) -> Array:
    return leaf


def update(
    optimizer: optax.GradientTransformation,
    model: Decoder,
    opt_state: PyTree,
    batch: Batch,
    key: PRNGKeyArray | None = None,
) -> tuple[Decoder, PyTree, Metrics]:
    """What `make_step` compiles."""
    (_, metrics), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, batch, key)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

    def updated():
        updates, new_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_state

    # A conditional, not a choice for each number: that takes three times as long on CPU, and copies of some weights.
    # Where the host decides it waits once a step, for what `fit` and most loops read anyway.
    new_params, new_state = jax.lax.cond(finite, updated, lambda: (params, opt_state))
    metrics = metrics | {"grad_norm": grad_norm, "finite": finite}
    if model.mesh is not None:
        plan = plan_sharding(model, model.mesh)
        new_params, new_state = (
            jax.lax.with_sharding_constraint(tree, like_weights(tree, plan)) for tree in (new_params, new_state)
        )
    return eqx.combine(new_params, rest), new_state, replicate(metrics, model.mesh)


def fit(
    model: Decoder,
    batches: Iterator[Batch],
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray | None = None,
    progress: bool = True,
    on_step: Callable[[int, Decoder, dict[str, float]], Any] | None = None,
) -> tuple[Decoder, list[dict[str, float]]]:
    """Trains a model for some steps.

    Args:
        model: left as it is; training works on a copy.
        batches: such as `batches(...)` of this package; one is taken a step.
        steps: how many.
        optimizer: such as `adamw(...)` of this package. Models of more than 8 layers, and all on a mesh, train as
            `eqx_moe.stack` makes them: an optimizer that looks at shapes (Muon, say) finds a leading axis there, as
            `are_matrices` knows.
        key: for the router's jitter; None trains without it.
        progress: a bar with the loss and tokens a second on stderr, where that is a terminal.
        on_step: called as `on_step(step, model, metrics)` after each step, which are counted from 1. The model is valid
            during the call only (the next step overwrites it), and may be stacked.

    Returns:
        The trained model, and the metrics of every step.

    Raises:
        DivergedError: if a loss or gradient is not finite, with the step. The update was not made.
        ValueError: if there are fewer batches than steps.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be positive; got {steps}.")
    given = {id(leaf) for leaf in jax.tree.leaves(model)}
    # Stacks that the caller made stay as they are.
    stacking = (model.depth > _DEEP or model.mesh is not None) and not any(isinstance(x, Stack) for x in model.layers)
    if stacking:
        model = stack(model, rematerialise=model.mesh is not None)
    # A step takes its model's memory; what `stack` has not copied is still the caller's.
    model = jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in given else leaf, model)
    opt_state = init_optimizer(optimizer, model)
    step_once = make_step(optimizer)
    history: list[dict[str, float]] = []
    tokens, began = 0, time.perf_counter()
    with tqdm(total=steps, desc="training", unit="step", disable=None if progress else True) as bar:
        for step in range(1, steps + 1):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"`batches` ended after {step - 1} of {steps} steps.")
            step_key = None if key is None else jax.random.fold_in(key, step)
            model, opt_state, traced = step_once(model, opt_state, batch, step_key)
            metrics = {name: float(value) for name, value in jax.device_get(traced).items()}
            if not metrics.pop("finite"):
                raise DivergedError(
                    f"Training diverged at step {step} of {steps}: loss {metrics['loss']}, gradient norm "
                    f"{metrics['grad_norm']}. The update of this step was not made. Lower the learning rate, or look "
                    "at the batch of this step and at the weights for values that are not finite."
                )
            history.append(metrics)
            if step == 1:
                began = time.perf_counter()  # The first step compiles; it says nothing about the speed.
            else:
                tokens += batch.tokens.size
            speed = tokens / max(time.perf_counter() - began, 1e-9)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(step, model, metrics)
    del opt_state
    return (unstack(model) if stacking else model), history


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    nats: float
    tokens: int
    nats_per_token: float
    nats_per_byte: float | None


def evaluate(
    model: Decoder, batches: Iterable[Batch], *, byte_count: int | None = None, progress: bool = False
) -> Evaluation:
    """The cross-entropy of a model on some batches, each counted token once; `byte_count` is the length of their text.

    Raises `ValueError` if no token is counted.
    """
    nats, tokens = 0.0, 0
    for batch in tqdm(batches, desc="measuring", unit="batch", leave=False, disable=None if progress else True):
        metrics = jax.device_get(_measure(model, put(batch, model.mesh, rows=True)))
        nats += float(metrics["cross_entropy"]) * int(metrics["tokens"])
        tokens += int(metrics["tokens"])
    if tokens == 0:
        raise ValueError("`batches` hold no token that is counted; nothing can be measured.")
    return Evaluation(
        nats=nats,
        tokens=tokens,
        nats_per_token=nats / tokens,
        nats_per_byte=None if byte_count is None else nats / byte_count,
    )


@eqx.filter_jit
def _measure(model: Decoder, batch: Batch) -> Metrics:
    return replicate(loss(model, batch)[1], model.mesh)
