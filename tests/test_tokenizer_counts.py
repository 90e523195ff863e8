"""Words and counts against a `Counter` over the pieces that `tokenizers` gives."""

import collections
import gzip
import re

import numpy as np
import pytest
import splitting
from hypothesis import given, settings
from hypothesis import strategies as st

from eqx_moe.errors import DataError
from eqx_moe.tokenizer import count, sources
from eqx_moe.tokenizer.count import PATTERNS, count_files, count_texts
from eqx_moe.tokenizer.counts import WordCounts
from eqx_moe.tokenizer.cutting import cut_table
from eqx_moe.tokenizer.sources import file_chunks

CUSTOM = r"\p{L}+|\p{N}{1,2}"

each_pattern = pytest.mark.parametrize("pattern", [*PATTERNS, CUSTOM])

TEXTS = st.lists(st.sampled_from(splitting.TRICKY) | st.text(max_size=3), max_size=24).map("".join)


def as_dict(counts: WordCounts) -> dict[bytes, int]:
    words = [bytes(counts.text[a:b]) for a, b in zip(counts.offsets, counts.offsets[1:], strict=False)]
    assert words == sorted(set(words))
    assert counts.text.dtype == np.uint8 and counts.offsets.dtype == counts.counts.dtype == np.int64
    return dict(zip(words, counts.counts.tolist(), strict=True))


def expected(texts, pattern: str) -> dict[bytes, int]:
    return dict(collections.Counter(word.encode() for text in texts for word in splitting.words(text, pattern)))


