"""SIGKILL while a model is pushed: the repo is the old model or the new one, whole."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import loopback_hub
import pushing
import pytest
import tiny

import eqx_moe

REPO = "org/tiny-model"
KILLS = [pytest.param(20, id="20"), pytest.param(200, id="200", marks=pytest.mark.full)]
WRITES = "^PUT|^POST .*/commit/"  # what brings content to the Hub, and what makes it visible

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[pathlib.Path]:
    """Two models, of other shards and of another name for each."""
    made = [tmp_path_factory.mktemp("kills") / name for name in ("first", "second")]
    for seed, folder in zip((3, 4), made, strict=True):
        size = pushing.SHARD_SIZES[folder.name]
        eqx_moe.save_pretrained(tiny.model(seed=seed), folder, tokenizer=tiny.tokenizer(), max_shard_size=size)
    return made


class Pusher:
    """The process that pushes, and the Hub that it pushes to."""

    def __init__(self, hub: loopback_hub.Hub, process: subprocess.Popen, folders: list[pathlib.Path]):
        self.hub = hub
        self.process = process
        self.whole = {folder: {file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders}

    def push(
        self,
        folder: pathlib.Path,
        kind: str = "folder",
        *,
        at: int | None = None,
        of: str = "",
        after: float | None = None,
    ) -> tuple[int, list[str]]:
        """Starts a push, kills it at its n-th request (`of` a pattern) or after some seconds; gives how it ended and
        what it asked."""
        hub, started, lock = self.hub, threading.Event(), threading.Lock()
        child: list[int] = []

        def kill() -> None:
            started.wait()
            with lock:
                for number in child:
                    os.kill(number, signal.SIGKILL)

        hub.requests.clear()
        hub.faults.clear()
        hub.fault(of, lambda hub: kill() if hub.count(of) == at else None, times=10**6)
        self.say(f"{kind} {folder} {REPO}")
        child.append(self.hear("started"))
        started.set()
        if after is not None:
            time.sleep(after)
            kill()
        self.hear("ended")
        with lock:
            child.clear()
        self.say("bury")
        return self.hear("status"), list(hub.requests)

    def say(self, line: str) -> None:
        assert self.process.stdin
        print(line, file=self.process.stdin, flush=True)

    def hear(self, word: str) -> int:
        assert self.process.stdout
        heard, number = self.process.stdout.readline().split()
        assert heard == word
        return int(number)

    def held(self) -> pathlib.Path | None:
        """The folder whose model the repo has; None for what is no model at all.

        Raises:
            AssertionError: it is a mixture.
        """
        # A request that was sent may be served though its sender is dead.
        time.sleep(0.01)
        with self.hub.lock:
            files = self.hub.repos[REPO].files() if REPO in self.hub.repos else {}
        files = {name: content for name, content in files.items() if name not in ("README.md", ".gitattributes")}
        if not files:
            return None
        found = [folder for folder, whole in self.whole.items() if files == whole]
        assert found, f"a mixture: {sorted(files)}"
        return found[0]


@pytest.fixture(scope="module")
def pusher(root, folders, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with loopback_hub.serve() as hub:
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | {
            "PYTHONPATH": str(root),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "TMPDIR": str(home),
            "HF_HUB_DISABLE_XET": "1",
        }
        with subprocess.Popen(
            [sys.executable, str(root / "tests" / "pushing.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            made = Pusher(hub, process, folders)
            yield made
            assert process.stdin
            process.stdin.close()
    # What killed pushes left behind, later ones removed.
    assert len(list(home.glob("eqx_moe-push-*"))) <= 1


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("kind", ["folder", "model"])
def test_killed_at_random_moments(pusher, folders, kind, kills):
    draw = random.Random(7)
    assert pusher.push(folders[1], kind)[0] == 0
    start = time.monotonic()
    status, asked = pusher.push(folders[0], kind)
    took = time.monotonic() - start
    assert status == 0 and pusher.held() == folders[0]
    died, inside = 0, 0
    for i in range(kills):
        # Until a push ends, the other model is what it is to become.
        old = pusher.held()
        new = next(folder for folder in folders if folder != old)
        if i % 4:  # now and then, what killed pushes have uploaded is there already
            pusher.hub.large.clear()
        when = [
            dict(at=draw.randint(1, 6), of=WRITES),
            dict(at=draw.randint(1, len(asked))),
            dict(after=draw.uniform(0, took)),
        ][i % 3]
        status, seen = pusher.push(new, kind, **when)
        assert pusher.held() in (old, new)
        if status == -signal.SIGKILL:
            died += 1
            inside += bool(seen and re.search(WRITES, seen[-1]))
    assert inside >= kills / 4, f"{inside} of {kills} kills came inside a write"
    assert died >= kills / 2, f"{died} of {kills} came before the end"
    # Whatever was left behind, the next push makes whole.
    for folder in folders:
        assert pusher.push(folder, kind)[0] == 0
        assert pusher.held() == folder


def test_the_first_push_of_a_repo(pusher, folders):
    for at in range(1, 30):
        pusher.hub.repos.pop(REPO, None)
        pusher.hub.large.clear()
        status, _ = pusher.push(folders[0], at=at)
        assert pusher.held() in (None, folders[0])
        if status == 0:
            break
    assert status == 0 and at > 8


def test_a_push_by_halves_would_be_seen(pusher, folders):
    """The planted fault: a commit for every file."""
    assert pusher.push(folders[0])[0] == 0
    draw = random.Random(11)
    for _ in range(20):
        pusher.push(folders[1], "broken", at=draw.randint(1, 20))
        try:
            pusher.held()
        except AssertionError:
            break
    else:
        pytest.fail("no kill showed the mixture")
    pusher.hub.repos.pop(REPO)
