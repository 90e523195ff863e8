"""Time of a mixture-of-experts block, forward and backward: ours beside transformers', `ragged_dot` and dense matmuls.

    python benchmarks/moe.py            # tables; needs the `oracle` extra; some 3 minutes on two cores
    python benchmarks/moe.py --plot     # time over tokens and over experts -> benchmarks/moe.png; some 4 minutes

Everything is float32 on the CPU, in one process, with the same weights and tokens; the outputs are compared first.
A block is router and experts. Ways take turns, a call each a round, after a pause in which the other side's threads
stop spinning (torch's OpenMP threads do for some milliseconds) and, where it takes less than 0.2 s, after a call that
is not counted, so that it does not matter what the way before left in the caches. Medians of RUNS rounds, of 3 where a
call takes more than a second.

The dense chain is three matmuls with as many rows as there are pairs (token, expert), all with one expert's matrices:
the same FLOPs without routing. "Bare" has nothing between them, "SwiGLU" has what experts have.
"""

import dataclasses
import functools
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import machine
import torch
from jax import lax
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from eqx_moe.execution import AbstractExecution, Capacity, Dense, Grouped
from eqx_moe.kernels.linear import linear
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.router import SoftmaxTopKRouter

RUNS, PLOT_RUNS = 7, 5
PAUSE = 0.02  # seconds
HIDDEN = 512
SETS = 16  # blocks that a single token goes through, so that no expert waits in a cache


@dataclasses.dataclass(frozen=True)
class Size:
    experts: int
    k: int
    ffn: int

    @property
    def pair_flops(self) -> int:
        return 3 * 2 * HIDDEN * self.ffn

    @property
    def active_bytes(self) -> int:
        return self.k * 3 * HIDDEN * self.ffn * 4

    def __str__(self) -> str:
        return f"E={self.experts}, k={self.k}, D={HIDDEN}, F={self.ffn}"


