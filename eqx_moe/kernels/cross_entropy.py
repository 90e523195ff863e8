"""Cross-entropy of labels from hidden states and the unembedding, without all the logits at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

# The label of a place that is not counted, as in Hugging Face and torch.
IGNORE = -100

# Logits held at a time, at most: 64 MiB in float32.
_MAX_LOGITS = 1 << 24


def cross_entropy_oracle(
    hidden: Float[Array, "tokens hidden"], unembedding: Float[Array, "vocab hidden"], labels: Int[Array, " tokens"]
) -> Float32[Array, " tokens"]:
    """What `cross_entropy` computes, from all logits at once. The definition to test against."""
    logits = jnp.einsum("th,vh->tv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    counted = labels != IGNORE
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(counted, labels, 0)[:, None], axis=-1)[:, 0]
    known = (labels >= 0) & (labels < unembedding.shape[0])
    return jnp.where(counted, jnp.where(known, nll, jnp.nan), 0.0)


def cross_entropy(
    hidden: Float[Array, "tokens hidden"], unembedding: Float[Array, "vocab hidden"], labels: Int[Array, " tokens"]
) -> Float32[Array, " tokens"]:
    """Negative log-likelihood of each label, in nats; 0 where the label is -100.

    The labels belong to the hidden states of the same row: nothing is shifted here. Another label outside the
    vocabulary gives NaN, never a clamped one. Rows are taken some at a time, as many as keep their logits below 64
    MiB, and the backward pass computes the logits again, so that memory does not grow with tokens x vocabulary.
    """
    hidden, labels, tokens = _chunks(hidden, labels, unembedding.shape[0])
    chunk = jax.checkpoint(lambda part: _nll(part[0], unembedding, part[1])[0], prevent_cse=False)
    return jax.lax.map(chunk, (hidden, labels)).T.reshape(-1)[:tokens]


@jax.custom_vjp
def cross_entropy_sum(
    hidden: Float[Array, "tokens hidden"], unembedding: Float[Array, "vocab hidden"], labels: Int[Array, " tokens"]
) -> Float32[Array, ""]:
    """The sum of `cross_entropy`, cheaper to differentiate.

    The gradient of a sum is known up to a factor while it is computed, so the logits are not computed twice. What is
    kept for the backward pass are the two gradients: as much as `hidden` and `unembedding`.
    """
    return jnp.sum(cross_entropy(hidden, unembedding, labels))


def _sum_fwd(hidden, unembedding, labels):
    chunked, chunked_labels, tokens = _chunks(hidden, labels, unembedding.shape[0])
    weight = unembedding.astype(hidden.dtype)

    def chunk(d_unembedding, part):
        rows, labels = part
        nll, logits, logsumexp, mine = _nll(rows, weight, labels)
        d_logits = (jnp.exp(logits - logsumexp[:, None]) - mine).astype(rows.dtype)
        d_logits = jnp.where((labels >= 0) & (labels < weight.shape[0]), d_logits.T, 0).T
        # JAX's own transposes of the product know how gradients are spread over an explicit mesh.
        _, pull = jax.vjp(lambda rows, weight: jnp.einsum("th,vh->tv", rows, weight), rows, weight)
        d_rows, d_weight = pull(d_logits)
        return d_unembedding + d_weight, (jnp.sum(nll), d_rows)

    nothing = jnp.zeros_like(unembedding, dtype=jnp.float32)
    d_unembedding, (nll, d_hidden) = jax.lax.scan(chunk, nothing, (chunked, chunked_labels))
    d_hidden = d_hidden.swapaxes(0, 1).reshape(-1, hidden.shape[1])[:tokens]
    return jnp.sum(nll), (d_hidden, d_unembedding.astype(unembedding.dtype))


def _sum_bwd(gradients, d_sum):
    return *((d_sum * gradient).astype(gradient.dtype) for gradient in gradients), None


cross_entropy_sum.defvjp(_sum_fwd, _sum_bwd)


def _chunks(hidden, labels, vocab: int):
    """Hidden states [chunks, rows, hidden] and labels [chunks, rows], padded, and the number of tokens.

    Chunk c holds every row whose index is c modulo the number of chunks, a power of two: where tokens are spread over
    devices, each device then has its share of every chunk.
    """
    tokens = hidden.shape[0]
    chunks = 1 << (-(-tokens // max(1, _MAX_LOGITS // vocab)) - 1).bit_length()
    padding = -tokens % chunks
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunks, hidden.shape[1])
    labels = jnp.pad(labels, (0, padding), constant_values=IGNORE).reshape(-1, chunks)
    return hidden.swapaxes(0, 1), labels.T, tokens


def _nll(hidden, unembedding, labels):
    """Negative log-likelihoods, and what they were computed from: logits, their log-sum-exp, where labels stand."""
    logits = jnp.einsum("th,vh->tv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # A comparison in place of a gather: its gradient is another comparison, not a scatter.
    mine = labels[:, None] == jnp.arange(logits.shape[-1])
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    nll = logsumexp - jnp.sum(jnp.where(mine, logits, 0.0), axis=-1)
    known = (labels >= 0) & (labels < logits.shape[-1])
    return jnp.where(labels == IGNORE, 0.0, jnp.where(known, nll, jnp.nan)), logits, logsumexp, mine
