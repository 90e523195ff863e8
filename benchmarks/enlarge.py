"""Texts of a hundred megabytes from texts of a quarter of that, without words that merely repeat.

    python benchmarks/enlarge.py /path/to/data /tmp/large      # EQX_MOE_DATA, and where to write

Each file is followed by copies of itself in which some letters are others: each is replaced by a letter that stands
within a few hundred letters of it, so that scripts and the frequencies of letters stay what they are. How many, is
chosen such that the number of different words grows as it does when more text of the same kind is added: from 68,000 to
about 145,000 for the English books, from 472,000 to about 1.7 million for the many languages (as counted with GPT-2's
pattern). The same bytes come out every time.
"""

import argparse
import pathlib

import numpy as np

from eqx_moe.tokenizer import unicode_table

COPIES = 3
#: The share of letters that are replaced.
SHARES = {"books-en.txt": 0.0026, "multilingual.txt": 0.065}
_NEAR = 300


def changed(text: str, share: float, rng: np.random.Generator) -> str:
    """A copy of a text with a share of its letters replaced by letters nearby."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32).copy()
    classes = unicode_table.classes()[points]
    places = np.flatnonzero((classes >= unicode_table.UPPER) & (classes <= unicode_table.LETTER))
    chosen = np.flatnonzero(rng.random(len(places)) < share)
    sources = np.clip(chosen + rng.integers(-_NEAR, _NEAR + 1, len(chosen)), 0, len(places) - 1)
    points[places[chosen]] = points[places[sources]]
    return points.tobytes().decode("utf-32-le")


def enlarge(source: pathlib.Path, target: pathlib.Path, share: float):
    """Write a text and its changed copies."""
    text = source.read_bytes().decode()
    rng = np.random.default_rng(5678)
    with target.open("wb") as file:
        file.write(text.encode())
        for _ in range(COPIES):
            file.write(changed(text, share, rng).encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, help="the folder with books-en.txt and multilingual.txt")
    parser.add_argument("out", type=pathlib.Path, help="the folder to write to")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, share in SHARES.items():
        enlarge(options.data / name, options.out / name, share)
        print(f"{options.out / name}: {(options.out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
