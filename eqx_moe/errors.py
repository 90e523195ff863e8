"""Errors: one shape everywhere.

A wrong argument of a function is a `ValueError`. Everything that is wrong with *files* is a `CheckpointError`, or for
training data a `DataError`. Its code is stable: programs and tests match the code, people read the text.
"""

import re

#: Every code of a `FileError`, and what is wrong.
CODES = {
    "CFG-FOLDER": "there is no such folder, or something else has its name",
    "CFG-MISSING": "config.json, or a key in it, is absent",
    "CFG-FILE": "config.json or generation_config.json is no plain readable file",
    "CFG-JSON": "config.json or generation_config.json is no strict JSON object",
    "CFG-MODEL-TYPE": "model_type is none of the supported ones",
    "CFG-VALUE": "a value has the wrong type, is impossible, or is not implemented",
    "ST-WEIGHTS": "the folder has no weights",
    "ST-PICKLE": "the folder has pickled weights only",
    "ST-FILE": "a shard is no plain readable file of the folder",
    "ST-FORMAT": "a shard is something else under that name: a pickle, a web page, a Git LFS pointer, a beginning",
    "ST-HEADER": "a shard's header is malformed",
    "ST-OFFSETS": "the tensors do not tile the data: overlap, hole, bytes too many or too few",
    "ST-MISSING": "a tensor of the model is not in the files",
    "ST-EXTRA": "a tensor of the files is not in the model",
    "ST-SHAPE": "a shape is impossible, or not the one that config.json gives",
    "ST-DTYPE": "a dtype is unknown, no supported float, or differs inside one stack",
    "ST-TIED": "a stored output head differs from the embedding to which config.json ties it",
    "ST-RANGE": "a value does not fit in the dtype asked for",
    "ST-VALUE": "a value cannot be: NaN or infinity where values must be finite, or a boolean that is neither 0 nor 1",
    "ST-SAVE": "a save was killed as it moved its files into place, and cannot be finished",
    "ST-CHANGED": "a file changed while it was being read",
    "IDX-FILE": "the index is no plain readable file",
    "IDX-JSON": "the index is no strict JSON object",
    "IDX-MAP": "the index has no weight_map from tensors to files",
    "IDX-PATH": "the index names something else than a .safetensors file of the folder",
    "IDX-SHARD": "a shard that the index lists, or the index to shards, is absent",
    "IDX-MISMATCH": "the index and the shards disagree",
    "IDX-AMBIGUOUS": "shards with an index, and a model.safetensors beside: two models in one folder",
    "SUM-MISSING": "verification is asked for, and there is no eqx_moe.json with checksums",
    "SUM-FILE": "eqx_moe.json is no plain readable file",
    "SUM-JSON": "eqx_moe.json is no strict JSON object",
    "SUM-LIST": "eqx_moe.json has no sha256 from files to checksums",
    "SUM-DIFFERS": "a file of weights is not the one that eqx_moe.json was written with",
    "TOK-MISSING": "tokenizer.json is absent",
    "TOK-FILE": "tokenizer.json, tokenizer_config.json or another file of a tokenizer is no plain readable file",
    "TOK-JSON": "tokenizer.json, tokenizer_config.json or another file of a tokenizer is no strict JSON object",
    "TOK-LOAD": "the tokenizers library refuses tokenizer.json",
    "TOK-ADDED": "an added token has another id once loaded than tokenizer.json says",
    "HUB-REPO": "the Hub has no such repo or revision, or not for you",
    "HUB-ACCESS": "the Hub refuses: gated, no token, or a token without the right",
    "HUB-FILE": "the repo lacks a file that the model needs, or says odd things about its files",
    "HUB-OFFLINE": "the Hub cannot be reached, and the cache lacks what is needed",
    "HUB-FAILED": "the Hub answers with errors, again and again",
    "HUB-HASH": "what was downloaded is not what the Hub says it has",
    "HUB-CONFLICT": "another commit came in between",
    "HUB-DISK": "too little free disk",
    "HUB-MEMORY": "the model does not fit into the memory",
    "COUNTS-FILE": "a counts file is no plain readable file",
    "COUNTS-FORMAT": "no counts file, or one of another version",
    "COUNTS-LENGTH": "a counts file is cut off, or longer than it says",
    "COUNTS-SUM": "a counts file is damaged: its checksum differs",
    "COUNTS-WORDS": "a counts file's words are not in order, not UTF-8, or have impossible counts",
    "COUNTS-PATTERN": "counts of texts that were cut in different ways cannot be added",
    "DATA-FILE": "a data file is no plain readable file",
    "DATA-SUFFIX": "a data file is neither .txt nor .jsonl",
    "DATA-KIND": "a data file is evidently no text",
    "DATA-ZSTD": "a .zst file, and nothing installed that unpacks it",
    "DATA-EMPTY": "there is no text, or no document of two tokens",
    "DATA-UTF8": "bytes that are not UTF-8, or half a surrogate pair",
    "DATA-NUL": "a NUL character",
    "DATA-JSON": "a line is no strict JSON",
    "DATA-OBJECT": "a line is no object",
    "DATA-TEXT": "a line has no string that is not empty under `text`",
    "DATA-ID": "the tokenizer gives an id outside of the model's vocabulary",
}

