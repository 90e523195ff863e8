"""The name-table engine on small modules that are no model of ours."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from eqx_moe.checkpoint import Name, leaf_paths, plan, replace_leaves
from eqx_moe.checkpoint.names import Part


class Stack(eqx.Module):
    gate: jax.Array
    up: jax.Array
    label: str = eqx.field(static=True, default="x")


class Toy(eqx.Module):
    layers: tuple[Stack | None, ...]
    norm: jax.Array


def toy():
    key = jax.random.key(0)
    stacks = tuple(
        Stack(jax.random.normal(key, (5, 3, 2)), jax.random.normal(key, (5, 7, 2))) if i != 1 else None
        for i in range(12)
    )
    return Toy(stacks, jnp.arange(2.0))


NAMES = (
    Name("layers.{l}.gate", "h.{l}.e.{e}.w1"),
    Name("layers.{l}.up", "h.{l}.e.{e}.w3"),
    Name("norm", "norm.weight"),
)
PACKED = (Name(("layers.{l}.gate", "layers.{l}.up"), "h.{l}.gate_up"), Name("norm", "norm.weight"))


def test_paths_are_dotted_and_in_tree_order():
    paths = list(leaf_paths(toy()))
    assert paths[:3] == ["layers.0.gate", "layers.0.up", "layers.2.gate"] and paths[-1] == "norm"
    shapes = leaf_paths(eqx.filter_eval_shape(toy))
    assert list(shapes) == paths and shapes["layers.11.up"].shape == (5, 7, 2)


def test_replacing_leaves_by_their_own_paths_changes_nothing():
    tree = toy()
    assert eqx.tree_equal(replace_leaves(tree, leaf_paths(tree)), tree)
    filled = replace_leaves(eqx.filter_eval_shape(toy), leaf_paths(tree))
    assert eqx.tree_equal(filled, tree)


def test_a_missing_placeholder_stacks():
    tensors = plan(NAMES, leaf_paths(toy()))
    assert len(tensors) == 11 * 5 * 2 + 1
    assert tensors["h.10.e.4.w3"].shape == (7, 2)
    assert tensors["h.10.e.4.w3"].parts == (Part("layers.10.up", (4,), (7, 2)),)
    names = list(tensors)
    # The tensors of a stack stand together, in order.
    assert names[:6] == [f"h.0.e.{e}.w1" for e in range(5)] + ["h.0.e.0.w3"]


def test_several_leaves_are_joined_along_the_last_axis_but_one():
    tensors = plan(PACKED, leaf_paths(toy()))
    assert tensors["h.3.gate_up"].shape == (5, 10, 2)
    assert [part.shape for part in tensors["h.3.gate_up"].parts] == [(5, 3, 2), (5, 7, 2)]
    joined_by_expert = (Name(("layers.{l}.gate", "layers.{l}.up"), "h.{l}.e.{e}.w13"), Name("norm", "norm.weight"))
    assert plan(joined_by_expert, leaf_paths(toy()))["h.3.e.4.w13"].shape == (10, 2)


def test_two_missing_placeholders_stack_twice():
    leaves = {"w": jax.ShapeDtypeStruct((2, 3, 4), "float32")}
    tensors = plan((Name("w", "h.{l}.e.{e}.w"),), leaves)
    assert list(tensors) == [f"h.{layer}.e.{e}.w" for layer in range(2) for e in range(3)]
    assert tensors["h.1.e.2.w"].parts == (Part("w", (1, 2), (4,)),)


WRONG = {
    "a leaf without a name": (NAMES[:2], "does not name the leaves"),
    "a row without a leaf": ((*NAMES, Name("head.weight", "head")), "names nothing"),
    "a leaf named twice": ((*NAMES, Name("norm", "norm.copy")), "'norm' twice"),
    "a tensor named twice": ((*NAMES[:2], Name("norm", "h.0.e.0.w1")), "'h.0.e.0.w1' twice"),
    "a lost placeholder": ((*NAMES[:2], Name("layers.{l}.gate", "gate")), "'layers.0.gate' twice"),
    "an absent partner": ((Name(("layers.{l}.gate", "layers.{l}.down"), "h.{l}"),), "no \\['layers.0.down'\\]"),
    "unequal widths": ((Name(("layers.{l}.gate", "norm"), "h.{l}"),), "cannot join"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_table_that_does_not_fit_is_our_own_error(name):
    names, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        plan(names, leaf_paths(toy()))


def test_a_stack_of_nothing_is_not_named_by_its_row():
    leaves = {"w": jax.ShapeDtypeStruct((0, 3), "float32")}
    with pytest.raises(ValueError, match="names nothing"):
        plan((Name("w", "e.{e}.w"),), leaves)
