"""A process that pushes on request, to be killed: `python tests/pushing.py`, for tests/test_hub_kills.py.

It reads "whole FOLDER REPO" or "broken FOLDER REPO" lines. For each it forks a child that pushes the folder's files, so
that imports are paid for once, and writes the child's process id, that it ended, and (once told "bury") how. "broken"
makes a commit for every file, as no push should.
"""

import functools
import os
import pathlib
import sys

from huggingface_hub import HfApi

from eqx_moe.remote.upload import push


def pushed(folder: pathlib.Path, repo: str) -> None:
    def pieces(file: pathlib.Path):
        content = file.read_bytes()
        for start in range(0, len(content), 4096):
            yield content[start : start + 4096]

    files = {
        file.name: functools.partial(pieces, file) if file.suffix == ".safetensors" else file.read_bytes()
        for file in sorted(folder.iterdir())
    }
    options = dict(card="a card", private=None, revision=None, message=None, create_pr=False, token=None)
    push(repo, files, **options)


def pushed_by_halves(folder: pathlib.Path, repo: str) -> None:
    client = HfApi()
    client.create_repo(repo, exist_ok=True)
    for file in sorted(folder.iterdir()):
        client.upload_file(path_or_fileobj=str(file), path_in_repo=file.name, repo_id=repo)


def main() -> None:
    while line := sys.stdin.readline():
        kind, folder, repo = line.split()
        child = os.fork()
        if child == 0:
            try:
                (pushed if kind == "whole" else pushed_by_halves)(pathlib.Path(folder), repo)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print("started", child, flush=True)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        # Until it is told that nobody will kill the child any more, its number stays its own.
        print("ended", child, flush=True)
        assert sys.stdin.readline() == "bury\n"
        _, status = os.waitpid(child, 0)
        print("status", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
