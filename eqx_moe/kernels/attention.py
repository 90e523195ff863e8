"""Causal attention over places in a row: the definition, and the choice among the ways to compute it."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eqx_moe.kernels.flash import CHUNK, LOWEST, flash_attention, visible

# Up to so many heads of a group one query is multiplied with each of them apart; that reads the keys so often.
_GROUP = 8


def attention_oracle(
    q: Float[Array, "batch heads queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys value_dim"],
    *,
    scale: float,
    start: Int[Array, ""] | None = None,
    window: int | None = None,
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch heads queries value_dim"]:
    """Scaled dot-product attention; query head h reads key-value head `h // (heads / kv_heads)`.

    Scores and softmax are float32, the result has the dtype of `q`. A query that sees no key gets zeros. All scores are
    there at once: the definition to test against, and the faster way for short rows.

    Args:
        q, k, v: heads before places. Key j stands at place j of the row.
        scale: what the products of queries and keys are multiplied with.
        start: the place of the first query, the others follow; None is place 0.
        window: a query sees the last `window` places, its own included; None sees all before it.
        query_segments, key_segments: a query sees only keys of its own segment. None: everything is one segment.
        sinks: one logit per query head that takes part in the softmax and adds no value (Xiao et al. 2023; learned in
            gpt-oss, transformers `modeling_gpt_oss.py`).
    """
    batch, heads, queries, _ = q.shape
    q = q.reshape(batch, k.shape[1], -1, *q.shape[2:])
    scores = jnp.einsum("bgrqd,bgkd->bgrqk", q, k, preferred_element_type=jnp.float32) * scale
    places = jnp.arange(queries) + (0 if start is None else start)
    scores = jnp.where(visible(places, jnp.arange(k.shape[2]), window, query_segments, key_segments), scores, -jnp.inf)
    weights, total = _softmax_parts(scores, sinks)
    out = jnp.einsum("bgrqk,bgkd->bgrqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(q.dtype).reshape(batch, heads, queries, v.shape[-1])


def attention(
    q: Float[Array, "batch heads queries head_dim"],
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys value_dim"],
    *,
    scale: float,
    start: Int[Array, ""] | None = None,
    window: int | None = None,
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    sharding: NamedSharding | None = None,
) -> Float[Array, "batch heads queries value_dim"]:
    """What `attention_oracle` computes, in the way that is the fastest for these shapes on this platform.

    `sharding` is how the rows and heads of `q` are spread over the devices of a mesh; None: they are on one device, or
    it is for XLA to say.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check(q, k, start, window, query_segments, key_segments)
    given: dict[str, Any] = dict(scale=scale, start=start, window=window, sinks=sinks)
    given |= dict(query_segments=query_segments, key_segments=key_segments)
    plain = start is None and query_segments is None and sinks is None and q.shape[-1] == v.shape[-1]
    splash, group = _splash_takes(q, start, sharding), q.shape[1] // k.shape[1]
    sizes = q.shape[2], k.shape[2], q.shape[-1]
    match choose(*_platform(_device(sharding)), q.dtype, *sizes, plain=plain, splash=splash, group=group):
        case "dense":
            return attention_oracle(q, k, v, **given)
        case "flash":
            return flash_attention(q, k, v, **given)
        case "one_query":
            return _one_query(q, k, v, **given)
        case "cudnn":
            cudnn = functools.partial(_cudnn, scale=scale, window=window)
            flash = functools.partial(flash_attention, scale=scale, window=window)
            # A machine with a GPU may also compute on its CPU.
            return lax.platform_dependent(q, k, v, cuda=cudnn, default=flash)
        case "splash":
            # Here, because Pallas takes a quarter of a second to import, and only this needs it.
            from eqx_moe.kernels.splash import splash_attention

            arrays = dict(q=q, k=k, v=v, query_segments=query_segments, key_segments=key_segments, sinks=sinks)
            return lax.platform_dependent(
                arrays,
                tpu=lambda x: splash_attention(**x, scale=scale, window=window, sharding=sharding),
                default=lambda x: flash_attention(**x, scale=scale, window=window),
            )


