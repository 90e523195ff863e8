"""Attention: every way to compute it against the oracle, in value and gradients; what it costs; which way is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqx_moe.kernels import attention as dispatch
from eqx_moe.kernels import flash
from eqx_moe.kernels.attention import attention, attention_oracle, choose
from eqx_moe.kernels.flash import flash_attention

CHUNK = 5

# (batch, heads, kv_heads, queries, keys, head_dim, value_dim, window, sinks): lengths that are no multiples of a chunk,
# one query, windows of one place, of a chunk and of everything, one key-value head to as many as queries, caches.
SHAPES = [
    (2, 4, 2, 13, 13, 7, 7, None, False),
    (1, 6, 3, 17, 17, 4, 9, None, True),
    (2, 3, 1, 11, 11, 5, 5, 1, False),
    (1, 3, 3, 16, 16, 7, 7, 4, True),
    (2, 4, 1, 19, 19, 3, 3, 5, False),
    (1, 2, 2, 12, 12, 5, 5, 11, True),
    (1, 2, 1, 12, 12, 5, 3, 40, False),
    (2, 6, 2, 1, 1, 4, 4, None, True),
    (3, 4, 2, 1, 14, 7, 7, None, True),
    (2, 5, 5, 1, 21, 3, 3, 6, False),
    (2, 6, 3, 7, 23, 5, 5, None, True),
    (1, 8, 4, 10, 31, 6, 6, 9, False),
]


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Chunks of five places, so that short rows have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "CHUNK", CHUNK)
        patch.setattr(dispatch, "CHUNK", CHUNK)
        yield


@st.composite
def rows(draw, batch: int, length: int):
    """Segments of rows: packed, padded on either side or in the middle, all padding, or segments that come back."""
    found = np.zeros((batch, length), np.int32)
    for r in range(batch):
        cuts = sorted(draw(st.lists(st.integers(0, length), min_size=3, max_size=3)))
        for ids, part in zip(draw(st.permutations([0, 1, 2, 1])), np.split(np.arange(length), cuts), strict=True):
            found[r, part] = ids
    return found


@st.composite
def cases(draw, shapes=SHAPES):
    shape = draw(st.sampled_from(shapes))
    batch, queries, keys = shape[0], shape[3], shape[4]
    start = draw(st.integers(0, keys - queries))
    segments = draw(rows(batch, keys)) if draw(st.booleans()) else np.ones((batch, keys), np.int32)
    return shape, start, segments, draw(st.integers(0, 2**31 - 1))


def arrays(shape, seed: int):
    """q, k, v, sinks and the output's gradient. Some scores are large: the softmax must not overflow."""
    batch, heads, kv_heads, queries, keys, head_dim, value_dim, _, sinks = shape
    random = np.random.default_rng(seed)
    sizes = [(heads, queries, head_dim), (kv_heads, keys, head_dim), (kv_heads, keys, value_dim)]
    q, k, v, d_out = (random.normal(size=(batch, *size)) for size in (*sizes, (heads, queries, value_dim)))
    q *= random.choice([0.1, 1.0, 10.0], size=(batch, heads, queries, 1))
    sinks = random.normal(size=heads) * 3 if sinks else None
    return [None if x is None else x.astype(np.float32) for x in (q, k, v, sinks, d_out)]


@functools.partial(jax.jit, static_argnames=("function", "window"))
def value_and_gradients(function, q, k, v, sinks, d_out, start, query_segments, key_segments, window):
    def call(q, k, v, sinks):
        return function(
            q, k, v, sinks=sinks, scale=0.7, start=start, window=window,
            query_segments=query_segments, key_segments=key_segments,
        )  # fmt: skip

    out, pull = jax.vjp(call, q, k, v, sinks)
    return out, *(x for x in pull(d_out) if x is not None)


def segments_of_queries(segments, shape, start: int):
    return segments[:, start : start + shape[3]]


def assert_close(found, expected, tolerance=1e-5):
    """Within 1e-5 of the largest entry. Also refuses NaN."""
    for name, ours, theirs in zip(("out", "d_q", "d_k", "d_v", "d_sinks"), found, expected, strict=False):
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
        assert error <= tolerance * max(1.0, np.abs(np.asarray(theirs)).max()), name


def reference(q, k, v, sinks, start, segments, window):
    """Attention one query at a time, in float64."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, i in np.ndindex(*q.shape[:3]):
        g = h // (q.shape[1] // k.shape[1])
        seen = [
            j
            for j in range(k.shape[2])
            if 0 <= start + i - j < (window or 10**9) and segments[b, j] == segments[b, start + i]
        ]
        logits = [float(q[b, h, i].astype(float) @ k[b, g, j].astype(float)) * 0.7 for j in seen]
        logits = np.array(logits + ([] if sinks is None else [sinks[h]]))
        weights = np.exp(logits - logits.max())
        out[b, h, i] = (weights / weights.sum())[: len(seen)] @ v[b, g, seen]
    return out


@pytest.mark.parametrize("function", [attention_oracle, flash_attention, attention])
@given(cases())
@settings(max_examples=24, deadline=None)
def test_attention_is_what_it_says(function, case):
    shape, start, segments, seed = case
    q, k, v, sinks, d_out = arrays(shape, seed)
    mine = segments_of_queries(segments, shape, start)
    out, *_ = value_and_gradients(function, q, k, v, sinks, d_out, start, mine, segments, shape[7])
    assert_close([out], [reference(q, k, v, sinks, start, segments, shape[7])])


@pytest.mark.parametrize("function", [flash_attention, attention])
@given(cases())
@settings(max_examples=48, deadline=None)
def test_value_and_gradients_equal_the_oracle(function, case):
    shape, start, segments, seed = case
    inputs = arrays(shape, seed)
    where = start, segments_of_queries(segments, shape, start), segments, shape[7]
    assert_close(value_and_gradients(function, *inputs, *where), value_and_gradients(attention_oracle, *inputs, *where))
