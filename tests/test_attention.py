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
from eqx_moe.nn.cache import LayerCache

CHUNK = 5
NAMES = ("out", "d_q", "d_k", "d_v", "d_sinks")

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
def cases(draw, shapes):
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


def assert_close(found, expected, tolerance):
    """Within a part of the largest entry. Also refuses NaN."""
    for name, ours, theirs in zip(NAMES, found, expected, strict=False):
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
        assert error <= tolerance * max(1.0, np.abs(np.asarray(theirs)).max()), name


def assert_exact(found, exact):
    """Each entry within 1e-5 of the sum of its terms' sizes: rounding is relative to these, also where they cancel."""
    for name, ours, (theirs, sizes) in zip(NAMES, found, exact, strict=False):
        assert (np.abs(np.asarray(ours) - theirs) <= 1e-5 * sizes + 1e-9).all(), name


def where_all_is_seen(shape):
    """No cache, no segments: the keys are the queries' own."""
    return None, None, None, shape[7]


def exact(q, k, v, sinks, d_out, start, segments, window):
    """The value and the gradients in float64, each with the sum of the absolute values of its terms."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    (batch, heads, queries, _), (_, kv_heads, keys, _) = q.shape, k.shape
    k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    back = start + np.arange(queries)[:, None] - np.arange(keys)
    same = segments[:, start : start + queries, None] == segments[:, None, :]
    seen = (0 <= back) & (back < (window or keys)) & same
    logits = np.where(seen[:, None], 0.7 * q @ k.swapaxes(2, 3), -np.inf)
    sink = np.full((1, heads, 1, 1), -np.inf) if sinks is None else sinks.astype(np.float64)[:, None, None]
    top = np.maximum(logits.max(-1, keepdims=True), sink)
    total = np.exp(logits - top).sum(-1, keepdims=True) + np.exp(sink - top)
    p, p_sink = np.exp(logits - top) / total, np.exp(sink - top) / total

    def sums(q, k, v, d_out, minus):
        """With absolute values in and no `minus`, the sizes of the terms of what it gives else."""
        out = p @ v
        own = np.sum(d_out * out, axis=-1, keepdims=True)
        d_logits = 0.7 * p * (d_out @ v.swapaxes(2, 3) + minus * own)
        d_k, d_v = (
            (left.swapaxes(2, 3) @ right).reshape(batch, kv_heads, -1, keys, right.shape[-1]).sum(2)
            for left, right in ((d_logits, q), (p, d_out))
        )
        return out, d_logits @ k, d_k, d_v, minus * np.sum(p_sink * own, axis=(0, 2, 3))

    values, sizes = sums(q, k, v, d_out, -1), sums(*map(np.abs, (q, k, v, d_out)), 1)
    return list(zip(values, sizes, strict=True))


# The choice among them leads to `flash_attention` for all but one query.
ONE_QUERY = [shape for shape in SHAPES if shape[3] == 1]


@pytest.mark.parametrize(
    "function, shapes", [(attention_oracle, SHAPES), (flash_attention, SHAPES), (attention, [*ONE_QUERY, SHAPES[10]])]
)
@given(data=st.data())
@settings(max_examples=48, deadline=None)
def test_value_and_gradients_are_exact(function, shapes, data):
    shape, start, segments, seed = data.draw(cases(shapes))
    inputs = arrays(shape, seed)
    mine = segments_of_queries(segments, shape, start)
    found = value_and_gradients(function, *inputs, start, mine, segments, shape[7])
    assert_exact(found, exact(*inputs, start, segments, shape[7]))


WITHOUT_CACHE = [shape for shape in SHAPES if shape[3] == shape[4]]


@pytest.mark.parametrize(
    "function, shape", [*((flash_attention, shape) for shape in WITHOUT_CACHE), (attention, WITHOUT_CACHE[1])]
)
def test_rows_without_segments_are_exact(function, shape):
    inputs, segments = arrays(shape, 7), np.ones((shape[0], shape[4]), np.int32)
    found = value_and_gradients(function, *inputs, *where_all_is_seen(shape))
    assert_exact(found, exact(*inputs, 0, segments, shape[7]))


@pytest.mark.parametrize("function", [attention_oracle, flash_attention, attention])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[8], SHAPES[9]])
def test_a_query_that_sees_nothing_gets_zeros_and_no_nan(function, shape):
    """Also in the gradients, and where scores overflow any exponential."""
    q, *rest = arrays(shape, 3)
    segments = np.ones((shape[0], shape[4]), np.int32)
    mine = np.ones((shape[0], shape[3]), np.int32)
    mine[:, 0] = 5
    found = value_and_gradients(function, q * 1e4, *rest, np.int32(0), mine, segments, shape[7])
    assert np.all(np.asarray(found[0])[:, :, 0] == 0)
    assert all(np.all(np.isfinite(x)) for x in found)


@pytest.mark.parametrize("function", [attention_oracle, flash_attention, attention])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[10], SHAPES[8]])
def test_bfloat16_accumulates_in_float32(function, shape):
    exact = arrays(shape, 11)
    half = [None if x is None else jnp.asarray(x, jnp.bfloat16) for x in exact]
    segments = np.ones((shape[0], shape[4]), np.int32)
    where = np.int32(shape[4] - shape[3]), segments[:, : shape[3]], segments, shape[7]
    found = value_and_gradients(function, *half, *where)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    rounded = [None if x is None else np.asarray(x, np.float32) for x in half]
    expected = value_and_gradients(attention_oracle, *rounded, *where)
    assert_close([np.asarray(x, np.float32) for x in found], expected, tolerance=0.04)


def temporary_bytes(length: int, window: int | None = None) -> int:
    """What the forward and the backward pass need besides their arguments and results."""
    q, kv = jnp.zeros((1, 2, length, 4)), jnp.zeros((1, 1, length, 4))
    call = functools.partial(flash_attention, scale=1.0, window=window)
    memory = (
        jax.jit(jax.grad(lambda *x: call(*x).sum(), argnums=(0, 1, 2))).lower(q, kv, kv).compile().memory_analysis()
    )
    assert memory is not None
    return memory.temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    short, middle, long = (temporary_bytes(length) for length in (500, 1000, 2000))
    assert long - middle <= 2.2 * (middle - short)
    assert long < 2 * 2000 * 2000 * 4 / 10


def visited(queries: int, keys: int, window: int | None, start: int) -> int:
    """How many pairs of chunks are visited."""
    cut = flash._Cut(CHUNK, CHUNK, -(-keys // CHUNK), 1.0, window)
    bounds = (cut.met_by(i, start) for i in range(-(-queries // CHUNK)))
    return sum(max(0, int(end) - int(begin)) for begin, end in bounds)


def test_masked_chunks_are_skipped():
    assert visited(50, 50, None, 0) == 55  # of 100
    assert visited(50, 50, 5, 0) == 19  # the chunk itself and the one before
    assert visited(50, 50, 1, 0) == 10
    assert visited(5, 500, None, 0) == 1  # a cache of 500 places, its first five being filled
    assert visited(5, 500, 7, 250) == 3
    for window, start in [(None, 0), (3, 0), (11, 13), (None, 27)]:  # and none that some query sees
        seen = np.tri(50, 80, start, dtype=bool) & ~np.tri(50, 80, start - (window or 1000), dtype=bool)
        assert visited(50, 80, window, start) == seen.reshape(10, 5, 16, 5).any((1, 3)).sum()


def test_which_way_is_chosen():
    bf16, f32 = jnp.bfloat16, jnp.float32
    assert choose("cpu", 0.0, f32, 1, 4096, 64, plain=False, splash=False) == "one_query"
    assert choose("cpu", 0.0, f32, CHUNK, CHUNK, 64, plain=True, splash=True) == "dense"
    assert choose("cpu", 0.0, f32, 2, CHUNK + 1, 64, plain=False, splash=False) == "flash"
    assert choose("cpu", 0.0, bf16, 4096, 4096, 64, plain=True, splash=True) == "flash"
    assert choose("gpu", 0.0, bf16, 4096, 4096, 64, plain=True, splash=True) == "flash"  # no cuDNN without CUDA
    assert choose("cuda", 9.0, bf16, 4096, 4096, 64, plain=True, splash=True) == "cudnn"
    assert choose("cuda", 8.0, jnp.float16, 7, 7, 128, plain=True, splash=True) == "cudnn"
    assert choose("cuda", 9.0, bf16, 4096, 4096, 256, plain=True, splash=True) == "cudnn"
    assert choose("cuda", 8.9, bf16, 4096, 4096, 256, plain=True, splash=True) == "flash"
    assert choose("cuda", 7.5, bf16, 4096, 4096, 64, plain=True, splash=True) == "flash"
    assert choose("cuda", 9.0, f32, 4096, 4096, 64, plain=True, splash=True) == "flash"
    assert choose("cuda", 9.0, bf16, 4096, 4096, 60, plain=True, splash=True) == "flash"
    assert choose("cuda", 9.0, bf16, 4096, 4096, 64, plain=False, splash=True) == "flash"
    assert choose("cuda", 9.0, bf16, 4096, 8192, 64, plain=False, splash=False) == "flash"
    assert choose("cuda", 9.0, bf16, 1, 4096, 64, plain=False, splash=False) == "dense"


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[2]])
def test_cudnn_is_called_with_the_right_arguments(monkeypatch, shape):
    """Its place is taken by XLA's way to compute the same call; only the library itself needs a GPU."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **options: call(*args, **options)
    )
    q, k, v = (jnp.asarray(x) for x in arrays(shape, 5)[:3])
    found = dispatch._cudnn(q, k, v, scale=0.7, window=shape[7])
    assert_close([found], [attention_oracle(q, k, v, scale=0.7, window=shape[7])], tolerance=1e-5)


