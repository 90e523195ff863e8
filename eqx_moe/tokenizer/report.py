"""What a trained vocabulary is like: how well it compresses, its longest tokens, and for which scripts it falls back on
bytes."""

import html
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eqx_moe.tokenizer import cells
from eqx_moe.tokenizer.alphabet import byte_characters
from eqx_moe.tokenizer.counts import WordCounts, read_only
from eqx_moe.tokenizer.merge import Merges
from eqx_moe.tokenizer.patterns import BYTE_TOKENS
from eqx_moe.tokenizer.reference import merge_symbols

_LONGEST = 20
_SCRIPTS = 16
_FALLBACK = frozenset(BYTE_TOKENS)
_SAMPLE = 20_000  # Words whose tokens are looked at: so many of the most frequent ones, and so many of the others.
_AT_ONCE = 1 << 20  # Words: what is made for each of them at a time, so that memory does not grow with their number.


@dataclass(frozen=True)
class Report:
    """`curve`: vocabulary sizes, and bytes of text for each token. `longest`: tokens, with their lengths in bytes.
    `scripts`: for each the share of its tokens that are a single byte, and of all bytes how many are of it; estimated
    from `sample` words, which may be all of them.

    `outside`: how many bytes are of symbols that are not in the vocabulary. They count as text; as tokens they count if
    there is a token for each byte (`byte_fallback`, of vocabularies of characters), as the tokenizer has it. Then
    `curve` is an upper bound past its first point: training merges across what is outside, the tokenizer does not.
    """

    words: int
    unique: int
    bytes: int
    outside: int
    byte_fallback: bool
    curve: list[tuple[int, float]]
    longest: list[tuple[str, int]]
    scripts: list[tuple[str, float, float]]
    sample: int


def make_report(counts: WordCounts, merges: Merges, *, characters: bool, special_tokens: Sequence[str]) -> Report:
    """Looks at the words that a vocabulary was trained on. `characters`: its symbols are characters, not bytes."""
    size = sum(_bytes(counts, words) for words in _blocks(counts))
    symbols, outside = _symbols(counts, merges, characters)
    left = symbols - np.cumsum(merges.saved)
    sizes = [n for n in _round_sizes(len(merges.tokens)) if n > merges.base] + [len(merges.tokens)]
    curve = [(merges.base, size / symbols)] if symbols else []
    for n in sizes:
        at = np.flatnonzero(merges.steps[:, 2] == n - 1)
        if len(at):
            curve.append((n, size / int(left[at[0]])))
    special = {*special_tokens, *(_FALLBACK if characters else ())}
    texts = [as_text(token, characters) for token in merges.tokens if token not in special]
    longest = sorted(((text, len(raw)) for text, raw in texts), key=lambda pair: -pair[1])[:_LONGEST]
    scripts, sample = _scripts(counts, size, merges, characters)
    return Report(int(counts.counts.sum()), len(counts), size, outside, characters, curve, longest, scripts, sample)


def as_text(token: str, characters: bool) -> tuple[str, bytes]:
    """A token as a reader would have it, and its bytes."""
    if characters:
        raw = token.encode()
        return token, raw
    code = {character: byte for byte, character in enumerate(byte_characters())}
    raw = bytes(code[character] for character in token) if all(c in code for c in token) else token.encode()
    return raw.decode(errors="replace"), raw


def _symbols(counts: WordCounts, merges: Merges, characters: bool) -> tuple[int, int]:
    """How many tokens the texts have before anything is merged, and how many bytes are outside of the vocabulary."""
    seen = np.zeros((4, 0x110000 if characters else 256), np.int64)
    cells.survey(read_only(counts.text), read_only(counts.offsets), read_only(counts.counts), characters, seen)
    often, shown, alphabet = seen.sum(0), byte_characters(), set(merges.tokens[: merges.base])
    inside = outside = 0
    for code in np.flatnonzero(often).tolist():
        character = chr(code) if characters else shown[code]
        if character in alphabet:
            inside += int(often[code])
        else:
            outside += int(often[code]) * (len(character.encode()) if characters else 1)
    return inside + (outside if characters else 0), outside


