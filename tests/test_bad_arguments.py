"""Mistyped arguments, in a process of its own: here the checks of types, which a user's program lacks, come first."""

import os
import pathlib
import subprocess
import sys


def test_mistyped_arguments_are_value_errors_with_both_values(root):
    program = pathlib.Path(__file__).with_name("bad_arguments.py")
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("EQX_MOE_TYPECHECK", None)
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("0 of "), done.stdout
