"""Models from configs: which families there are, random weights, and the same weights run otherwise."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from eqx_moe.checkpoint.dtypes import weight_dtype
from eqx_moe.checkpoint.names import leaf_paths, replace_leaves
from eqx_moe.errors import CheckpointError
from eqx_moe.execution import AbstractExecution, resolve
from eqx_moe.family import BY_MODEL_TYPE, FAMILIES, Family
from eqx_moe.nn.decoder import Decoder
from eqx_moe.nn.moe import MoE
from eqx_moe.nn.stack import Stack, blocks_of, stack_layers, unstack_layers
from eqx_moe.sharding import AnyMesh, Plan, check_devices, plan, without_data


def families() -> dict[str, type]:
    """The supported families: `model_type` of config.json -> config class."""
    return {model_type: family.config for model_type, family in FAMILIES.items()}


def family_of(config: object) -> Family:
    """The family whose config this is."""
    for family in FAMILIES.values():
        if isinstance(config, family.config):
            return family
    raise ValueError(
        f"`config` must be an object of one of {[c.__name__ for c in families().values()]}; got {type(config)}."
    )


def parse_config(data: Mapping[str, Any], file: str) -> Any:
    """The config dataclass from a config.json object; `model_type` chooses the family."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        raise CheckpointError(
            code="CFG-MODEL-TYPE",
            doing="reading the config of a model",
            file=file,
            item="model_type",
            expected=f"one of {sorted(BY_MODEL_TYPE)}",
            found=repr(model_type)[:200],
            fix="this version supports no other family; docs/architecture.md says what adding one takes",
        )
    return BY_MODEL_TYPE[model_type].parse(data, file)


def config_to_json(config: Any, dtype: str) -> dict[str, Any]:
    """The config.json object of a model saved in `dtype`."""
    return family_of(config).to_json(config, dtype)


def init(
    config: object,
    *,
    key: PRNGKeyArray,
    dtype: DTypeLike = "float32",
    mesh: Mesh | None = None,
    execution: str | AbstractExecution | None = None,
) -> Decoder:
    """A model with random weights, for training from scratch.

    Matrices are normal with the config's `initializer_range`, norms one, biases zero; `dtype` is that of all weights.
    With a mesh every device draws its own part of them; the same key gives the same weights on every mesh.
    """
    chosen = resolve(execution, mesh)

    def build(key: PRNGKeyArray) -> Decoder:
        return family_of(config).build(config, key=key, dtype=weight_dtype(dtype), execution=chosen)

    if mesh is None:
        return build(key)
    model = skeleton(config, dtype=dtype, mesh=mesh, execution=chosen)
    shardings = plan_sharding(model, mesh).shardings
    return replace_leaves(model, jax.jit(lambda key: leaf_paths(build(key)), out_shardings=shardings)(key))


def skeleton(
    config: object,
    *,
    dtype: DTypeLike = "float32",
    mesh: Mesh | None = None,
    execution: str | AbstractExecution | None = None,
) -> Decoder:
    """The model that `init` would make, with a `jax.ShapeDtypeStruct` for every weight: no memory, no time."""
    build, chosen = family_of(config).build, resolve(execution, mesh)
    model = eqx.filter_eval_shape(
        lambda: build(config, key=jax.random.key(0), dtype=weight_dtype(dtype), execution=chosen)
    )
    return model if mesh is None else dataclasses.replace(model, mesh=check_devices(mesh))


def with_options(
    model: Decoder, *, mesh: Mesh | None = None, execution: str | AbstractExecution | None = None
) -> Decoder:
    """The same weights, placed and run otherwise. What need not move is shared with `model`, not copied.

    Args:
        mesh: the devices to spread the weights over, see `eqx_moe.sharding`; None leaves them where they are. (A mesh
            of one device brings a sharded model together.)
        execution: how MoE blocks run; None picks the dropless one for the platform and the mesh.
    """
    if mesh is not None:
        model = dataclasses.replace(model, mesh=check_devices(mesh))
        shardings = plan_sharding(model, mesh).shardings
        model = replace_leaves(model, {p: jax.device_put(x, shardings[p]) for p, x in leaf_paths(model).items()})
    chosen = resolve(execution, model.mesh)
    nodes, structure = jax.tree.flatten(model, is_leaf=lambda node: isinstance(node, MoE))
    if not any(isinstance(node, MoE) for node in nodes):
        return model
    nodes = [dataclasses.replace(node, execution=chosen) if isinstance(node, MoE) else node for node in nodes]
    return jax.tree.unflatten(structure, nodes)


def stack(model: Decoder, *, rematerialise: bool = False) -> Decoder:
    """The same model, each run of layers that repeat as one `Stack`, whose arrays have a leading axis.

    For training: a step compiles in the time of the layers that differ, one or two for most models, and (with
    `rematerialise`) keeps what stands between layers only and computes the rest again. `unstack` is its inverse, bit
    for bit. `generate` and `save_pretrained` take either form; a cache wants the layers apart, because a scan copies
    each of them for every token. Embedding, norm, head and layers that do not repeat are shared with `model`, not
    copied.
    """
    return dataclasses.replace(model, layers=stack_layers(model.layers, rematerialise))


def unstack(model: Decoder) -> Decoder:
    """The same model, each layer a block of its own. What is in no stack is shared, not copied."""
    if not any(isinstance(layer, Stack) for layer in model.layers):
        return model
    return dataclasses.replace(model, layers=unstack_layers(model.layers))


def plan_sharding(model: Decoder, mesh: AnyMesh) -> Plan:
    """Where each weight of a model (or its `skeleton`) goes on a mesh; `print` it for a table.

    Raises:
        ValueError: an axis that is not `data`, `expert` or `tensor`; experts that the axis `expert` does not divide.
    """
    return plan(leaf_paths(model), mesh, model.head_sizes)


def gathered_along_data(model: Decoder) -> Decoder:
    """The same model, its weights whole along `data`: for decoding, which would else gather them for every token."""
    if model.mesh is None:
        return model
    shardings = plan_sharding(model, model.mesh).shardings
    leaves = leaf_paths(model)
    return replace_leaves(model, {path: jax.device_put(x, without_data(shardings[path])) for path, x in leaves.items()})


def count_parameters(model: Decoder) -> tuple[int, int]:
    """How many parameters a model (or its `skeleton`) has, and how many of them one token uses."""
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    idle = 0
    for layer in model.layers:
        for block in blocks_of(layer).values():
            if block.moe is not None:
                experts, k = block.moe.experts.gate.shape[-3], block.moe.router.k
                idle += sum(leaf.size for leaf in jax.tree.leaves(block.moe.experts)) // experts * (experts - k)
    return total, total - idle
