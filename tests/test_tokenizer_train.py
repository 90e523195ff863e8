"""Trained tokenizers against Hugging Face's trainer: texts in, vocabulary, merges and files out."""

import gzip
import json
import subprocess
import sys

import bpe
import numpy as np
import pytest
import splitting
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from eqx_moe.errors import DataError
from eqx_moe.tokenizer import train_bpe, train_bpe_from_counts, train_bpe_from_iterator
from eqx_moe.tokenizer.count import count_texts
from eqx_moe.tokenizer.counts_file import Counted, add_counts, merge_counts, read_counts, write_counts
from eqx_moe.tokenizer.export import save_tokenizer
from eqx_moe.tokenizer.patterns import BYTE_TOKENS, LAYOUTS, pipeline

BYTE_LEVEL = [name for name in LAYOUTS if name != "metaspace"]

#: Pieces of text that trainers are seen to fail on.
PIECES = (*splitting.TRICKY, "aaaa", "abab", "the ", " of", "<s>", "\r\n", "\x00")
texts = st.lists(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=30).map("".join), max_size=4)


def theirs(pattern: str, documents=None, files=None, **options) -> Tokenizer:
    """What Hugging Face's trainer makes of whole documents, or of files line by line."""
    tokenizer = Tokenizer(models.BPE())
    if splitting.normalizer(pattern):
        tokenizer.normalizer = splitting.normalizer(pattern)
    known = pattern in LAYOUTS
    steps = [splitting.oracle(pattern) if known else pre_tokenizers.Split(Regex(pattern), "isolated")]
    if pattern == "metaspace":
        options["special_tokens"] = [*options.get("special_tokens", ()), *BYTE_TOKENS]
    else:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(show_progress=False, **{k: v for k, v in options.items() if v is not None})
    if files is None:
        tokenizer.train_from_iterator(documents, trainer)
    else:
        tokenizer.train([str(file) for file in files], trainer)
    return tokenizer


def model(tokenizer: Tokenizer) -> tuple[dict, list]:
    found = json.loads(tokenizer.to_str())["model"]
    return found["vocab"], found["merges"]


def check(data: st.DataObject):
    documents, pattern = data.draw(texts), data.draw(st.sampled_from(sorted(LAYOUTS)))
    special = data.draw(st.lists(st.sampled_from(["<s>", "ab", "aa", "th", "a", "</s>"]), max_size=4))
    # Some are full before all is merged; with `metaspace` the characters must have room.
    least = 700 if pattern == "metaspace" else 256 + len({*special} - {"a"})
    options = {
        "vocab_size": data.draw(st.integers(least, least + 40) | st.integers(700, 900)),
        "special_tokens": special,
        "min_frequency": data.draw(st.sampled_from([0, 0, 2, 3])),
        "max_token_length": data.draw(st.sampled_from([None, None, 2, 3, 5, 9])),
    }
    ours = train_bpe_from_iterator(documents, pattern=pattern, threads=data.draw(st.sampled_from([1, 2])), **options)
    assert model(ours) == model(theirs(pattern, documents, **options))


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_equals_tokenizers(data):
    check(data)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_equals_tokenizers_on_many(data):
    check(data)


SHORT = "It's 1234 o'clock!\r\n\r\n  Naïve café, 日本語の文章です。\t\tHe said: 'We'll see'\n" * 7


@pytest.mark.parametrize("pattern", sorted(LAYOUTS))
@pytest.mark.parametrize("lines", [False, True])
def test_files(pattern, lines, tmp_path):
    """Also compressed; whole documents and lines differ where a pattern looks past a line's end."""
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_text(SHORT, newline="")
    packed.write_bytes(gzip.compress(SHORT.encode()))
    ours = train_bpe([plain, packed], 560, pattern, ["<s>"], lines=lines, threads=2)
    fed = {"files": [plain, plain]} if lines else {"documents": [SHORT, SHORT]}
    assert model(ours) == model(theirs(pattern, vocab_size=560, special_tokens=["<s>"], **fed))


