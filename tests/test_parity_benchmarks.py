"""Benchmarks that run beside transformers still run: once, at a small size."""

import functools
import sys

import pytest

pytest.importorskip("torch")


@pytest.fixture
def moe(root, monkeypatch):
    """`benchmarks/moe.py`, as a module that measures once instead of seven times."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    import moe

    monkeypatch.setattr(moe, "median_seconds", functools.partial(moe.median_seconds, runs=1))
    monkeypatch.setattr(moe, "SETS", 2)
    yield moe
    for name in ("moe", "machine"):
        del sys.modules[name]


def test_the_block_beside_its_peers(moe, capsys):
    """The program itself compares what all of them compute."""
    size = moe.Size(experts=5, k=3, ffn=24)
    moe.tokens_table(size, 40, goal=0.8)
    moe.one_token_table(size)
    printed = capsys.readouterr().out
    for way in (*moe.OURS, *moe.THEIRS, moe.BARE):
        assert f"| {way} |" in printed
