import os
import pathlib

import pytest

# Simulated devices, for the tests of meshes; before anything loads JAX. It costs a few percent.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Each compiled program holds memory maps, of which Linux gives a process 65,530: a whole run would need more."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that gives another random key at every call."""
    # Inside the fixture: pytest reads this file before the type-checking hook is in place, and Equinox loads jaxtyping.
    import equinox.internal as eqxi

    return eqxi.GetKey(seed=5678)


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The checkout."""
    return pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def bundled(root) -> pathlib.Path:
    """The checkpoint that comes with the project."""
    return root / "examples" / "assets" / "shakespeare-moe"


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """The folder of larger texts that `EQX_MOE_DATA` names."""
    if not os.environ.get("EQX_MOE_DATA"):
        pytest.skip("EQX_MOE_DATA is not set: it names a folder with the larger texts")
    return pathlib.Path(os.environ["EQX_MOE_DATA"])
