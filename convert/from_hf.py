"""python -m convert.from_hf SRC DST: any Hugging Face layout or container -> the packed layout, dequantised."""

import sys
from collections.abc import Sequence

from convert.rewriting import rewrite

_DESCRIPTION = """\
Write a checkpoint in the packed layout: the experts of a layer in one tensor, as transformers 5 and eqx_moe hold them.
FP8 blocks are decoded to bfloat16. Memory holds one such tensor, never the model. A dense model has one layout only."""
_EXAMPLES = [
    "python -m convert.from_hf Mixtral-8x7B-v0.1 packed",
    "python -m convert.from_hf Mixtral-8x7B-v0.1 packed --dtype bfloat16 --max-shard-size 2GB --verify",
]


def main(arguments: Sequence[str] | None = None) -> int:
    return rewrite("from_hf", _DESCRIPTION, _EXAMPLES, "packed", arguments)


if __name__ == "__main__":
    sys.exit(main())
