"""The patterns as `tokenizers` has them, and strings that are hard on them: for the tests of the tokenizer trainer."""

from tokenizers import Regex, normalizers, pre_tokenizers

REGULAR_EXPRESSIONS = {
    "gpt2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek_v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}

#: All that `\s` matches.
WHITESPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

#: What the patterns treat differently, and what looks as if they did.
TRICKY = (
    *WHITESPACE,
    *("\r\n", "\n\n", "  ", " \n ", "\0", "\x1c", "\x1f", "\x7f", "\u200b", "\u200d", "\ufeff", "\u2581", "\ufffd"),
    *("'s", "'S", "'ſ", "'t", "'re", "'VE", "'m", "'lL", "'d", "'", "’s", "'re've", "''", "ſ", "\u212a", "ß"),
    *("a", "Z", "é", "e\u0301", "Ǆ", "ǅ", "ʰ", "ª", "\u0301", "\u0903", "\u20e0", "\u1e9e", "\u03c2", "ﬁ", "İ"),
    *(
        "1",
        "23",
        "4567",
        "٣",
        "Ⅷ",
        "²",
        "½",
        "〇",
        "一",
        "龥",
        "龦",
        "日本",
        "ぁ",
        "\u3099",
        "゠",
        "・",
        "ー",
        "한",
        "\u1100\u1161",
    ),
    *("!", ",", ".", "/", "//", "-", "_", "(", ")", "$", "+", "€", "©", "—", "“", "。", "、", "．"),
    *(
        "👍",
        "👩\u200d🚀",
        "🏳\ufe0f\u200d🌈",
        "🇬🇷",
        "\u0e01\u0e33",
        "\u0915\u094d\u0937",
        "\u05d0\u05b8",
        "\U0001d7ce",
        "\U000e0041",
    ),
    *("\ue000", "\U0010ffff", "\u0378", "<|endoftext|>", "https://a.b/c?d=1", "\U0001e922", "\u16d67"),
)


def oracle(pattern: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of a pattern, without the step that turns bytes into characters."""
    if pattern == "metaspace":
        return pre_tokenizers.Split("▁", "merged_with_next")
    parts = REGULAR_EXPRESSIONS.get(pattern, (pattern,))
    splits = [pre_tokenizers.Split(Regex(part), "isolated") for part in parts]
    return pre_tokenizers.Sequence(splits)


def normalizer(pattern: str) -> normalizers.Normalizer | None:
    """What the tokenizers of a pattern do to a text first."""
    if pattern == "metaspace":
        return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return normalizers.NFC() if pattern == "qwen2" else None


def oracle_pieces(text: str, pattern: str) -> list[str]:
    """The pieces of a text as it stands."""
    return [piece for piece, _ in oracle(pattern).pre_tokenize_str(text)]


def words(text: str, pattern: str) -> list[str]:
    """The words that training counts in a document: normalised first."""
    steps = normalizer(pattern)
    return oracle_pieces(steps.normalize_str(text) if steps else text, pattern)