@dataclasses.dataclass(frozen=True)
class RaggedDot(AbstractExecution):
    """What one would write first: sort, `lax.ragged_dot`, add up."""

    @property
    def by_row(self) -> bool:
        return False

    def __call__(self, x, routing, experts, mask):
        shape, k = x.shape, routing.experts.shape[-1]
        chosen = routing.experts.reshape(-1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=experts.num_experts)
        rows = x.reshape(-1, shape[-1])[order // k]
        y = experts(rows, lambda rows, stack, bias=None: lax.ragged_dot(rows, stack.swapaxes(1, 2), sizes))
        y = y * routing.weights.reshape(-1, 1)[order]
        total = jax.ops.segment_sum(y, order // k, num_segments=shape[0] * shape[1])
        return total.reshape(shape), jnp.zeros((), jnp.int32)


OURS = {
    "grouped": Grouped(),
    "capacity (1.25)": Capacity(),
    "dense": Dense(),
    "a block over lax.ragged_dot": RaggedDot(),
}
THEIRS = {"transformers, grouped_mm": "grouped_mm", "transformers, eager": "eager"}
BARE, SWIGLU = "dense chain, bare", "dense chain, SwiGLU"


def our_block(size: Size, seed: int = 0) -> MoE:
    router_key, experts_key = jax.random.split(jax.random.key(seed))
    options = dict(std=0.02, dtype=jnp.float32)
    router = SoftmaxTopKRouter(HIDDEN, size.experts, size.k, key=router_key, **options)
    return MoE(router, Experts(size.experts, HIDDEN, size.ffn, key=experts_key, **options), execution=Grouped())


def their_blocks(block: MoE) -> dict[str, MixtralSparseMoeBlock]:
    """The same weights in transformers' block, once for each of its implementations; they share the memory."""
    experts = block.experts
    weights = {
        "gate.weight": torch.from_dlpack(block.router.weight),
        "experts.gate_up_proj": torch.from_dlpack(jnp.concatenate([experts.gate, experts.up], axis=1)),
        "experts.down_proj": torch.from_dlpack(experts.down),
    }
    blocks = {}
    for name, implementation in THEIRS.items():
        config = MixtralConfig(
            hidden_size=HIDDEN,
            intermediate_size=experts.gate.shape[1],
            num_local_experts=experts.num_experts,
            num_experts_per_tok=block.router.k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            blocks[name] = MixtralSparseMoeBlock(config)
        blocks[name].load_state_dict(weights, assign=True)
    return blocks


def run(block: MoE, execution: AbstractExecution, x):
    return dataclasses.replace(block, execution=execution)(x, jnp.ones(x.shape[:2], bool))[0]


def median_seconds(ways: dict, runs: int = RUNS) -> dict[str, float]:
    """Seconds of a call of each way. Calls that take less than 10 ms are repeated until they do."""
    first = {}
    for name, way in ways.items():
        way()
        begin = time.perf_counter()
        way()
        first[name] = time.perf_counter() - begin
    seconds = {name: [] for name in ways}
    for turn in range(runs):
        for name, way in ways.items():
            if first[name] > 1 and turn >= 3:
                continue
            time.sleep(PAUSE)
            if first[name] < 0.2:
                way()
            repeats = max(1, round(0.01 / first[name]))
            begin = time.perf_counter()
            for _ in range(repeats):
                way()
            seconds[name].append((time.perf_counter() - begin) / repeats)
    return {name: statistics.median(row) for name, row in seconds.items()}


def jitted(function, *arguments):
    """A call of the compiled function that waits for the result."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def forward_ways(block: MoE, x, *, torch_blocks: dict) -> dict:
    ways = {name: jitted(lambda block, x, e=e: run(block, e, x), block, x) for name, e in OURS.items()}

    tokens = torch.from_dlpack(x)

    def theirs(module):
        with torch.no_grad():
            return module(tokens)

    for name, module in torch_blocks.items():
        ways[name] = functools.partial(theirs, module)
    return ways | chain_ways(block, x.shape[1], backward=False)


def chain_ways(block: MoE, tokens: int, *, backward: bool) -> dict:
    rows = jax.random.normal(jax.random.key(2), (tokens * block.router.k, HIDDEN))
    matrices = [stack[0].copy() for stack in (block.experts.gate, block.experts.up, block.experts.down)]

    def bare(x, gate, up, down):
        return (x @ gate.T) @ down.T, x @ up.T

    def swiglu(x, gate, up, down):
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def with_gradients(function):
        def both(*arguments):
            out, pull = jax.vjp(function, *arguments)
            return out, pull(out)

        return both

    chains = {BARE: bare, SWIGLU: swiglu}
    return {
        name: jitted(with_gradients(chain) if backward else chain, rows, *matrices) for name, chain in chains.items()
    }


def backward_ways(block: MoE, x, dy, *, torch_blocks: dict) -> dict:
    """The output and the gradients of tokens and all weights."""

    def ours(execution):
        def both(block, x, dy):
            out, pull = jax.vjp(lambda block, x: run(block, execution, x), block, x)
            return out, pull(dy)

        return both

    ways = {name: jitted(ours(execution), block, x, dy) for name, execution in OURS.items()}

    tokens, gradient = torch.from_dlpack(x).requires_grad_(), torch.from_dlpack(dy)

    def theirs(module):
        return torch.autograd.grad(module(tokens), [tokens, *module.parameters()], gradient)

    for name, module in torch_blocks.items():
        ways[name] = functools.partial(theirs, module)
    return ways | chain_ways(block, x.shape[1], backward=True)


def check_same(ways: dict) -> None:
    """All dropless ways must give the same output."""
    want = ways["dense"]()
    for name, way in ways.items():
        if name not in (BARE, SWIGLU) and not name.startswith("capacity"):
            found = jnp.asarray(way().numpy() if name in THEIRS else way())
            difference = float(jnp.max(jnp.abs(found - want)) / jnp.max(jnp.abs(want)))
            assert difference < 1e-4, f"{name} is off by {difference}"


def tokens_table(size: Size, tokens: int, goal: float) -> None:
    block = our_block(size)
    x, dy = (jax.random.normal(jax.random.key(seed), (1, tokens, HIDDEN)) for seed in (1, 3))
    torch_blocks = their_blocks(block)
    forward = forward_ways(block, x, torch_blocks=torch_blocks)
    check_same(forward)
    load = jnp.bincount(block.router.route(block.router.logits(x)).experts.reshape(-1), length=size.experts)
    once = median_seconds(forward)
    both = median_seconds(backward_ways(block, x, dy, torch_blocks=torch_blocks))
    print(
        f"\n**{size}, T={tokens}**; the busiest expert has {int(max(load))} rows, the mean is {float(load.mean()):g}."
    )
    print(f"Goals for grouped: rate / bare chain >= {goal}, backward / forward <= 2.5.\n")
    print("| | forward ms | GF/s | rate / bare | rate / SwiGLU | forward + backward ms | backward / forward |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds in once.items():
        rate = tokens * size.k * size.pair_flops / seconds / 1e9
        shares = once[BARE] / seconds, once[SWIGLU] / seconds
        back = both[name] / seconds - 1
        print(
            f"| {name} | {seconds * 1e3:.1f} | {rate:.0f} | {shares[0]:.2f} | {shares[1]:.2f} "
            f"| {both[name] * 1e3:.1f} | {back:.2f} |"
        )


def one_token_table(size: Size) -> None:
    """A token goes through SETS blocks one after the other, in one program; each call has another token."""
    blocks = [our_block(size, seed) for seed in range(SETS)]
    torch_blocks = [their_blocks(block) for block in blocks]
    tokens = list(jax.random.normal(jax.random.key(1), (64, 1, 1, HIDDEN)))
    # These read every expert: fewer sets do.
    fewer = {"dense": 4, "capacity (1.25)": 4, "a block over lax.ragged_dot": 4}
    ways, sets = {}, {}

    def in_turn(function):
        turn = iter(range(10**9))
        return lambda: function(next(turn))

    def ours(execution, blocks):
        def through(blocks, x):
            for block in blocks:
                x = x + run(block, execution, x)
            return x

        compiled = jax.jit(through).lower(blocks, tokens[0]).compile()
        return in_turn(lambda turn: compiled(blocks, tokens[turn % len(tokens)]).block_until_ready())

    def theirs(modules):
        given = [torch.from_dlpack(x) for x in tokens]

        def through(turn):
            x = given[turn % len(given)]
            with torch.no_grad():
                for module in modules:
                    x = x + module(x)
            return x

        return in_turn(through)

    for name, execution in OURS.items():
        sets[name] = fewer.get(name, SETS)
        ways[name] = ours(execution, blocks[: sets[name]])
    for name in THEIRS:
        sets[name] = SETS
        ways[name] = theirs([modules[name] for modules in torch_blocks])

    # Floors: as many bytes as the active experts have, each matrix an array of its own, four times as many arrays as
    # one call reads.
    def matrices(expert):
        return [
            [stack[expert + i].copy() for stack in (block.experts.gate, block.experts.up, block.experts.down)]
            for block in blocks
            for i in range(size.k)
        ]

    parts = [matrices(start) for start in range(0, min(size.experts, 4 * size.k), size.k)]

    def products(matrices, x):
        """`(x @ gate.T) @ down.T` and `x @ up.T`; the next depends on both, so that none runs beside another."""
        for gate, up, down in matrices:
            x = linear(linear(x, gate) + linear(x, up), down)
        return x

    product = jax.jit(products).lower(parts[0], tokens[0][0]).compile()
    matvec, torch_matvec, copy = "matrix-vector products, jax", "matrix-vector products, torch", "a memory copy, torch"
    ways[matvec] = in_turn(lambda turn: product(parts[turn % len(parts)], tokens[turn % 64][0]).block_until_ready())
    torch_parts = [[[torch.from_dlpack(m) for m in three] for three in part] for part in parts]

    def torch_products(turn):
        x = torch.from_dlpack(tokens[turn % 64]).reshape(-1)
        for gate, up, down in torch_parts[turn % len(torch_parts)]:
            x = torch.mv(down, torch.mv(gate, x) + torch.mv(up, x))
        return x

    ways[torch_matvec] = in_turn(torch_products)
    source = torch.ones(4 * SETS * size.active_bytes // 4)
    target = torch.empty_like(source)
    ways[copy] = lambda: target.copy_(source)

    seconds = median_seconds(ways)
    each = {name: seconds[name] / sets.get(name, SETS) for name in seconds}
    each[copy] /= 2 * 4  # as many bytes written as read, and four times as many
    floor = min(each[matvec], each[torch_matvec])
    print(f"\n**{size}, T=1**, through {SETS} sets of weights ({SETS * size.active_bytes / 1e6:.0f} MB active a call).")
    print("Goal for grouped: time / floor <= 1.5; the floor is the better of the matrix-vector products.\n")
    print("| | ms a block | GB/s of active bytes | time / floor |")
    print("|---|---|---|---|")
    for name, value in each.items():
        print(f"| {name} | {value * 1e3:.2f} | {size.active_bytes / value / 1e9:.1f} | {value / floor:.2f} |")


def plot(path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def series(points) -> dict[str, list[tuple[int, float]]]:
        """Seconds of each way over the points (x, size, tokens), until a call takes more than a second."""
        found: dict[str, list[tuple[int, float]]] = {}
        for at, size, tokens in points:
            block = our_block(size)
            x = jax.random.normal(jax.random.key(1), (1, tokens, HIDDEN))
            ways = forward_ways(block, x, torch_blocks=their_blocks(block))
            ways = {name: way for name, way in ways.items() if name not in found or found[name][-1][1] < 1}
            for name, seconds in median_seconds(ways, runs=PLOT_RUNS).items():
                found.setdefault(name, []).append((at, seconds))
            print(
                at, {name: f"{row[-1][1] * 1e3:.2f} ms" for name, row in found.items() if row[-1][0] == at}, flush=True
            )
        return found

    panels = {
        "tokens, at E=8, k=2, D=512, F=1408": [(2**i, Size(8, 2, 1408), 2**i) for i in range(13)],
        "experts, at T=512, k=2, D=512, F=1408": [(2**i, Size(2**i, 2, 1408), 512) for i in range(3, 8)],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, (label, points) in zip(axes, panels.items(), strict=True):
        for name, row in series(points).items():
            ours = name in ("grouped", "dense", "capacity (1.25)")
            axis.plot(
                *zip(*row, strict=True),
                "o-" if ours else "s--",
                label=name,
                linewidth=2.5 if ours else 1.2,
                markersize=4,
            )
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks([at for at, _, _ in points], [str(at) for at, _, _ in points])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds, forward")
    axes[0].legend(fontsize=8)
    figure.suptitle("One mixture-of-experts block, float32, " + f"{torch.get_num_threads()} CPU cores")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    machine.keep_large_blocks()
    torch.set_num_threads(machine.cores())
    print(machine.description())
    plotting = "--plot" in sys.argv[1:]
    print(f"medians of {PLOT_RUNS if plotting else RUNS}, {PAUSE * 1e3:.0f} ms of pause before every call")
    if plotting:
        plot(pathlib.Path(__file__).with_suffix(".png"))
        return
    small, many = Size(8, 2, 1408), Size(64, 8, 352)
    tokens_table(small, 512, goal=0.8)
    tokens_table(many, 512, goal=0.5)
    one_token_table(small)
    one_token_table(many)


if __name__ == "__main__":
    main()