def test_arguments_that_do_not_fit_are_refused():
    q, k = jnp.zeros((1, 4, 7, 5)), jnp.zeros((1, 2, 7, 5))
    segments = jnp.ones((1, 7), jnp.int32)
    with pytest.raises(ValueError, match="3 and 4"):
        attention(q, jnp.zeros((1, 3, 7, 5)), jnp.zeros((1, 3, 7, 5)), scale=1.0)
    with pytest.raises(ValueError, match="7 queries and 9 keys"):
        attention(q, jnp.zeros((1, 2, 9, 5)), jnp.zeros((1, 2, 9, 5)), scale=1.0)
    with pytest.raises(ValueError, match="got 0"):
        attention(q, k, k, scale=1.0, window=0)
    with pytest.raises(ValueError, match="go together"):
        attention(q, k, k, scale=1.0, key_segments=segments)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_decoding_step_copies_no_cache(batch):
    """A loop that writes a place of the cache and reads all of it needs no room for a second cache."""
    kv_heads, length, head_dim = 3, 1000, 8

    def step(i, state):
        q, cache = state
        cache = cache.write(q[:, :kv_heads], q[:, kv_heads:], i)
        return attention(q, cache.keys, cache.values, start=i, scale=1.0), cache

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(q, cache, steps):
        return jax.lax.fori_loop(0, steps, step, (q, cache))

    half = jnp.zeros((batch, kv_heads, length, head_dim))
    q, cache = jnp.ones((batch, 2 * kv_heads, 1, head_dim)), LayerCache(keys=half, values=half)
    memory = decode.lower(q, cache, jnp.asarray(7)).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < half.nbytes
