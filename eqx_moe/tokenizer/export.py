"""Vocabulary and merges as a `tokenizers.Tokenizer`, and as the files that transformers reads."""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from eqx_moe.tokenizer.patterns import layout, pipeline
from eqx_moe.tokenizer.whole import whole_file

_UNKNOWN = "<unk>"


def build_tokenizer(
    tokens: Sequence[str],
    merges: Iterable[tuple[str, str]],
    pattern: str,
    special_tokens: Iterable[str] = (),
    *,
    continuing_subword_prefix: str = "",
    end_of_word_suffix: str = "",
) -> Tokenizer:
    """The tokenizer of a vocabulary, in the layout of a pattern's family; special tokens are never split."""
    found = layout(pattern)
    specials = list(dict.fromkeys(special_tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": _UNKNOWN if found.metaspace and _UNKNOWN in specials else None,
        "continuing_subword_prefix": continuing_subword_prefix or None,
        "end_of_word_suffix": end_of_word_suffix or None,
        "fuse_unk": found.metaspace,
        "byte_fallback": found.metaspace,
        "ignore_merges": found.ignore_merges,
        "vocab": ids,
        "merges": [list(merge) for merge in merges],
    }
    added = [
        {
            "id": ids[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in specials
    ]
    outline = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return Tokenizer.from_str(json.dumps(outline | pipeline(pattern) | {"model": model}))


def save_tokenizer(
    tokenizer: Tokenizer,
    out: str | pathlib.Path,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    unk_token: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes a tokenizer: `out` ending in .json is the one file tokenizer.json; else a folder for transformers'
    `AutoTokenizer`, with tokenizer_config.json and, where there is one, chat_template.jinja.

    The named tokens must be in the vocabulary.
    """
    out = pathlib.Path(out)
    check_out(out, bos_token, eos_token, pad_token, unk_token, chat_template)
    named: dict[str, Any] = {
        "bos_token": bos_token,
        "eos_token": eos_token,
        "pad_token": pad_token,
        "unk_token": unk_token,
    }
    named = {name: token for name, token in named.items() if token is not None}
    for name, token in named.items():
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"`{name}` must be a token of the vocabulary; got {token!r}. Make it a special token.")
    if out.suffix == ".json":
        _write(out, tokenizer.to_str(pretty=True))
        return
    out.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named
    _write(out / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write(out / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if chat_template is not None:
        _write(out / "chat_template.jinja", chat_template)


def check_out(out: pathlib.Path, *beside: str | None) -> None:
    """Refuses one file for what is more than tokenizer.json."""
    if out.suffix == ".json" and any(text is not None for text in beside):
        raise ValueError(f"`out` must be a folder to hold named tokens or a chat template; got {out}.")


def _write(path: pathlib.Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())
