"""Models with random weights, drawn by numpy: JAX compiles a program for each shape it draws, 3 to 5 s a model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_moe
from eqx_moe.checkpoint import leaf_paths, replace_leaves
from eqx_moe.models import skeleton
from eqx_moe.nn.experts import Experts
from eqx_moe.nn.gating import AbstractGating


def draw(config: object, seed: int = 0, execution: str | None = None) -> eqx_moe.Decoder:
    """Nothing is at its initial value: norms are near one, biases near zero, matrices as wide as `init` makes them."""
    random = np.random.default_rng(seed)
    model = skeleton(config, execution=execution)

    def weight(path, leaf):
        std = 0.1 if leaf.ndim == 1 else config.initializer_range  # pyright: ignore[reportAttributeAccessIssue]
        return jnp.asarray(path.endswith("norm.weight") + std * random.normal(size=leaf.shape), leaf.dtype)

    return replace_leaves(model, {path: weight(path, leaf) for path, leaf in leaf_paths(model).items()})


def draw_experts(
    experts: int, hidden: int, ffn: int, seed: int = 0, dtype: str = "float32", gating: AbstractGating | None = None
) -> Experts:
    """Matrices with a standard deviation of 0.5; with a gating also biases, which gpt-oss has both of."""
    random = np.random.default_rng(seed)
    options = {} if gating is None else {"bias": True, "gating": gating}
    shapes = eqx.filter_eval_shape(
        lambda: Experts(experts, hidden, ffn, std=0.5, dtype=dtype, key=jax.random.key(0), **options)
    )
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * random.normal(size=leaf.shape), leaf.dtype), shapes)