def lines_of(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+", text)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(count, "CHUNK", 512)


def hard_text(seed: int, parts: int) -> str:
    rng = np.random.default_rng(seed)
    choices = [*splitting.TRICKY, *(["word", " of", "日本"] * 30)]
    return "".join(choices[k] for k in rng.integers(len(choices), size=parts))


@each_pattern
@given(texts=st.lists(TEXTS, max_size=5))
@settings(max_examples=100, deadline=None, database=None)
def test_texts(pattern, texts):
    assert as_dict(count_texts(texts, pattern, threads=1)) == expected(texts, pattern)


@each_pattern
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_files_in_small_chunks(pattern, threads, tmp_path, small_chunks):
    texts = [hard_text(seed, 3000) for seed in (1, 2)] + [""]
    files = [tmp_path / f"{k}.txt" for k in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode())
    assert as_dict(count_files(files, pattern, threads=threads)) == expected(texts, pattern)
    by_line = as_dict(count_files(files, pattern, threads=threads, lines=True))
    assert by_line == expected([line for text in texts for line in lines_of(text)], pattern)


@each_pattern
@pytest.mark.parametrize("lines", [False, True])
def test_compressed_files(pattern, lines, tmp_path, small_chunks):
    text = hard_text(3, 3000)
    (tmp_path / "plain.txt").write_bytes(text.encode())
    # Two members, one after another, as `cat a.gz b.gz` makes.
    half = len(text.encode()) // 2
    packed = gzip.compress(text.encode()[:half]) + gzip.compress(text.encode()[half:])
    (tmp_path / "packed.gz").write_bytes(packed)
    plain = count_files([tmp_path / "plain.txt"], pattern, lines=lines)
    assert as_dict(count_files([tmp_path / "packed.gz"], pattern, lines=lines)) == as_dict(plain)


def test_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.zst").write_bytes(zstandard.compress(b"some words ") + zstandard.compress(b"more words"))
    assert as_dict(count_files([tmp_path / "a.zst"], "gpt2")) == {b"some": 1, b" words": 2, b" more": 1}


@pytest.mark.parametrize("kept", [1, 12, 30])
def test_a_zstd_frame_that_is_cut_off(kept, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress("".join(map(chr, range(20_000))).encode())
    assert len(packed) > 2 * kept
    (tmp_path / "a.zst").write_bytes(zstandard.compress(b"whole") + packed[: len(packed) // 2 + kept])
    with pytest.raises(DataError) as caught:
        count_files([tmp_path / "a.zst"], "gpt2")
    assert caught.value.code == "DATA-FILE" and caught.value.file == str(tmp_path / "a.zst")


@pytest.mark.parametrize("pattern", ["metaspace", "llama3"])
def test_lines_can_always_be_cut(pattern, tmp_path, small_chunks):
    """Numbers have no letters to cut after, and `metaspace` no spaces: what is by lines is cut at their ends."""
    (tmp_path / "numbers.txt").write_text("".join(f"{i}\n" for i in range(5000)))
    chunks = list(file_chunks(tmp_path / "numbers.txt", 1000, cut_table(pattern), True))
    assert len(chunks) > 20 and max(chunk.size for chunk in chunks) < 1100 and all(chunk.begins for chunk in chunks)
    assert len(list(file_chunks(tmp_path / "numbers.txt", 1000, cut_table(pattern), False))) == 1


def test_zstd_is_not_installed(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(sources.importlib, "import_module", missing)
    (tmp_path / "a.zst").write_bytes(b"")
    with pytest.raises(DataError, match="zstandard") as caught:
        count_files([tmp_path / "a.zst"], "gpt2")
    assert caught.value.code == "DATA-ZSTD"


@pytest.mark.parametrize("text", ["", "a", " ", "\n", "\0"])
@each_pattern
def test_empty_and_single(pattern, text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    wanted = expected([text], pattern)
    assert as_dict(count_files([tmp_path / "a.txt"], pattern)) == wanted
    assert as_dict(count_texts([text], pattern)) == wanted
    assert as_dict(count_files([], pattern)) == {}


BAD = {
    "lone continuation": b"\x80",
    "overlong": b"\xc0\xaf",
    "overlong of three": b"\xe0\x80\xaf",
    "surrogate": b"\xed\xa0\x80",
    "past the last": b"\xf4\x90\x80\x80",
    "cut short": b"\xe6\x97",
    "no lead": b"\xff",
}


@each_pattern
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("compressed", [False, True])
def test_bytes_that_are_not_utf8(pattern, bad, compressed, tmp_path, small_chunks):
    before = hard_text(5, 700).encode()
    for tail in (b"", b" and more" * 300):
        content = before + bad + tail
        file = tmp_path / ("a.gz" if compressed else "a.txt")
        file.write_bytes(gzip.compress(content) if compressed else content)
        with pytest.raises(UnicodeDecodeError) as wanted:
            content.decode()
        with pytest.raises(DataError) as caught:
            count_files([file], pattern, threads=2)
        assert caught.value.code == "DATA-UTF8" and caught.value.file == str(file)
        assert f"at byte {wanted.value.start:,} " in caught.value.found


def test_half_a_surrogate_pair():
    with pytest.raises(DataError, match=r"DATA-UTF8[\s\S]*text 1[\s\S]*U\+D83D at character 2"):
        count_texts(["fine", "ab\ud83d"], "gpt2")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"words " * 1000)[:-20])
    (tmp_path / "no.gz").write_bytes(b"no gzip at all")
    for name in ("missing.txt", "", "cut.gz", "no.gz"):
        with pytest.raises(DataError) as caught:
            count_files([tmp_path / name], "gpt2")
        assert caught.value.code == "DATA-FILE" and caught.value.file == str(tmp_path / name)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="lama3.*regular expression|regular expression.*lama3"):
        count_texts(["a"], "lama3")
    with pytest.raises(ValueError, match="threads=0"):
        count_texts(["a"], "gpt2", threads=0)
    with pytest.raises(ValueError, match="one text"):
        count_texts("a text", "gpt2")
    with pytest.raises(ValueError, match="text 1 .* is int"):
        count_texts((text for text in ("a", 3)), "gpt2")


def test_long_words_and_many(tmp_path):
    """Tables and arenas grow; words of every length up to past two blocks keep apart."""
    rng = np.random.default_rng(7)
    words = ["".join(rng.choice(list("ab"), length)) for length in range(1, 90) for _ in range(400)] + ["z" * 70_001]
    text = " ".join(words)
    (tmp_path / "a.txt").write_text(text)
    for threads in (1, 2):
        assert as_dict(count_files([tmp_path / "a.txt"], "gpt2", threads=threads)) == expected([text], "gpt2")


def test_special_tokens_are_text_like_any_other():
    """As in `tokenizers`: a fresh trainer's special tokens are not looked for in the text."""
    assert as_dict(count_texts(["a<eos>b"], "gpt2")) == {b"a": 1, b"<": 1, b"eos": 1, b">": 1, b"b": 1}


def test_progress_reaches_the_end(tmp_path, small_chunks):
    (tmp_path / "a.txt").write_text("word " * 1000)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"word " * 1000))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    seen = []
    count_files(sorted(tmp_path.iterdir()), "gpt2", progress=lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen) and seen[-1] == (size, size) and len(seen) > 3
    seen.clear()
    count_texts(["word"] * 7, "gpt2", progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (28, None)


def test_an_error_in_the_texts_comes_through():
    def texts():
        yield "fine"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        count_texts(texts(), "gpt2")


def test_the_larger_texts(data):
    for file in sorted(data.glob("*.txt")):
        text = file.read_bytes().decode()
        some = "".join(lines_of(text)[:: max(1, len(text) // 1_000_000)])
        for pattern in PATTERNS:
            assert as_dict(count_texts([some], pattern)) == expected([some], pattern)


def test_what_nfc_changes():
    """Every code point that NFC may change, alone, after letters, and beside another mark."""
    from eqx_moe.tokenizer import unicode_table

    marks = [chr(point) for point in np.flatnonzero(unicode_table.normal_forms()) if not 0xAC00 <= point < 0xD7A4]
    texts = [f"a{mark} {mark}\u0323{mark}b\u0301{mark}" for mark in marks]
    assert as_dict(count_texts(texts, "qwen2")) == expected(texts, "qwen2")
    apart = [f"a{mark}b {mark}" for mark in marks]
    for text in apart:
        unchanged = splitting.normalizer("qwen2").normalize_str(text) == text
        composed = count.is_composed(np.frombuffer(text.encode(), np.uint8), 0, len(text.encode()))
        assert unchanged or not composed
