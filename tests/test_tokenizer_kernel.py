"""Where the machine code of kernels is kept, and when it is made anew."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import eqx_moe.tokenizer

SOURCE = pathlib.Path(eqx_moe.tokenizer.__file__).parent
SPLIT = """
from eqx_moe.tokenizer.count import count_texts
words = count_texts(["Don'task"], "llama3", threads=1, progress=False)
print(bytes(words.text).decode())
"""
#: The words one after another, as they are ordered.
CUT, UNCUT = "'tDonask", "'taskDon"


def run(folder: pathlib.Path, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", SPLIT], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copied(tmp_path) -> pathlib.Path:
    """The package, in a folder of its own."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE.parent, tmp_path / "eqx_moe", ignore=ignored)
    return tmp_path


def test_an_edit_of_one_kernel_reaches_those_that_call_it(copied):
    assert run(copied) == CUT
    assert list((copied / "eqx_moe" / "tokenizer" / "__pycache__").glob("scan_count.count_llama3*.nbc"))
    scanners = copied / "eqx_moe" / "tokenizer" / "scanners.py"
    text = scanners.read_text()
    head = "def contraction(text, i, end, any_case):"
    assert head in text
    scanners.write_text(text.replace(head, f"{head}\n    return i"))
    assert run(copied) == UNCUT


def test_nowhere_to_keep_it(copied):
    """A package that cannot be written to, and no home: each process compiles."""
    if os.geteuid() == 0:
        # Nothing is closed to root; a file where the caches' folders should be is.
        (copied / "eqx_moe" / "tokenizer" / "__pycache__").write_text("")
        (copied / "nowhere").write_text("")
    else:
        (copied / "eqx_moe" / "tokenizer").chmod(0o555)
    nowhere = str(copied / "nowhere")
    environment = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(copied, **environment) == CUT