def choose(
    platform: str,
    capability: float,
    dtype: DTypeLike,
    queries: int,
    keys: int,
    head_dim: int,
    *,
    plain: bool,
    splash: bool,
    group: int = 1,
) -> Literal["dense", "flash", "one_query", "cudnn", "splash"]:
    """How `attention` is computed. `plain`: the keys are the queries' own, all of them in one segment, there are no
    sinks, and values are as wide as keys. `splash`: the kernel for TPUs takes these arrays. `group` is how many query
    heads share a key-value head.

    cuDNN's kernel takes half precision, on NVIDIA GPUs from compute capability 8.0 on, and head sizes that are
    multiples of 8, up to 128 or from 9.0 on up to 256. It knows segments only as a bias of queries x keys, and a sink
    put around it would have a wrong gradient.
    """
    if platform == "cuda" and plain and capability >= 8.0 and jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16):
        if head_dim % 8 == 0 and head_dim <= (256 if capability >= 9.0 else 128):
            return "cudnn"
    if queries == 1:
        return "one_query" if platform == "cpu" and group <= _GROUP else "dense"
    # Up to one chunk there is nothing to skip; beyond that chunks are faster (measured on CPU, float32).
    if max(queries, keys) <= CHUNK:
        return "dense"
    return "splash" if platform == "tpu" and splash else "flash"


def _splash_takes(q, start, sharding: NamedSharding | None) -> bool:
    """Whether `splash_attention` can be given these (jax 0.10 to 0.12, by compiling it for TPU v5e).

    It takes the first query to stand where the first key does, and where a cache stands is not known before the program
    runs. Its products know no precision but the default; float16, and 64-bit indices, it does not know. It cannot be
    split by XLA, nor run inside a `shard_map` that checks what varies. Its tables of the mask grow with the square of
    the length: at 65,536 places they take half a minute to make.
    """
    options: Any = jax.config
    precisions = (None, "default", "bfloat16", *(("highest", "float32") if q.dtype == jnp.float32 else ()))
    return (
        start is None
        and q.shape[2] <= 1 << 16
        and q.dtype in (jnp.bfloat16, jnp.float32)
        and options.jax_default_matmul_precision in precisions
        and not options.jax_enable_x64
        and not jax.sharding.get_abstract_mesh().manual_axes
        and (sharding is not None or jax.device_count() == 1)
    )


def _device(sharding: NamedSharding | None) -> Any:
    """One of those where this is computed, one of this process' own if there is any."""
    if sharding is None:
        return jax.local_devices()[0]
    mesh: Any = sharding.mesh
    devices = list(mesh.devices.flat)
    return next((device for device in devices if device.process_index == jax.process_index()), devices[0])


def _platform(device: Any) -> tuple[str, float]:
    """What a device is, `cuda` for NVIDIA GPUs, and their compute capability."""
    if device.device_kind.startswith("NVIDIA"):
        return "cuda", float(device.compute_capability)
    return device.platform, 0.0


def _check(q, k, start, window, query_segments, key_segments) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"Key-value heads must divide the query heads; got {k.shape[1]} and {q.shape[1]}.")
    if start is None and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"Without `start`, keys are the queries' own; got {q.shape[2]} queries and {k.shape[2]} keys. "
            "Pass the place of the first query."
        )
    if window is not None and window < 1:
        raise ValueError(f"`window` must be at least 1, the query's own place, or None; got {window}.")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("`query_segments` and `key_segments` go together; got one of them.")


def _softmax_parts(scores, sinks):
    """Unnormalised weights of scores [batch, kv_heads, group, queries, keys], and what to divide their values by."""
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), LOWEST)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    return weights, jnp.where(total == 0, 1.0, total)


def _one_query(q, k, v, *, scale, start, window, query_segments, key_segments, sinks):
    """`attention_oracle` for one query per row, one query head of each group after the other.

    XLA's CPU back end streams keys at the speed of memory through products of a matrix with one vector; products with
    two or more are up to three times slower, though they read the same.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(batch, kv_heads, -1, head_dim)
    products = [
        jnp.einsum("bgd,bgkd->bgk", q[:, :, r], k, preferred_element_type=jnp.float32) for r in range(q.shape[2])
    ]
    place = jnp.zeros(1, jnp.int32) if start is None else start[None]
    seen = visible(place, jnp.arange(k.shape[2]), window, query_segments, key_segments)
    weights, total = _softmax_parts(jnp.where(seen, jnp.stack(products, 2)[:, :, :, None] * scale, -jnp.inf), sinks)
    weights = weights[:, :, :, 0].astype(v.dtype)
    values = [
        jnp.einsum("bgk,bgkd->bgd", weights[:, :, r], v, preferred_element_type=jnp.float32) for r in range(q.shape[2])
    ]
    out = jnp.stack(values, 2) / total[:, :, :, 0]
    return out.astype(q.dtype).reshape(batch, heads, 1, v.shape[-1])


def _cudnn(q, k, v, *, scale: float, window: int | None):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, scale=scale, local_window_size=local, implementation="cudnn"
    )
    return out.swapaxes(1, 2)
