"""The lazy front page: what it names, what it loads, and the type-checking switch."""

import ast
import os
import subprocess
import sys

import pytest

import eqx_moe


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a program in a fresh interpreter, as a user's would be: without pytest's type-checking hook."""
    clean = {k: v for k, v in os.environ.items() if k != "EQX_MOE_TYPECHECK"}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_the_table_and_the_type_checkers_list_agree():
    with open(eqx_moe.__file__) as file:
        tree = ast.parse(file.read())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    listed = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            assert alias.asname == alias.name, f"write `{alias.name} as {alias.name}`: else it is no export"
            listed[alias.name] = statement.module
    assert listed == eqx_moe._PUBLIC


@pytest.mark.parametrize("name", sorted(eqx_moe._PUBLIC))
def test_every_public_name_is_there(name):
    assert name in dir(eqx_moe)
    assert getattr(eqx_moe, name).__name__.split(".")[-1] == name


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"'generat'.*'generate'"):
        eqx_moe.generat  # noqa: B018


@pytest.mark.parametrize("module", ["eqx_moe", "eqx_moe.errors"])
def test_the_front_page_loads_no_jax(module):
    done = run_python(
        f"import sys, {module}; print(sorted({{'jax', 'numpy', 'equinox', 'jaxtyping'}} & set(sys.modules)))"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


INTEGERS_FOR_FLOATS = """
import jax.numpy as jnp
from eqx_moe.nn.norm import RMSNorm
RMSNorm(3, eps=1e-6, dtype=jnp.float32)(jnp.arange(3))
print("accepted")
"""


def test_type_checks_are_off_unless_asked_for():
    assert run_python(INTEGERS_FOR_FLOATS).stdout == "accepted\n"
    asked = run_python(INTEGERS_FOR_FLOATS, EQX_MOE_TYPECHECK="1")
    assert asked.returncode != 0 and "RMSNorm" in asked.stderr and "TypeCheckError" in asked.stderr, asked.stderr