_SHOWN_CHARACTERS = 200
_SHOWN_PROBLEMS = 10


def quote(value: object) -> str:
    """Untrusted text, safe to print: its `repr`, the middle left out past 200 characters."""
    if isinstance(value, str) and len(value) > 2 * _SHOWN_CHARACTERS:
        # The middle of a long one is never escaped.
        value = value[:_SHOWN_CHARACTERS] + value[-_SHOWN_CHARACTERS:]
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = (_SHOWN_CHARACTERS - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


class EqxMoeError(Exception):
    """Root of this library's own errors."""


class FileError(EqxMoeError, ValueError):
    """Something is wrong with files.

    `code` is one of `CODES`. `file` and `item` (a tensor, a key) are as found; the text shows them escaped. `expected`,
    `found` and `fix` are sentences of ours, in which the raiser has put foreign text through `quote`. `problems` has
    every problem that was found, one line each, where one error stands for several.
    """

    def __init__(
        self,
        *,
        code: str,
        doing: str,
        file: str = "",
        item: str = "",
        expected: str = "",
        found: str = "",
        fix: str = "",
        problems: tuple[str, ...] = (),
    ):
        assert code in CODES, code
        self.code = code
        self.doing = doing
        self.file = file
        self.item = item
        self.expected = expected
        self.found = found
        self.fix = fix
        self.problems = problems
        super().__init__(self._text())

    def _text(self) -> str:
        places = [self.doing, *(quote(place) for place in (self.file, self.item) if place)]
        lines = [f"[{self.code}] {': '.join(places)}"]
        for label, text in (("expected", self.expected), ("found", self.found), ("fix", self.fix)):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        if len(self.problems) > 1:
            groups = _groups(self.problems)
            lines.append(f"  all {len(self.problems)} problems (error.problems lists each):")
            lines += [f"    {group}" for group in groups[:_SHOWN_PROBLEMS]]
            if len(groups) > _SHOWN_PROBLEMS:
                lines.append(f"    and {len(groups) - _SHOWN_PROBLEMS} more kinds")
        return "\n".join(lines)


def _groups(problems: tuple[str, ...]) -> list[str]:
    """One line for all problems that differ only in the numbers of dotted names: 48 layers with one fault are one."""
    number = re.compile(r"(?<=\.)([0-9]+)(?=\.)")
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for problem in problems:
        pieces = number.split(problem)
        groups.setdefault(tuple(pieces[::2]), []).append(pieces[1::2])
    lines = []
    for words, members in groups.items():
        numbers = [values[0] if len(set(values)) == 1 else "*" for values in zip(*members, strict=True)]
        count = f"{len(members)} x " if len(members) > 1 else ""
        lines.append(count + "".join(map("".join, zip(words, [*numbers, ""], strict=True))))
    return lines


class CheckpointError(FileError):
    """Something is wrong with a checkpoint's files."""


class DataError(FileError):
    """Something is wrong with training data."""
