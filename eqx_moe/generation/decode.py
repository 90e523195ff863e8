"""The decoding loop.

Prompts are padded on the left to a common length, so that all rows decode at the same place of the cache; padding is
segment 0 and nobody sees it. Lengths are rounded up to buckets, so that few shapes compile.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from eqx_moe.family.rope import position_limit
from eqx_moe.generation.sampling import Sampling, choose
from eqx_moe.models import gathered_along_data, unstack
from eqx_moe.nn.cache import Cache
from eqx_moe.nn.decoder import Decoder
from eqx_moe.sharding import put, replicate

Prompts = Sequence[Sequence[int]] | Int[Array, "*batch seq"] | Int[np.ndarray, "*batch seq"]


def generate(
    model: Decoder,
    prompts: Prompts,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues prompts, all rows at once, in a loop on the device.

    On a mesh the weights are gathered along `data` first, and held so until the end: each group of devices has them
    whole and takes its part of the rows. In a program of several processes all give the same prompts, and get all rows.

    Args:
        prompts: lists of token ids, of any lengths, or an array of ids whose leading axes are flattened.
        max_new_tokens: at most so many new ids per row.
        temperature: 0 is greedy.
        top_k, top_p: restrict a draw; see `eqx_moe.generation.sampling`.
        seed: row r draws from `fold_in(key(seed), r)`, whatever else is in the batch.
        eos_ids: a row ends with the first of these, which is included. None: those of `model.generation_config`.

    Returns:
        One list of *new* ids per row.

    Raises:
        ValueError: no prompt, an empty prompt, an id outside the vocabulary, a row longer than the model's positions,
            or `max_new_tokens` below 1.
    """
    rows = _checked(model, prompts, max_new_tokens)
    model = gathered_along_data(unstack(model))
    prompt = _prepare(model, rows, max_new_tokens)
    given = Sampling(temperature, top_k, top_p), _row_keys(seed, len(rows)), _eos(model, eos_ids)
    sampling, keys, eos, limit = put((*given, jnp.asarray(max_new_tokens)), model.mesh)
    new, counts = _generate(model, prompt, _bucket(max_new_tokens), sampling, keys, eos, limit)
    new, counts = np.asarray(new), np.asarray(counts)
    return [new[r, : counts[r]].tolist() for r in range(len(rows))]


def stream(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
) -> Iterator[int]:
    """The ids that `generate` gives for one prompt, each as soon as it is known. Arguments and errors are those of
    `generate`.

    The arguments are checked by the call, before the first id is asked for.
    """
    rows = _checked(model, [prompt], max_new_tokens)
    sampling, keys = put((Sampling(temperature, top_k, top_p), _row_keys(seed, 1)), model.mesh)
    ends = set(np.asarray(_eos(model, eos_ids)).tolist())

    def ids() -> Iterator[int]:
        whole = gathered_along_data(unstack(model))
        prompt = _prepare(whole, rows, max_new_tokens)
        cache, token = _prefill(whole, prompt, _bucket(max_new_tokens), sampling, keys)
        for step in range(1, max_new_tokens + 1):
            yield (last := int(token[0]))
            if last in ends or step == max_new_tokens:
                return
            cache, token = _advance((whole, sampling, keys), cache, token, put(jnp.asarray(step), model.mesh))

    return ids()


def _checked(model: Decoder, prompts: Any, max_new_tokens: Any) -> list[np.ndarray]:
    if isinstance(prompts, (jax.Array, np.ndarray)):
        if prompts.ndim < 1 or not np.issubdtype(prompts.dtype, np.integer):
            raise ValueError(
                f"`prompts` must be an array of token ids [*batch, seq]; got {prompts.dtype}{prompts.shape}."
            )
        # Not reshape(-1, ...): of an array without entries it could not tell how many rows there are.
        prompts = list(np.asarray(prompts).reshape(math.prod(prompts.shape[:-1]), prompts.shape[-1]))
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)):
        raise ValueError(f"`max_new_tokens` must be an integer; got {max_new_tokens!r}.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1; got {max_new_tokens}.")
    if len(prompts) == 0:
        raise ValueError("`prompts` must hold at least one prompt; got none.")
    vocab, limit = model.embed.weight.shape[0], position_limit(model.config)
    rows = []
    for r, prompt in enumerate(prompts):
        row = np.asarray(prompt)
        if row.size == 0:
            raise ValueError(
                f"Prompts must hold at least one token; prompt {r} is empty. (A beginning-of-text id will do.)"
            )
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"A prompt must be a list of token ids; prompt {r} is {str(prompt)[:80]!r}.")
        bad = row[(row < 0) | (row >= vocab)]
        if bad.size:
            raise ValueError(f"Token ids must be in [0, {vocab}), the model's vocabulary; prompt {r} has {bad[0]}.")
        if row.size + max_new_tokens > limit:
            raise ValueError(
                f"A prompt and its new tokens must fit in the model's {limit} positions; prompt {r} has {row.size} "
                f"tokens, and {max_new_tokens=}. Shorten the prompt or ask for fewer."
            )
        rows.append(row.astype(np.int32))
    return rows