def _round_sizes(most: int) -> list[int]:
    return [digit * 10**power for power in range(2, 8) for digit in (1, 2, 5) if digit * 10**power < most]


def _blocks(counts: WordCounts) -> Iterator[np.ndarray]:
    """The numbers of all words, some at a time."""
    for first in range(0, len(counts), _AT_ONCE):
        yield np.arange(first, min(first + _AT_ONCE, len(counts)))


def _bytes(counts: WordCounts, words: np.ndarray) -> int:
    """The bytes of text that these words are."""
    return int((counts.counts[words] * (counts.offsets[words + 1] - counts.offsets[words])).sum())


def _sample(counts: WordCounts) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent words; and others, evenly over these in their order, so that each script has its part."""
    often = np.zeros(0, np.int64)
    for words in _blocks(counts):
        often = np.concatenate([often, words])
        if len(often) > _SAMPLE:
            often = often[np.argpartition(counts.counts[often], -_SAMPLE)[-_SAMPLE:]]
    often.sort()
    left = len(counts) - len(often)
    rest = np.unique(np.linspace(0, left - 1, min(left, _SAMPLE)).astype(np.int64))
    # The n-th of the others comes after as many frequent words as stand before it.
    return often, rest + np.searchsorted(often - np.arange(len(often)), rest, side="right")


def _scripts(
    counts: WordCounts, size: int, merges: Merges, characters: bool
) -> tuple[list[tuple[str, float, float]], int]:
    """`Report.scripts`, and from how many words; `size` is the bytes of all words."""
    often, rest = _sample(counts)
    # What the others' sample stands for: as many times its own bytes as they all have.
    scale = (size - _bytes(counts, often)) / max(1, _bytes(counts, rest))
    spell = _speller(merges, characters)
    tokens, single, share = (defaultdict[str, float](float) for _ in range(3))
    for words, times in ((often, 1.0), (rest, scale)):
        for word in words.tolist():
            raw = counts.text[counts.offsets[word] : counts.offsets[word + 1]].tobytes()
            text, weight = raw.decode(), times * int(counts.counts[word])
            spelt, script = spell(text), _script(text)
            tokens[script] += weight * len(spelt)
            single[script] += weight * sum(_is_byte(token, characters) for token in spelt)
            share[script] += weight * len(raw)
    most = sorted(share, key=lambda script: -share[script])[:_SCRIPTS]
    found = [(name, single[name] / max(1, tokens[name]), share[name] / size) for name in most]
    return found, len(often) + len(rest)


def _speller(merges: Merges, characters: bool) -> Callable[[str], list[str]]:
    """A function from a word to its tokens, by the slow way of the reference."""
    steps = merges.steps.tolist()
    ranks = {(left, right): i for i, (left, right, _) in reversed([*enumerate(steps)])}
    ids = {token: i for i, token in enumerate(merges.tokens)}
    shown = byte_characters()

    def spell(text: str) -> list[str]:
        if characters:
            spelt = [[c] if c in ids else [BYTE_TOKENS[byte] for byte in c.encode()] for c in text]
            symbols = [ids[token] for several in spelt for token in several]
        else:
            symbols = [ids[shown[byte]] for byte in text.encode() if shown[byte] in ids]
        while len(symbols) > 1:
            first = min(ranks.get(pair, len(steps)) for pair in zip(symbols, symbols[1:], strict=False))
            if first == len(steps):
                break
            left, right, new = steps[first]
            symbols = merge_symbols(symbols, (left, right), new)
        return [merges.tokens[symbol] for symbol in symbols]

    return spell


def _is_byte(token: str, characters: bool) -> bool:
    if not characters:
        return len(token) == 1
    return token in _FALLBACK or (len(token) == 1 and token.isascii())


def _script(text: str) -> str:
    """The first word of the Unicode name of a text's first letter: LATIN, CJK, HIRAGANA; or what it is instead.

    Letters that modify others belong to no script: their names begin with what they do.
    """
    for character in text:
        if unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lo"):
            return unicodedata.name(character, "other letters").split()[0].removesuffix("-")
    return "digits" if any(character.isnumeric() for character in text) else "signs and blanks"


# --- As text and as a page -------------------------------------------------------------------------------------------


def as_terminal(report: Report) -> str:
    """The report for a terminal."""
    best = max((value for _, value in report.curve), default=1.0)
    lines = [_summary(report), "", "vocabulary  bytes per token"]
    lines += [f"{n:>10,}  {value:>5.2f} {'#' * round(40 * value / best)}" for n, value in report.curve]
    lines += ["", f"single-byte tokens, by script (and the script's share of the text){_estimated(report)}"]
    lines += [f"{single:>10.1%}  {name} ({share:.1%})" for name, single, share in report.scripts]
    lines += ["", "longest tokens, in bytes"]
    lines += [f"{length:>10}  {text!r}" for text, length in report.longest]
    return "\n".join(lines) + "\n"


def as_page(report: Report) -> str:
    """The report as a page of HTML that needs nothing else."""
    scripts = [(html.escape(name), f"{single:.1%}", f"{share:.1%}") for name, single, share in report.scripts]
    longest = [(f"<code>{html.escape(repr(text))}</code>", str(length)) for text, length in report.longest]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Tokenizer report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }} td, th {{ padding: 0 1em 0 0; text-align: left; }}
</style>
<h1>Tokenizer report</h1>
<p>{html.escape(_summary(report))}</p>
<h2>Compression</h2>
{_plot(report.curve)}
{_table(("vocabulary", "bytes per token"), [(f"{n:,}", f"{value:.3f}") for n, value in report.curve])}
<h2>Single-byte tokens</h2>
<p>Of the tokens of words that begin in a script, as many are a single byte{_estimated(report)}.</p>
{_table(("script", "single bytes", "share of the text"), scripts)}
<h2>Longest tokens</h2>
{_table(("token", "bytes"), longest)}
</html>
"""


