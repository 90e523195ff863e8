"""The step and the loop: they learn, they repeat, they stop before anything is spoiled."""

import dataclasses
import itertools
import os
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import eqx_moe
from eqx_moe import train
from eqx_moe.checkpoint import reader
from eqx_moe.errors import EqxMoeError
from eqx_moe.train import Batch


@pytest.fixture(scope="module")
def optimizer():
    return train.adamw(1e-2, 30)


@pytest.fixture(scope="module")
def step(optimizer):
    """One compiled step for all tests that share the shapes of a batch."""
    return train.make_step(optimizer)


@pytest.fixture(scope="module")
def rows():
    documents = train.tokenize([tiny.TEXT], tiny.tokenizer(), vocab_size=tiny.CONFIG.vocab_size)
    return train.pack(documents, 19)


@pytest.fixture(scope="module")
def fitted(rows):
    model = tiny.model()
    seen = []
    tuned, history = train.fit(
        model,
        train.batches(rows, 3, seed=5),
        steps=30,
        optimizer=train.adamw(1e-2, 30),
        on_step=lambda step, model, metrics: seen.append((step, metrics["loss"])),
    )
    return model, tuned, history, seen


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_fit_learns_and_leaves_the_model_alone(fitted, rows):
    model, tuned, history, seen = fitted
    assert_equal(model, tiny.model())
    assert len(history) == 30 and seen == [(i, metrics["loss"]) for i, metrics in enumerate(history, start=1)]
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"] - 1
    assert set(history[0]) == {"loss", "cross_entropy", "aux_loss", "tokens", "max_violation", "drops", "grad_norm"}
    before, after = (train.evaluate(m, train.in_order(rows, 3)).nats_per_token for m in (model, tuned))
    assert after < before - 1


def test_fit_is_the_step_again_and_again_and_repeats_exactly(fitted, rows, optimizer, step):
    _, tuned, history, _ = fitted
    model, given = tiny.model(), train.batches(rows, 3, seed=5)
    state, same = train.init_optimizer(optimizer, model), []
    for _ in range(30):
        model, state, metrics = step(model, state, next(given), None)
        same.append({name: metrics[name].item() for name in history[0]})
    assert same == history
    assert_equal(model, tuned)


def test_step_is_the_gradient_step_written_out(rows):
    model, optimizer = tiny.model(tiny.DENSE), optax.sgd(0.1)
    batch = next(train.batches(rows, 2))
    grads, _ = eqx.filter_jit(eqx.filter_grad(train.loss, has_aux=True))(model, batch)
    expected = jax.tree.map(lambda weight, grad: weight - 0.1 * grad, model, grads)
    fresh = tiny.model(tiny.DENSE)
    stepped, _, metrics = train.make_step(optimizer)(fresh, train.init_optimizer(optimizer, fresh), batch, None)
    for x, y in zip(jax.tree.leaves(stepped), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)
    assert bool(metrics["finite"])


def test_step_donates_what_it_replaces(rows, optimizer, step):
    model = tiny.model()
    state = train.init_optimizer(optimizer, model)
    batch = next(train.batches(rows, 3))
    step(model, state, batch, None)
    assert model.embed.weight.is_deleted() and not batch.tokens.is_deleted()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim > 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_does_not_run_beside_the_file_that_the_weights_came_from(tmp_path, rows, monkeypatch):
    """The file is let go before, also when the step has run already, with another model."""
    monkeypatch.setattr(reader, "may_be_mapped", lambda path: True)
    monkeypatch.setattr(reader, "_LEAST_MAPPED", 1)
    eqx_moe.save_pretrained(tiny.model(), tmp_path, layout="original")
    file, seen = os.fspath(tmp_path / "model.safetensors"), []

    def is_mapped() -> bool:
        with open("/proc/self/maps") as maps:
            return any(file in line for line in maps)

    def look(updates, params):
        jax.debug.callback(lambda: seen.append(is_mapped()))
        return updates

    optimizer = optax.chain(optax.stateless(look), optax.sgd(0.1))
    step, batch = train.make_step(optimizer), next(train.batches(rows, 2))
    for _ in range(2):
        model = eqx_moe.from_pretrained(tmp_path)
        assert is_mapped()
        state = train.init_optimizer(optimizer, model)
        for _ in range(2):
            model, state, _ = step(model, state, batch)
        jax.effects_barrier()
    assert seen == [False] * 4


def test_a_first_step_that_fails_takes_nothing(rows, optimizer):
    model, batch = tiny.model(), next(train.batches(rows, 3))
    state, step = train.init_optimizer(optimizer, model), train.make_step(optimizer)
    with pytest.raises(ValueError):
        step(model, state, eqx.tree_at(lambda b: b.labels, batch, batch.labels[:, 1:]))
    tied = eqx.tree_at(lambda m: m.layers[0].ffn_norm.weight, model, model.norm.weight)
    with pytest.raises(
        ValueError, match=r"`model\.layers\[0\]\.ffn_norm\.weight` and `model\.norm\.weight` are one array"
    ):
        step(tied, state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((model, state)))
    _, _, metrics = step(model, state, batch)
    assert bool(metrics["finite"])
    with pytest.raises(ValueError, match=r"`model\.embed\.weight` went into an earlier step"):
        step(model, state, batch)


