"""python -m convert.to_hf SRC DST: any layout or container -> the original layout, as the model was released."""

import sys
from collections.abc import Sequence

from convert.rewriting import rewrite

_DESCRIPTION = """\
Write a checkpoint in the original layout: a tensor for each matrix of each expert, under the names that the model's
makers chose, which every reader of Hugging Face checkpoints knows. Memory holds one tensor, never the model."""
_EXAMPLES = [
    "python -m convert.to_hf packed Mixtral-8x7B",
    "python -m convert.to_hf packed Mixtral-8x7B --dtype bfloat16 --max-shard-size 2GB --verify",
]


def main(arguments: Sequence[str] | None = None) -> int:
    return rewrite("to_hf", _DESCRIPTION, _EXAMPLES, "original", arguments)


if __name__ == "__main__":
    sys.exit(main())