def _summary(report: Report) -> str:
    summary = f"A vocabulary of {report.curve[-1][0]:,}. " if report.curve else ""
    summary += f"{report.bytes:,} bytes of text in {report.words:,} words, {report.unique:,} of them different."
    if report.outside:
        how = "they are left out, and are no tokens."
        if report.byte_fallback:
            how = (
                "each is a token of its own. Training merges across them and the tokenizer does not, so that past the "
                "first row bytes per token are at most those shown."
            )
        summary += f" {report.outside:,} bytes ({report.outside / report.bytes:.1%}) are outside of the alphabet: {how}"
    return summary


def _estimated(report: Report) -> str:
    return "" if report.sample == report.unique else f", estimated from {report.sample:,} of the different words"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr><tr>{'</tr><tr>'.join(cells)}</tr></table>"


def _plot(curve: Sequence[tuple[int, float]]) -> str:
    """Bytes per token over the vocabulary's size, which is on a logarithmic axis."""
    if len(curve) < 2:
        return ""
    width, height, left, bottom = 640, 300, 50, 40
    low, high = np.log(curve[0][0]), np.log(curve[-1][0])
    top = 1.1 * max(value for _, value in curve)

    def place(n: float, value: float) -> tuple[float, float]:
        x = left + (np.log(n) - low) / (high - low) * (width - left - 20)
        return round(float(x), 1), round(float(height - bottom - value / top * (height - bottom)), 1)

    points = [place(float(n), value) for n, value in curve]
    marks = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in points)
    below = "".join(
        f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{n:,}</text>'
        for (n, _), (x, _) in [*zip(curve, points, strict=True)][:: max(1, len(curve) // 6)]
    )
    beside = "".join(
        f'<text x="{left - 8}" y="{place(float(curve[0][0]), float(n))[1] + 4}" text-anchor="end">{n}</text>'
        for n in range(int(top) + 1)
    )
    line = " ".join(f"{x},{y}" for x, y in points)
    axis = f'<path d="M{left} 0V{height - bottom}H{width}" fill="none" stroke="#888"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" font-size="12" fill="#246">'
        f"<title>Bytes per token over the size of the vocabulary</title>{axis}"
        f'<polyline points="{line}" fill="none" stroke="#246" stroke-width="2"/>{marks}{below}{beside}</svg>'
    )
