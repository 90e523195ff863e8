"""The loss: its parts against slow oracles, what it counts, and what it does not."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import eqx_moe
from eqx_moe.kernels import cross_entropy as kernel
from eqx_moe.nn.router_losses import load_balancing_loss
from eqx_moe.train import Batch, loss

IGNORE = -100


@pytest.fixture
def small_chunks(monkeypatch):
    """At most three rows of logits at a time."""
    monkeypatch.setattr(kernel, "_MAX_LOGITS", 3 * 13)


def inputs(tokens=11, hidden=5, vocab=13):
    keys = jax.random.split(jax.random.key(0), 3)
    labels = jax.random.randint(keys[2], (tokens,), 0, vocab).at[jnp.array([0, 4, 10])].set(IGNORE)
    return jax.random.normal(keys[0], (tokens, hidden)), jax.random.normal(keys[1], (vocab, hidden)), labels


def assert_same_as_oracle():
    hidden, unembedding, labels = inputs()
    scale = jnp.arange(1.0, 12.0)

    def total(function):
        return lambda *weights: jnp.sum(scale * function(*weights, labels))

    np.testing.assert_allclose(
        kernel.cross_entropy(hidden, unembedding, labels),
        kernel.cross_entropy_oracle(hidden, unembedding, labels),
        rtol=1e-5,
        atol=1e-6,
    )
    fast = jax.grad(total(kernel.cross_entropy), argnums=(0, 1))(hidden, unembedding)
    slow = jax.grad(total(kernel.cross_entropy_oracle), argnums=(0, 1))(hidden, unembedding)
    for ours, theirs in zip(fast, slow, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    def three_times(function):
        return lambda *weights: 3 * jnp.sum(function(*weights, labels))

    fast = jax.value_and_grad(three_times(kernel.cross_entropy_sum), argnums=(0, 1))(hidden, unembedding)
    slow = jax.value_and_grad(three_times(kernel.cross_entropy_oracle), argnums=(0, 1))(hidden, unembedding)
    for ours, theirs in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kernel.cross_entropy_sum(hidden, unembedding, labels), fast[0] / 3, rtol=1e-5)


def test_cross_entropy_in_one_piece():
    assert_same_as_oracle()


def test_cross_entropy_in_chunks(small_chunks):
    assert_same_as_oracle()


def test_a_vocabulary_larger_than_a_chunk_goes_row_by_row(monkeypatch):
    monkeypatch.setattr(kernel, "_MAX_LOGITS", 5)
    found, expected = kernel.cross_entropy(*inputs()), kernel.cross_entropy_oracle(*inputs())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_bfloat16_add_up_in_float32(monkeypatch):
    """Each of 1027 tokens adds a half. In bfloat16 a sum of ones ends at 256."""
    monkeypatch.setattr(kernel, "_MAX_LOGITS", 3 * 2)
    hidden, unembedding = jnp.ones((1027, 1), jnp.bfloat16), jnp.zeros((2, 1), jnp.bfloat16)
    gradient = jax.grad(lambda u: kernel.cross_entropy_sum(hidden, u, jnp.zeros(1027, jnp.int32)))(unembedding)
    assert gradient.ravel().tolist() == [-512, 512]


@pytest.mark.parametrize("function", [kernel.cross_entropy, kernel.cross_entropy_sum])
def test_chunks_hold_few_logits(function):
    hidden, unembedding = jnp.zeros((4096, 4)), jnp.zeros((50_000, 4))
    labels = jnp.zeros(4096, jnp.int32)

    def total(hidden, unembedding):
        return function(hidden, unembedding, labels).sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, unembedding).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 4096 * 50_000 * 4 / 2


@pytest.mark.parametrize("function", [kernel.cross_entropy, kernel.cross_entropy_oracle])
@pytest.mark.parametrize("label", [13, -1, -99, 10**6])
def test_a_label_outside_the_vocabulary_is_nan(function, label):
    hidden, unembedding, labels = inputs()
    nll = function(hidden, unembedding, labels.at[1].set(label))
    assert np.flatnonzero(np.isnan(nll)).tolist() == [1]


def test_cross_entropy_of_bfloat16_accumulates_in_float32():
    hidden, unembedding, labels = inputs()
    nll = kernel.cross_entropy(hidden.astype(jnp.bfloat16), unembedding, labels)
    exact = kernel.cross_entropy_oracle(hidden.astype(jnp.bfloat16), unembedding.astype(jnp.bfloat16), labels)
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, exact, rtol=1e-5, atol=1e-6)


def make_batch(rows: list[list[int]], segments: list[list[int]], labels: list[list[int]] | None = None) -> Batch:
    """A batch of 2 x 7, filled up with padding: one shape for all tests, so that little is compiled."""

    def fill(values: list[list[int]], padding: int):
        filled = np.full((2, 7), padding)
        for row, value in zip(filled, values, strict=False):
            row[: len(value)] = value
        return jnp.asarray(filled)

    return Batch(tokens=fill(rows, 0), segment_ids=fill(segments, 0), labels=fill(labels or rows, IGNORE))


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def jitted():
    return eqx.filter_jit(loss)


def test_loss_is_what_its_parts_say(model, jitted):
    rows = [[5, 9, 2, 7, 11, 3], [8, 1, 4, 6, 0, 0]]
    segments = [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]]
    batch = make_batch(rows, segments)
    total, metrics = jitted(model, batch)
    out = eqx.filter_jit(model.forward)(batch.tokens, segment_ids=batch.segment_ids)
    log_p = np.asarray(jax.nn.log_softmax(model.unembed(out.hidden)))
    places = [(0, 0), (0, 1), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2)]
    nll = [-log_p[r, i, rows[r][i + 1]] for r, i in places]
    np.testing.assert_allclose(metrics["cross_entropy"], np.mean(nll), rtol=1e-5)
    assert int(metrics["tokens"]) == len(places)
    aux = load_balancing_loss(out.router.logits, 2, batch.segment_ids != 0)
    np.testing.assert_allclose(metrics["aux_loss"], aux, rtol=1e-6)
    np.testing.assert_allclose(total, np.mean(nll) + 0.02 * aux, rtol=1e-5)
    assert total == metrics["loss"]
    np.testing.assert_allclose(metrics["max_violation"], out.router.stats[0].max_violation, rtol=1e-6)
    assert set(metrics) == {"loss", "cross_entropy", "tokens", "aux_loss", "max_violation", "drops"}
    assert metrics["drops"] == 0


def test_drops_and_violations_of_all_layers_are_logged(jitted):
    """The worst load of each layer, the mean over layers; and the sum of what they dropped."""
    model = tiny.model(dataclasses.replace(tiny.CONFIG, num_hidden_layers=2))
    model = eqx_moe.with_options(model, execution=eqx_moe.execution.Capacity(0.5))
    batch = make_batch([[5, 9, 2, 7, 11, 3], [8, 1, 4]], [[1] * 6, [1] * 3])
    _, metrics = jitted(model, batch)
    router = eqx.filter_jit(model.forward)(batch.tokens, segment_ids=batch.segment_ids).router
    loads = [np.asarray(stats.tokens_per_expert) for stats in router.stats]
    assert [load.sum() for load in loads] == [18, 18]
    np.testing.assert_allclose(
        metrics["max_violation"], np.mean([load.max() / (18 / 5) - 1 for load in loads]), rtol=1e-5
    )
    # An expert has ceil(0.5 * 2 * 6 / 5) = 2 places and 1: for 12 and 6 pairs there are 10 and 5 places.
    assert metrics["drops"] == sum(int(drops) for drops in router.drops) and metrics["drops"] >= 2 * 3


def test_packed_segments_count_as_rows_of_their_own(model, jitted):
    packed = make_batch([[5, 9, 2, 7, 11, 3, 0]], [[1, 1, 1, 2, 2, 2, 0]])
    apart = make_batch([[5, 9, 2], [7, 11, 3]], [[1, 1, 1], [1, 1, 1]])
    for name, value in jitted(model, packed)[1].items():
        np.testing.assert_allclose(value, jitted(model, apart)[1][name], rtol=1e-5)


def test_labels_stand_at_their_tokens_and_can_be_left_out(model, jitted):
    rows, segments = [[5, 9, 2, 7]], [[1, 1, 1, 1]]
    _, all_ = jitted(model, make_batch(rows, segments))
    _, some = jitted(model, make_batch(rows, segments, [[IGNORE, IGNORE, 2, IGNORE]]))
    assert (int(all_["tokens"]), int(some["tokens"])) == (3, 1)
    log_p = jax.nn.log_softmax(eqx.filter_jit(model)(make_batch(rows, segments).tokens))
    np.testing.assert_allclose(some["cross_entropy"], -log_p[0, 1, 2], rtol=1e-5)


def test_nothing_to_predict_is_zero_and_has_finite_gradients(model):
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    for segments in ([[1, 1, 1]], [[0, 0, 0]], [[1, 2, 3]]):
        batch = make_batch([[5, 9, 2]], segments, [[IGNORE] * 3])
        (total, metrics), grads = gradient(model, batch)
        assert (float(total), int(metrics["tokens"])) == (0.0, 0)
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))


def test_dense_models_have_no_aux_loss(jitted):
    total, metrics = jitted(tiny.model(tiny.DENSE), make_batch([[5, 9, 2]], [[1, 1, 1]]))
    assert set(metrics) == {"loss", "cross_entropy", "tokens"} and total == metrics["cross_entropy"]


def test_a_bad_id_is_nan_under_jit_and_an_error_outside(model, jitted):
    bad = make_batch([[5, 283, 2]], [[1, 1, 1]])
    assert np.isnan(jitted(model, bad)[0])
    with pytest.raises(ValueError, match=r"\[0, 283\)"):
        loss(model, bad)
