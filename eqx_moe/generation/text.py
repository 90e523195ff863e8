"""Ids to text while they come."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

# Tokens before a new one that can change how it is written out: spaces between words, parts of one character.
_CONTEXT = 8
# A character of four bytes shows as at most three replacement characters while its last byte is missing.
_UNFINISHED = 3
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """The text of ids that arrive one by one, in pieces that can be shown at once.

    A character whose bytes are spread over several tokens is held back until it is whole, and left out if the ids end
    before. The pieces put together are otherwise `tokenizer.decode` of all ids.

    Args:
        tokenizer: of the model.
        ids: such as `stream(...)` gives.
        prompt: the ids before, which decide whether the text goes on with a space; they are not in the text.
    """
    window = list(prompt[-_CONTEXT:])
    shown = len(tokenizer.decode(window))
    for token in ids:
        window.append(token)
        text = tokenizer.decode(window)
        unfinished = min(_UNFINISHED, len(text) - len(text.rstrip(_REPLACEMENT)))
        if len(text) - unfinished > shown:
            yield text[shown : len(text) - unfinished]
            shown = len(text) - unfinished
        if not unfinished and len(window) > 4 * _CONTEXT:
            window = window[-_CONTEXT:]
            shown = len(tokenizer.decode(window))
