"""Train byte-pair encodings: natively, on every core, with the vocabulary and merges of Hugging Face `tokenizers`."""
