"""Multi-head latent attention, both ways to compute it, against loops over rows and heads in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_moe.nn.attention import Rows
from eqx_moe.nn.mla import MLA
from eqx_moe.nn.rope import DefaultRope

HIDDEN, HEADS, NOPE, ROTATED, VALUE, RANK, Q_RANK = 22, 3, 7, 10, 5, 13, 17
SCALE, EPS = 0.31, 1e-6
BATCH, SEQ = 2, 9

each_latent = pytest.mark.parametrize("q_rank", [Q_RANK, None])
each_order = pytest.mark.parametrize("interleaved", [True, False])


def make(q_rank: int | None, interleaved: bool) -> MLA:
    """Nothing at its initial value."""
    layer = MLA(
        HIDDEN, heads=HEADS, nope=NOPE, rotated=ROTATED, value=VALUE, rank=RANK, q_rank=q_rank, bias=True,
        rope=DefaultRope(ROTATED, 100.0), interleaved=interleaved, scale=SCALE, norm_eps=EPS, std=0.3, dtype="float32",
        key=jax.random.key(0),
    )  # fmt: skip
    random = np.random.default_rng(4)
    return jax.tree.map(lambda leaf: leaf + 0.2 * random.normal(size=leaf.shape).astype(np.float32), layer)


def inputs():
    x = jnp.asarray(np.random.default_rng(7).normal(size=(BATCH, SEQ, HIDDEN)), jnp.float32)
    positions = jnp.asarray([np.arange(SEQ), np.arange(SEQ) + 4])
    return x, positions, DefaultRope(ROTATED, 100.0).tables(positions, jnp.full((BATCH, 1), SEQ, jnp.int32))


def oracle(layer: MLA, x, positions):
    """DeepSeek-V2 (2024), equations 9 to 19, one head and one query at a time."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layer)
    x = np.asarray(x, np.float64)

    def linear(part, x):
        return x @ part.weight.T + (0 if part.bias is None else part.bias)

    def norm(part, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * part.weight

    def turned(x, position):
        out = np.empty_like(x)
        for i in range(ROTATED // 2):
            a, b = (2 * i, 2 * i + 1) if layer.interleaved else (i, i + ROTATED // 2)
            angle = position * 100.0 ** (-2 * i / ROTATED)
            out[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
            out[b] = x[b] * np.cos(angle) + x[a] * np.sin(angle)
        return out

    rows = []
    for row, at in zip(x, np.asarray(positions), strict=True):
        queries = linear(weights.q, row if layer.q_a is None else norm(weights.q_a_norm, linear(weights.q_a, row)))
        both = linear(weights.kv_a, row)
        made = linear(weights.kv_b, norm(weights.kv_a_norm, both[:, :RANK])).reshape(SEQ, HEADS, NOPE + VALUE)
        keys = [turned(key, place) for key, place in zip(both[:, RANK:], at, strict=True)]
        out = np.zeros((SEQ, HEADS, VALUE))
        for i in range(SEQ):
            for h in range(HEADS):
                q = queries[i].reshape(HEADS, NOPE + ROTATED)[h]
                q = np.concatenate([q[:NOPE], turned(q[NOPE:], at[i])])
                scores = np.array([q @ np.concatenate([made[j, h, :NOPE], keys[j]]) for j in range(i + 1)]) * SCALE
                weight = np.exp(scores - scores.max())
                out[i, h] = weight / weight.sum() @ made[: i + 1, h, NOPE:]
        rows.append(linear(weights.o, out.reshape(SEQ, -1)))
    return np.stack(rows)


def whole() -> Rows:
    return Rows(jnp.ones((BATCH, SEQ), jnp.int32), None, None)


def at(start: int, seq: int, places: int) -> Rows:
    """So many tokens from a place on, with all that the cache holds up to them in one segment."""
    seen = jnp.broadcast_to((jnp.arange(places) < start + seq).astype(jnp.int32), (BATCH, places))
    return Rows(jnp.ones((BATCH, seq), jnp.int32), jnp.asarray(start), seen)


@each_latent
@each_order
def test_equals_loops(q_rank, interleaved):
    layer = make(q_rank, interleaved)
    x, positions, tables = inputs()
    found, cache = eqx.filter_jit(layer)(x, whole(), tables)
    assert cache is None
    np.testing.assert_allclose(found, oracle(layer, x, positions), rtol=2e-5, atol=2e-5)


@each_latent
def test_decoding_absorbs_and_a_long_prompt_does_not(q_rank, monkeypatch):
    """The same numbers both ways; a cache remembers one latent and one rotated key a place."""
    layer, taken = make(q_rank, True), []
    for way in ("_absorbed", "_expanded"):
        method = getattr(MLA, way)
        monkeypatch.setattr(MLA, way, lambda *args, way=way, method=method: taken.append(way) or method(*args))
    x, positions, (cos, sin) = inputs()
    expected = oracle(layer, x, positions)
    cache, start, parts = layer.init_cache(BATCH, 11, "float32", None), 0, []
    assert cache.entries.shape == (BATCH, 11, RANK + ROTATED)
    # Absorbed as long as queries * (2 * 13 - 12) is at most 13 * 12: up to 11 at once.
    for size in (7, 1, 1):
        part = slice(start, start + size)
        out, cache = layer(x[:, part], at(start, size, 11), (cos[:, part], sin[:, part]), cache)
        parts.append(out)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=2e-5, atol=2e-5)
    assert taken == ["_absorbed"] * 3
    np.testing.assert_array_equal(cache.entries[:, SEQ:], 0)

    pad = ((0, 0), (0, 12 - SEQ), (0, 0))
    x, cos, sin = (jnp.pad(each, pad) for each in (x, cos, sin))
    out, _ = layer(x, at(0, 12, 12), (cos, sin), layer.init_cache(BATCH, 12, "float32", None))
    np.testing.assert_allclose(out[:, :SEQ], expected, rtol=2e-5, atol=2e-5)
    assert taken[3:] == ["_expanded"]


@each_latent
def test_both_ways_have_the_same_gradients(q_rank):
    layer = make(q_rank, False)
    x, _, (cos, sin) = inputs()

    @eqx.filter_jit
    def gradients(layer, x, rows, cache):
        def value(inputs):
            layer, x = inputs
            return jnp.sum(jnp.sin(layer(x, rows, (cos, sin), cache)[0]))

        return jax.tree.leaves(eqx.filter_grad(value)((layer, x)))

    expanded = gradients(layer, x, whole(), None)
    absorbed = gradients(layer, x, at(0, SEQ, SEQ), layer.init_cache(BATCH, SEQ, "float32", None))
    for ours, theirs in zip(absorbed, expanded, strict=True):
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_bfloat16():
    layer = make(Q_RANK, True)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    x, positions, tables = inputs()
    out, _ = narrow(x.astype(jnp.bfloat16), whole(), tables)
    expected = oracle(layer, x, positions)
    assert out.dtype == jnp.bfloat16
    assert np.abs(np.asarray(out, np.float32) - expected).max() < 0.05 * np.abs(expected).max()
