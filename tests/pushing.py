"""A process that pushes on request, to be killed: `python tests/pushing.py`, for tests/test_hub_kills.py.

It reads lines "KIND FOLDER REPO". For each it forks a child that pushes the folder's model, so that imports are paid
for once: "model" with `push_to_hub`, from arrays; "folder" with `push_folder`; "broken" with a commit for every file,
as no push should. It writes the child's process id when the push begins, that the child ended, and (once told "bury")
how.
"""

import os
import pathlib
import sys
from collections.abc import Callable

import jax
from huggingface_hub import HfApi

import eqx_moe
from eqx_moe.push import push_folder, push_to_hub

#: By the folder's name, so that a push of the model writes the folder's files.
SHARD_SIZES = {"first": 5_000, "second": 12_000}


def pushing_model(folder: pathlib.Path, repo: str) -> Callable[[], object]:
    model, tokenizer = eqx_moe.from_pretrained(folder, dtype="auto"), eqx_moe.load_tokenizer(folder)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))
    return lambda: push_to_hub(model, repo, tokenizer, max_shard_size=SHARD_SIZES[folder.name])


def pushing_folder(folder: pathlib.Path, repo: str) -> Callable[[], object]:
    return lambda: push_folder(folder, repo)


def pushing_by_halves(folder: pathlib.Path, repo: str) -> Callable[[], object]:
    def push() -> None:
        client = HfApi()
        client.create_repo(repo, exist_ok=True)
        for file in sorted(folder.iterdir()):
            client.upload_file(path_or_fileobj=str(file), path_in_repo=file.name, repo_id=repo)

    return push


KINDS = {"model": pushing_model, "folder": pushing_folder, "broken": pushing_by_halves}


def main() -> None:
    while line := sys.stdin.readline():
        kind, folder, repo = line.split()
        child = os.fork()
        if child == 0:
            try:
                push = KINDS[kind](pathlib.Path(folder), repo)
                print("started", os.getpid(), flush=True)
                push()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        # Until it is told that nobody will kill the child any more, its number stays its own.
        print("ended", child, flush=True)
        assert sys.stdin.readline() == "bury\n"
        _, status = os.waitpid(child, 0)
        print("status", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
