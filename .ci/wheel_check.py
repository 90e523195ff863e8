"""Checks a built wheel as a stranger would meet it: `python wheel_check.py DIST CHECKPOINT`.

The wheel must hold the package and nothing else, install into an empty environment, and load, generate and inspect from
a folder that is not the checkout.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile

PROGRAM = """
import sys
import eqx_moe

assert "site-packages" in eqx_moe.__file__, eqx_moe.__file__
model = eqx_moe.from_pretrained("checkpoint")
tokenizer = eqx_moe.load_tokenizer("checkpoint")
(new,) = eqx_moe.generate(model, [tokenizer.encode("ROMEO:").ids], max_new_tokens=8)
assert 1 <= len(new) <= 8
assert not {"torch", "transformers", "matplotlib"} & set(sys.modules)
print("generated:", repr(tokenizer.decode(new)))
"""


def main(dist: pathlib.Path, checkpoint: pathlib.Path) -> None:
    (wheel,) = dist.glob("*.whl")
    (_,) = dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    strays = [name for name in names if not name.startswith("eqx_moe/") and ".dist-info/" not in name]
    assert not strays, f"the wheel holds more than the package: {strays}"
    for needed in ("eqx_moe/py.typed", "licenses/LICENSE", "licenses/NOTICE"):
        assert any(name.endswith(needed) for name in names), f"the wheel lacks {needed}"
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size:,} bytes")

    with tempfile.TemporaryDirectory() as temporary:
        place = pathlib.Path(temporary)
        shutil.copytree(checkpoint, place / "checkpoint")
        venv.create(place / "env", with_pip=True)
        binaries = place / "env" / "bin"
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

        def run(*command: str | os.PathLike) -> None:
            subprocess.run(command, cwd=place, env=clean, check=True)

        run(binaries / "python", "-m", "pip", "install", "-q", wheel.resolve())
        run(binaries / "python", "-c", PROGRAM)
        run(binaries / "eqx-moe", "inspect", "checkpoint")


if __name__ == "__main__":
    main(*(pathlib.Path(argument) for argument in sys.argv[1:]))
