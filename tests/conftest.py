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


@pytest.fixture
def run(capsys):
    """Runs a line of the command `eqx-moe`; gives its status, stdout and stderr."""
    from eqx_moe.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, to which the client in this process talks, with a cache of its own. Waiting is cut short:
    `hub.naps` has the seconds that were asked for."""
    import time

    import loopback_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    nap, naps = time.sleep, []
    with loopback_hub.serve() as hub:
        hub.naps = naps
        hub.connect(monkeypatch.setattr)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)  # Parts of small files arrive too.
        monkeypatch.setattr(time, "sleep", lambda seconds: (naps.append(seconds), nap(min(seconds, 0.002))))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield hub
        close_session()
        assert not hub.leaks, "a token was sent to the storage"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, bytes]:
    """The files of a model in four shards."""
    from downloading import files_of

    return files_of(tmp_path_factory.mktemp("saved"), seed=3)


@pytest.fixture
def repo(hub, saved):
    """The Hub, with that model in it."""
    from downloading import REPO

    hub.put(REPO, saved)
    return hub


@pytest.fixture(scope="module")
def right(saved, tmp_path_factory) -> bytes:
    """The weights of that model."""
    from downloading import weights

    import eqx_moe

    folder = tmp_path_factory.mktemp("right")
    for name, content in saved.items():
        (folder / name).write_bytes(content)
    return weights(eqx_moe.from_pretrained(folder))
