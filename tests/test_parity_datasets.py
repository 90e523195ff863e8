"""Training a tokenizer on columns of `datasets`."""

import pytest

from eqx_moe.tokenizer import train_bpe_from_iterator

datasets = pytest.importorskip("datasets")

TEXTS = ["It's 1234 o'clock!", "Naïve café,\n 日本語の文章です。", "", "He said: 'We'll see'"] * 9


def test_a_column_is_an_iterable_of_texts():
    table = datasets.Dataset.from_dict({"text": TEXTS, "other": range(len(TEXTS))})
    expected = train_bpe_from_iterator(TEXTS, 320).to_str()
    assert train_bpe_from_iterator(table["text"], 320).to_str() == expected
    streamed = (row["text"] for row in table.to_iterable_dataset(num_shards=3))
    assert train_bpe_from_iterator(streamed, 320).to_str() == expected


def test_a_row_without_a_text_is_refused():
    table = datasets.Dataset.from_dict({"text": ["a text", None]})
    with pytest.raises(ValueError, match="None"):
        train_bpe_from_iterator(iter(table["text"]), 300)
