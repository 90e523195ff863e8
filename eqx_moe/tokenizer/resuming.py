"""Counting that goes on where it was interrupted: what is counted is kept beside the output until that is written.

Each part's counts are a file in the folder `<output>.unfinished`. Its name says how far the part goes, and has a digest
of all that its words depend on: it is there wholly or not at all, and used for what it was made of or not at all.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from eqx_moe.errors import DataError
from eqx_moe.tokenizer.count import START, Place, count_parts
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.counts_file import Counted, add_counts, read_counts, write_counts
from eqx_moe.tokenizer.sources import files_size

#: After how many bytes of files their counts are saved. Ctrl-C saves them too; this is for machines that stop.
_EVERY = 1 << 30


@contextlib.contextmanager
def counted_files(
    files: Sequence[str],
    pattern: str,
    *,
    out: pathlib.Path,
    lines: bool,
    threads: int | None,
    max_memory: str | None,
) -> Iterator[WordCounts]:
    """The words of files, as `count.count_files`. What is counted is kept until the block has ended well.

    What an earlier run kept is used as far as it was of the same files, pattern and lines.
    """
    state = out.with_name(f"{out.name}.unfinished")
    facts = [_facts(file) for file in files]
    place, parts = START, []

    def path(end: Place) -> pathlib.Path:
        """Where the counts from `place` to `end` are kept."""
        settled = [facts[place.file : end.file + 1], place, end, pattern, lines]
        digest = hashlib.sha256(json.dumps(settled).encode()).hexdigest()[:24]
        return state / f"{len(parts):06}-{end.file}-{end.byte}-{end.done}-{digest}.counts"

    try:
        while (kept := _kept(state, len(parts), path)) is not None:
            place, words = kept
            parts.append(words)
        if parts:
            done, size = (tqdm.format_sizeof(bytes, "B") for bytes in (place.done, files_size(files)))
            print(f"{done} of {size} were counted before: {state}", file=sys.stderr)
        for end, words in count_parts(
            files, pattern, every=_EVERY, start=place, lines=lines, threads=threads, max_memory=max_memory
        ):
            state.mkdir(exist_ok=True)
            saved = path(end)
            write_counts(saved, Counted(words, pattern, lines))
            parts.append(read_counts(saved).words)  # Which stay in the file.
            place = end
        yield add_counts(parts, state)
    except BaseException as error:
        if any(state.glob("*.counts")):
            start = "\n" if isinstance(error, KeyboardInterrupt) else ""  # Behind the terminal's ^C.
            same = "with the same files, --pattern, --lines and --out, training or counting goes on from it"
            print(f"{start}what is counted is kept in {state}: {same}", file=sys.stderr)
        raise
    shutil.rmtree(state, ignore_errors=True)


def _kept(state: pathlib.Path, number: int, path: Callable[[Place], pathlib.Path]) -> tuple[Place, WordCounts] | None:
    """The next part that an earlier run has counted, and how far it goes."""
    for saved in state.glob(f"{number:06}-*.counts"):
        with contextlib.suppress(ValueError, DataError):  # Half a file, of a machine that lost its power.
            end = Place(*map(int, saved.stem.split("-")[1:4]))
            if saved == path(end):
                return end, read_counts(saved).words
    return None


def _facts(file: str) -> tuple[str, int, int] | None:
    """Path, size and time: a file that was changed is another one. None if counting will say what is wrong."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return os.path.abspath(file), found.st_size, found.st_mtime_ns
