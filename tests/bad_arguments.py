"""Arguments that a user might mistype, in a program without checks of types: `python tests/bad_arguments.py`.

Each must be refused with a `ValueError` whose text has what was expected and what was found. Writes a line for each
that is not, and how many there are.
"""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import meshes
import numpy as np
from jax.sharding import AbstractMesh
from weights import draw, draw_experts

import eqx_moe
from eqx_moe import execution as ex
from eqx_moe.models import plan_sharding, skeleton
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.router import SoftmaxTopKRouter, updated_selection_bias
from eqx_moe.nn.router_losses import load_balancing_loss, router_z_loss, switch_load_balancing_loss

MESH = meshes.mesh((2, 4), ("data", "expert"))
SHAPES_ALONE = AbstractMesh((2, 4), ("data", "expert"))
KEY = jax.random.key(0)
MODEL = draw(meshes.LLAMA)
EXPERTS, HIDDEN = draw_experts(4, 12, 7), jnp.ones((1, 3, 12))
TOKENS = jnp.ones((4, 6), jnp.int32)


def router(k=2, experts=4):
    return SoftmaxTopKRouter(12, experts, k, std=0.1, dtype="float32", key=KEY)


def block(router, **options):
    options = {"execution": ex.Grouped()} | options
    return MoE(router, EXPERTS, **options)(HIDDEN, jnp.ones((1, 3), bool))


NAMES = "['capacity', 'dense', 'expert_parallel', 'grouped']"
DTYPES = "['bfloat16', 'float16', 'float32']"
CASES = [
    *(
        (lambda name=name: ex.resolve(name), (NAMES, repr(name)))
        for name in ("capacitty", "Grouped", "", 3, ex.Capacity, ["dense"])
    ),
    *(
        (lambda factor=factor: ex.Capacity(factor), ("(0, inf)", repr(factor)))
        for factor in (0, -1, "1.25", None, True, float("nan"), [1.25], np.float32(1.25))
    ),
    *(
        (lambda factor=factor: ex.ExpertParallel(MESH, "all_to_all", factor=factor), ("(0, inf)", repr(factor)))
        for factor in (0, "1.5", True, [1])
    ),
    *((lambda way=way: ex.Capacity(1.0, way), ("['zero', 'residual']", repr(way))) for way in ("none", "Zero", None)),
    *(
        (lambda method=method: ex.ExpertParallel(MESH, method), ("'ring', 'all_to_all'", repr(method)))
        for method in ("Ring", None, 0)
    ),
    *(
        (lambda inner=inner: ex.ExpertParallel(MESH, inner=inner), ("`inner` must be", "Grouped()", repr(inner)))
        for inner in ("grouped", None, ex.Grouped)
    ),
    *(
        (lambda make=make, mesh=mesh: make(mesh), ("jax.make_mesh", repr(mesh)))
        for mesh in ("data=2", {"data": 2}, (2, 4), 8)
        for make in (
            ex.ExpertParallel,
            lambda mesh: eqx_moe.init(meshes.MIXTRAL, key=KEY, mesh=mesh),
            lambda mesh: eqx_moe.with_options(MODEL, mesh=mesh),
            lambda mesh: plan_sharding(MODEL, mesh),
        )
    ),
    *(
        (lambda make=make: make(SHAPES_ALONE), ("must have devices", "'data': 2, 'expert': 4", "plan_sharding"))
        for make in (
            ex.ExpertParallel,
            lambda mesh: ex.ExpertParallel(mesh, "ragged_all_to_all"),
            lambda mesh: eqx_moe.init(meshes.MIXTRAL, key=KEY, mesh=mesh),
            lambda mesh: eqx_moe.with_options(MODEL, mesh=mesh),
        )
    ),
    *(
        (lambda make=make, dtype=dtype: make(meshes.LLAMA, dtype), (DTYPES, repr(dtype)))
        for dtype in ("bf16", "float33", "int8", 16)
        for make in (
            lambda config, dtype: eqx_moe.init(config, key=KEY, dtype=dtype),
            lambda config, dtype: skeleton(config, dtype=dtype),
        )
    ),
    *((lambda k=k: router(k), ("[1, experts]", f"k={k!r} and experts=4")) for k in (0, 5, -1, 2.0, "2", True)),
    # A router that scores another number of experts than there are, either way.
    *((lambda n=n: block(router(experts=n)), ("same number", f"got {n} and 4")) for n in (3, 5)),
    *((lambda e=e: block(router(), execution=e), ("Grouped()", repr(e))) for e in ("grouped", None)),
    *((lambda j=j: block(router(), jitter=j), ("[0, 1)", f"got {j}")) for j in (-0.1, 1, float("nan"))),
    # Of the same size: reshaped they would be taken for other tokens'.
    (lambda: MODEL(TOKENS, segment_ids=TOKENS.T), ("`segment_ids`", "(6, 4)", "(4, 6)")),
    (lambda: MODEL(TOKENS, TOKENS[:, :5]), ("`positions`", "(4, 5)", "(4, 6)")),
    *(
        (lambda size=size: MODEL.init_cache(*size), (f"batch={size[0]} and length={size[1]}",))
        for size in ((0, 5), (3, 0), (1, -1))
    ),
    *(
        (lambda k=k: load_balancing_loss((jnp.zeros((3, 4)),), k), ("[1, experts]", f"k={k} and experts=4"))
        for k in (0, 5)
    ),
    (lambda: load_balancing_loss((), 2), ("each mixture-of-experts layer; got 0",)),
    (lambda: router_z_loss(()), ("each mixture-of-experts layer; got 0",)),
    (lambda: switch_load_balancing_loss((), ()), ("each mixture-of-experts layer; got 0",)),
    (lambda: switch_load_balancing_loss((jnp.zeros((3, 4)),), ()), ("got 1 and 0",)),
    (lambda: updated_selection_bias(jnp.zeros(4), jnp.zeros(1, jnp.int32), 0.1), ("(4,)", "(1,)")),
]


def main() -> None:
    left = 0
    for i, (call, parts) in enumerate(CASES):
        try:
            found = f"no error, {call()!r:.200}"
        except ValueError as error:
            if all(part in str(error) for part in parts):
                continue
            found = f"ValueError, {error}"
        except Exception as error:
            found = f"{type(error).__name__}, {error}"
        left += 1
        print(f"case {i}, {parts}: {found}")
    print(f"{left} of {len(CASES)} not refused as they should be")


if __name__ == "__main__":
    main()