@pytest.mark.parametrize("pattern", sorted(LAYOUTS))
def test_the_tokenizer_cuts_as_training_did(pattern):
    """What tokenizer.json says of a pattern is what its scanner does; decoding gives the text back."""
    tokenizer = train_bpe_from_iterator([SHORT], 560, pattern)
    assert model(tokenizer)[1]
    twin = theirs(pattern, [SHORT], vocab_size=560)
    for text in (SHORT, "unseen ✓ text", " ", "", "a  b"):
        if pattern != "metaspace" or text == SHORT:  # Their trainer knows of no bytes for unseen characters.
            assert tokenizer.encode(text).ids == twin.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_regular_expression():
    tokenizer = train_bpe_from_iterator([SHORT], 300, r"\w+|\W")
    assert json.loads(tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": r"\w+|\W"}
    assert model(tokenizer) == model(theirs(r"\w+|\W", [SHORT], vocab_size=300))


def test_several_sizes_are_the_same_as_single_runs():
    """Also where a special token's text is merged, which makes no new token."""
    options = {"pattern": "gpt2", "special_tokens": ["It", "<s>", "é"]}
    sizes = [310, 259, 258, 5000, 300]
    several = train_bpe_from_iterator([SHORT], sizes, **options)
    assert [model(one) for one in several] == [model(train_bpe_from_iterator([SHORT], n, **options)) for n in sizes]
    assert [one.get_vocab_size() for one in several[:3]] == [310, 259, 258]


def test_threads_iterators_files_and_counts_agree(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(SHORT * 9, newline="")
    ours = [train_bpe(file, 500, threads=threads).to_str() for threads in (1, 2, 8)]
    ours.append(train_bpe_from_iterator(iter([SHORT * 9]), 500).to_str())
    ours.append(train_bpe_from_counts(count_texts([SHORT * 9], "llama3"), 500).to_str())
    assert len(set(ours)) == 1


def test_the_result_of_no_text():
    tokenizer = train_bpe_from_iterator([], 300, special_tokens=["<s>"])
    assert tokenizer.get_vocab_size() == 257 and tokenizer.decode(tokenizer.encode("a ✓").ids) == "a ✓"
    assert train_bpe_from_iterator(["x"], 300).get_vocab_size() == 256


def test_more_pairs_than_32_bits_count(tmp_path):
    """Through counts files, that add up to more than each holds."""
    parts = [{"ab": 2**31, "bc": 2**31 + 1}, {"ab": 2**32, "cd": 5}]
    for name, words in zip("pq", parts, strict=True):
        write_counts(tmp_path / name, Counted(bpe.word_counts(words), "gpt2", False))
    counted = merge_counts([tmp_path / "p", tmp_path / "q"], tmp_path / "sum")
    vocab, merges = model(train_bpe_from_counts(counted, 300, "gpt2", min_frequency=2**31))
    assert merges == [["a", "b"], ["b", "c"]] and len(vocab) == 258


@pytest.mark.full
@pytest.mark.parametrize(("copies", "fails"), [(2**18 - 64, False), (2**18 + 64, True)])
def test_hugging_face_counts_in_32_bits(copies, fails, tmp_path):
    """A word with 2**13 equal pairs, so often that they are more than 2**31: their trainer merges nothing any more."""
    word = "ab" * 2**13
    theirs = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=9, show_progress=False)
    theirs.train_from_iterator((word for _ in range(copies)), trainer)
    write_counts(tmp_path / "counts", Counted(bpe.word_counts({word: copies}), "gpt2", False))
    ours = train_bpe_from_counts(read_counts(tmp_path / "counts"), 256 + 7, "gpt2")
    doubled = [["ab" * 2**k] * 2 for k in range(6)]
    assert model(ours)[1] == [["a", "b"], *doubled]
    assert model(theirs)[1] == ([] if fails else model(ours)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 256, "special_tokens": ["<s>"]}, "at least 257.*got 256"),
        ({"vocab_size": []}, "got none"),
        ({"vocab_size": 300, "special_tokens": "<s>"}, "one text '<s>'"),
        ({"vocab_size": 300, "special_tokens": [""]}, "not empty; got ''"),
        ({"vocab_size": 300, "min_frequency": -1}, "`min_frequency` must be at least 0; got -1"),
        ({"vocab_size": 300, "max_token_length": 0}, "`max_token_length` must be at least 1; got 0"),
        ({"vocab_size": 300, "threads": 0}, "`threads` must be at least 1; got 0"),
        ({"vocab_size": 258, "pattern": "metaspace"}, "at least 260.*got 258"),
        ({"vocab_size": 300, "pattern": "gtp2"}, "gtp2"),
        ({"vocab_size": 300, "pattern": "gpt-2"}, "one of gpt2, .*got 'gpt-2'"),
        ({"vocab_size": 300, "pattern": "[a"}, "or a regular expression; got '\\[a': .*premature end"),
        ({"vocab_size": 300, "special_tokens": ["\ud800"]}, "`special_tokens` must be texts"),
        ({"vocab_size": 600, "pattern": "metaspace", "end_of_word_suffix": "</w>"}, "suffix must be empty; got .*</w>"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        train_bpe_from_iterator(["abc"], **options)


def test_counts_know_how_they_were_cut():
    counted = Counted(count_texts([SHORT], "gpt2"), "gpt2", False)
    expected = train_bpe_from_iterator([SHORT], 300, "gpt2").to_str()
    assert train_bpe_from_counts(counted, 300, "gpt2").to_str() == expected
    with pytest.raises(ValueError, match="must be 'gpt2', by which these words were cut; got 'llama3'"):
        train_bpe_from_counts(counted, 300)


def test_as_many_tokens_as_anybody_wants():
    """Memory goes by the words, not by the number; and NumPy's integers will do."""
    expected = train_bpe_from_iterator([SHORT], 3000).to_str()
    assert train_bpe_from_iterator([SHORT], np.int64(2**31 - 1)).to_str() == expected


def test_counts_that_64_bits_do_not_hold():
    words = bpe.word_counts({"aaaa": 2**61})
    with pytest.raises(ValueError, match=r"fewer than 2\*\*62 bytes; got about 9.22e\+18"):
        train_bpe_from_counts(words, 300, "gpt2")
    with pytest.raises(OverflowError):
        add_counts([words, words, words, words])


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "bad.txt"
    file.write_bytes(b"abc\xff")
    with pytest.raises(DataError) as caught:
        train_bpe(file, 300)
    assert caught.value.code == "DATA-UTF8" and caught.value.file == str(file)


def test_progress_is_told():
    told = []
    train_bpe_from_iterator([SHORT], 300, progress=lambda *args: told.append(args))
    assert told[0][0] == "counting" and told[-1] == ("merging", 300, 300)


@pytest.mark.parametrize("pattern", sorted(LAYOUTS))
def test_transformers_reads_the_folder(pattern, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe_from_iterator([SHORT], 560, pattern, ["<s>", "</s>"])
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    save_tokenizer(tokenizer, tmp_path, bos_token="<s>", eos_token="</s>", chat_template=template)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (SHORT, "unseen ✓ text </s> it's", " a"):
        ids = tokenizer.encode(text).ids
        assert found(text)["input_ids"] == ids
        assert found.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    assert (found.bos_token_id, found.eos_token, len(found)) == (0, "</s>", tokenizer.get_vocab_size())
    assert found.apply_chat_template([{"role": "user", "content": "It"}], tokenize=False) == "It</s>"


def test_one_file_or_a_folder(tmp_path):
    tokenizer = train_bpe_from_iterator([SHORT], 300)
    save_tokenizer(tokenizer, tmp_path / "t.json")
    assert Tokenizer.from_file(str(tmp_path / "t.json")).to_str() == tokenizer.to_str()
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    with pytest.raises(ValueError, match="`eos_token` must be a token"):
        save_tokenizer(tokenizer, tmp_path / "folder", eos_token="</s>")
    with pytest.raises(ValueError, match="must be a folder"):
        save_tokenizer(tokenizer, tmp_path / "u.json", chat_template="x")


def test_layouts_are_what_the_tests_split_with():
    for pattern in BYTE_LEVEL[1:]:
        steps = pipeline(pattern)["pre_tokenizer"]["pretokenizers"]
        assert tuple(step["pattern"]["Regex"] for step in steps[:-1]) == splitting.REGULAR_EXPRESSIONS[pattern]


def test_importing_loads_no_jax_and_no_numba():
    code = """
import sys, eqx_moe.tokenizer
before = {"jax", "numba", "numpy"} & set(sys.modules)
eqx_moe.tokenizer.train_bpe
print(before, "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set() False", done.stderr


# --- The larger texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"vocab_size": 257}, {"vocab_size": 2000}, {"vocab_size": 64_000, "min_frequency": 3, "max_token_length": 7}],
)
@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
def test_a_larger_text(pattern, options, data):
    text = (data / "tinyshakespeare.txt").read_text()[:200_000]
    found = model(train_bpe_from_iterator([text], pattern=pattern, **options))
    assert found == model(theirs(pattern, [text], **options))
    assert options["vocab_size"] in (len(found[0]), 64_000)


@pytest.mark.full
@pytest.mark.parametrize("pattern", sorted(LAYOUTS))
@pytest.mark.parametrize("lines", [False, True])
def test_every_text(pattern, lines, data):
    for file in sorted(data.glob("*.txt")):
        size = 64_000 if pattern in ("llama3", "metaspace") else 32_000
        fed = {"files": [file]} if lines else {"documents": [file.read_bytes().decode()]}
        ours = train_bpe(file, size, pattern, lines=lines)
        assert model(ours) == model(theirs(pattern, vocab_size=size, **fed)), file.name