def _bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: at most half of a shape is padding, and few shapes are compiled."""
    power = 16
    while power < length:
        if power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


class _Prompt(eqx.Module):
    """Prompts padded on the left, their segments, and how long each row will be with all that is new."""

    tokens: Int[Array, "batch seq"]
    segments: Int[Array, "batch seq"]
    lengths: Int[Array, " batch"]


def _prepare(model: Decoder, rows: list[np.ndarray], max_new_tokens: int) -> _Prompt:
    width = _bucket(max(row.size for row in rows))
    tokens = np.zeros((len(rows), width), np.int32)
    segments = np.zeros((len(rows), width), np.int32)
    for r, row in enumerate(rows):
        tokens[r, width - row.size :] = row
        segments[r, width - row.size :] = 1
    lengths = np.asarray([row.size + max_new_tokens for row in rows], np.int32)
    return put(_Prompt(*map(jnp.asarray, (tokens, segments, lengths))), model.mesh, rows=True)


def _row_keys(seed: int, rows: int) -> Key[Array, " batch"]:
    return jax.vmap(lambda r: jax.random.fold_in(jax.random.key(seed), r))(jnp.arange(rows))


def _eos(model: Decoder, eos_ids: Sequence[int] | None) -> Int[Array, " ids"]:
    ids = model.generation_config.eos_token_id if eos_ids is None else tuple(eos_ids)
    vocab = model.embed.weight.shape[0]
    for token in ids:
        if not 0 <= token < vocab:
            raise ValueError(f"`eos_ids` must be in [0, {vocab}), the model's vocabulary; got {token}.")
    return jnp.asarray(ids, jnp.int32)


def _step_keys(keys, step):
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)


def _next(model: Decoder, cache: Cache, tokens, segments, step, sampling: Sampling, keys):
    """Runs the tokens and chooses the one after the last."""
    out = model.forward(tokens, segment_ids=segments, cache=cache, last_only=True)
    assert out.cache is not None
    token = choose(model.unembed(out.hidden[:, -1]), sampling, _step_keys(keys, step))
    return out.cache, replicate(token.astype(jnp.int32), model.mesh)


def _begin(model: Decoder, prompt: _Prompt, room: int, sampling: Sampling, keys):
    """The first new token, and a cache with the prompts in it and room for so many more places."""
    cache = model.init_cache(prompt.tokens.shape[0], prompt.tokens.shape[1] + room)
    cache = eqx.tree_at(lambda c: c.lengths, cache, prompt.lengths)
    return _next(model, cache, prompt.tokens, prompt.segments, 0, sampling, keys)


_prefill = eqx.filter_jit(_begin)


@eqx.filter_jit(donate="all-except-first")
def _advance(kept, cache, token, step):
    """The cache is donated, so that it is written in place."""
    model, sampling, keys = kept
    return _next(model, cache, token[:, None], None, step, sampling, keys)


@eqx.filter_jit
def _generate(
    model: Decoder,
    prompt: _Prompt,
    room: int,
    sampling: Sampling,
    keys: Key[Array, " batch"],
    eos: Int[Array, " ids"],
    limit: Int[Array, ""],
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """All new tokens, and how many of them count in each row. `limit` is traced: it compiles nothing anew."""
    cache, token = _begin(model, prompt, room, sampling, keys)
    batch = token.shape[0]
    new = jnp.zeros((batch, room), jnp.int32).at[:, 0].set(token)

    def ended(token: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        return jnp.any(token[:, None] == eos, axis=1)

    def going(state):
        step, _, _, _, done, _ = state
        return (step < limit) & ~jnp.all(done)

    def advance(state):
        step, cache, token, new, done, counts = state
        cache, token = _next(model, cache, token[:, None], None, step, sampling, keys)
        new = lax.dynamic_update_slice_in_dim(new, token[:, None], step, axis=1)
        counts = jnp.where(done, counts, step + 1)
        return step + 1, cache, token, new, done | ended(token), counts

    state = (jnp.asarray(1), cache, token, new, ended(token), jnp.ones(batch, jnp.int32))
    *_, new, _, counts = lax.while_loop(going, advance, state)
    return replicate((new, counts), model.mesh)
