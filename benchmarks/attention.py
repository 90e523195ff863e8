"""Time and memory of causal attention: ours beside XLA's and the oracle, and the loss beside one with all logits.

    python benchmarks/attention.py [LENGTH]     # 2048 tokens by default; about a minute on two cores

1 row, 8 heads of 64, 4 key-value heads, float32; the loss takes 1024 tokens, hidden size 512, a vocabulary of 32000.
All ways take turns, medians of RUNS. Memory is what XLA plans beside arguments and results.
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from eqx_moe.kernels.attention import attention, attention_oracle
from eqx_moe.kernels.cross_entropy import cross_entropy, cross_entropy_oracle, cross_entropy_sum

RUNS = 7
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
TOKENS, HIDDEN, VOCAB = 1024, 512, 32_000


def table(title: str, ways: dict, arguments: tuple) -> None:
    """Compiles every way, times them in turn, and prints a row for each; ratios are to the first."""
    compiled = {name: jax.jit(way).lower(*arguments).compile() for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    for run in range(RUNS + 1):
        for name, program in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if run:  # the first is to warm up
                seconds[name].append(time.perf_counter() - begin)
    times = {name: statistics.median(row) for name, row in seconds.items()}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()}
    first = next(iter(ways))
    print(f"\n{title:44}{'ms':>9}{'ratio':>8}{'MB':>9}{'ratio':>8}")
    for name in ways:
        shares = times[name] / times[first], memory[name] / memory[first]
        print(f"{name:44}{times[name] * 1e3:9.1f}{shares[0]:8.2f}{memory[name] / 1e6:9.1f}{shares[1]:8.2f}")


def with_gradients(way):
    """The output and the gradients of every argument but the last, which is the output's gradient."""

    def both(*arguments):
        out, pull = jax.vjp(way, *arguments[:-1])
        return out, pull(arguments[-1])

    return both


def attention_ways(window: int | None) -> dict:
    def xla(q, k, v):
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=local, scale=HEAD_DIM**-0.5, implementation="xla"
        )

    def ours(way):
        """From and to the layout of XLA's: [batch, seq, heads, head_dim]."""
        way = functools.partial(way, scale=HEAD_DIM**-0.5, window=window)
        return lambda *arrays: way(*(x.swapaxes(1, 2) for x in arrays)).swapaxes(1, 2)

    return {
        "jax.nn.dot_product_attention": xla,
        "attention_oracle": ours(attention_oracle),
        "attention": ours(attention),
    }


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), T={length}, medians of {RUNS}")
    keys = jax.random.split(jax.random.key(0), 7)
    q, k, v, d_out = (
        jax.random.normal(key, (1, length, heads, HEAD_DIM))
        for key, heads in zip(keys[:4], (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
    )
    for window in (None, 256):
        ways = attention_ways(window)
        name = "causal" if window is None else f"window of {window}"
        table(f"{name}, forward", ways, (q, k, v))
        both = {name: with_gradients(way) for name, way in ways.items()}
        table(f"{name}, forward and backward", both, (q, k, v, d_out))

    hidden = jax.random.normal(keys[4], (TOKENS, HIDDEN))
    unembedding = 0.02 * jax.random.normal(keys[5], (VOCAB, HIDDEN))
    labels = jax.random.randint(keys[6], (TOKENS,), 0, VOCAB)
    losses = {
        "all logits at once": lambda h, w: jnp.mean(cross_entropy_oracle(h, w, labels)),
        "cross_entropy, a value per token": lambda h, w: jnp.mean(cross_entropy(h, w, labels)),
        "cross_entropy_sum": lambda h, w: cross_entropy_sum(h, w, labels) / TOKENS,
    }
    table("loss, forward", losses, (hidden, unembedding))
    both = {name: jax.value_and_grad(way, argnums=(0, 1)) for name, way in losses.items()}
    table("loss, forward and backward", both, (hidden, unembedding))


if __name__ == "__main__":
    main()