def bad_batch(batch: Batch) -> Batch:
    return eqx.tree_at(lambda b: b.tokens, batch, batch.tokens.at[0, 1].set(10**6))


def test_a_loss_that_is_not_finite_changes_nothing(rows, optimizer, step):
    model = tiny.model()
    state = train.init_optimizer(optimizer, model)
    kept = jax.tree.map(np.array, (model, state))
    batch = bad_batch(next(train.batches(rows, 3)))
    model, state, metrics = step(model, state, batch, None)
    assert not bool(metrics["finite"]) and np.isnan(metrics["loss"])
    assert_equal((model, state), kept)


@pytest.mark.parametrize("scale", [0, 0.01, 100])
def test_gradients_are_clipped_as_optax_clips_them(scale):
    random = np.random.default_rng(0)
    params = {"a": random.normal(size=(3, 5)), "b": random.normal(size=7)}
    grads = jax.tree.map(lambda leaf: jnp.asarray(scale * random.normal(size=leaf.shape), jnp.float32), params)
    decay = dict(b1=0.9, b2=0.95, weight_decay=0.1, mask=train.are_matrices)
    schedule = optax.warmup_cosine_decay_schedule(0.02 / 2, 0.02, 1, 20, 0.02 / 10)
    theirs = optax.chain(optax.clip_by_global_norm(0.7), optax.adamw(schedule, **decay))
    ours = train.adamw(0.02, 20, warmup=1, clip=0.7)
    found, expected = ours.init(params), theirs.init(params)
    for factor in (1, 0.003):
        given = jax.tree.map(lambda leaf, factor=factor: factor * leaf, grads)
        update, found = ours.update(given, found, params)
        other, expected = theirs.update(given, expected, params)
        # The update hardly depends on how large a gradient is; the moments do.
        assert eqx.tree_equal((update, found), (other, expected), rtol=1e-5, atol=1e-9)


def test_fit_stops_at_the_step_that_diverged(rows):
    good = train.batches(rows, 2)
    given = itertools.chain([next(good), next(good), bad_batch(next(good))], good)
    with pytest.raises(train.DivergedError, match=r"step 3 of 9.*nan") as caught:
        train.fit(tiny.model(tiny.DENSE), iter(given), steps=9, optimizer=optax.sgd(0.1))
    assert isinstance(caught.value, EqxMoeError)


def test_fit_says_when_batches_end(rows):
    two = itertools.islice(train.batches(rows, 2), 2)
    with pytest.raises(ValueError, match="after 2 of 3"):
        train.fit(tiny.model(tiny.DENSE), two, steps=3, optimizer=optax.sgd(0.1))


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_must_be_positive(rows, steps):
    with pytest.raises(ValueError, match="`steps`"):
        train.fit(tiny.model(tiny.DENSE), train.batches(rows, 2), steps=steps, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="`steps`"):
        train.adamw(1e-3, steps)


def test_the_key_reaches_the_router(rows):
    model = tiny.model(dataclasses.replace(tiny.CONFIG, router_jitter_noise=0.3))
    batch = next(train.batches(rows, 2))
    loss = eqx.filter_jit(train.loss)
    losses = [float(loss(model, batch, jax.random.key(seed))[0]) for seed in (0, 1, 0)]
    assert losses[0] != losses[1] and losses[0] == losses[2]


def test_adamw_decays_matrices_only():
    params = {"matrix": jnp.ones((2, 3)), "stack": jnp.ones((2, 3, 5)), "norm": jnp.ones(3)}
    optimizer = train.adamw(1e-2, 100, warmup=0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = jax.tree.map(lambda update: float(jnp.max(update)), updates)
    assert moved["norm"] == 0.0 and moved["matrix"] < 0 and moved["stack"] < 0


def test_evaluate(rows):
    model = tiny.model(tiny.DENSE)
    found = train.evaluate(model, train.in_order(rows, 2), byte_count=50)
    losses = [eqx.filter_jit(train.loss)(model, batch)[1] for batch in train.in_order(rows, 2)]
    nats = sum(float(metrics["cross_entropy"]) * int(metrics["tokens"]) for metrics in losses)
    assert found.tokens == sum(int(metrics["tokens"]) for metrics in losses)
    np.testing.assert_allclose([found.nats, found.nats_per_token], [nats, nats / found.tokens], rtol=1e-5)
    assert found.nats_per_byte == found.nats / 50
    assert train.evaluate(model, train.in_order(rows, 2)).nats_per_byte is None
    with pytest.raises(ValueError, match="no token"):
        train.evaluate(model, [])
