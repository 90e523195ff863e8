"""Model cards: the README.md that a pushed model gets if its repo has none."""

import json
from collections.abc import Sequence

from eqx_moe.remote.client import is_repo

_TEXT = """\
# {name}

A `{architecture}` with {parameters}, in {dtype}.

With `eqx_moe`, in JAX:

```python
import eqx_moe

model = eqx_moe.from_pretrained("{repo}")
tokenizer = eqx_moe.load_tokenizer("{repo}")
(ids,) = eqx_moe.generate(model, [tokenizer.encode("Once upon a time").ids], max_new_tokens=64)
print(tokenizer.decode(ids))
```

With transformers, in PyTorch:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```
"""


def model_card(
    repo: str,
    *,
    architecture: str,
    model_type: str,
    parameters: tuple[int, int],
    dtype: str,
    base_model: str | None = None,
) -> str:
    """The text of a card. It holds names that were checked, and numbers: nothing that a file says.

    Args:
        parameters: in all, and those that one token uses.
        base_model: the repo that this model was made from, if it was.

    Raises:
        ValueError: `base_model` is no name of a repo.
    """
    if base_model is not None and not is_repo(base_model):
        raise ValueError(f'`base_model` must be the name of a repo, "org/name"; got {base_model!r}.')
    total, active = parameters
    tags = [model_type, *(["moe", "mixture-of-experts"] if active < total else []), "jax", "equinox"]
    head: list[tuple[str, str | Sequence[str]]] = [
        ("library_name", "eqx_moe"),
        ("pipeline_tag", "text-generation"),
        *([("base_model", base_model)] if base_model else []),
        ("tags", tags),
    ]
    lines = []
    for key, value in head:
        # A JSON string is a YAML string, whatever is in it.
        if isinstance(value, str):
            lines.append(f"{key}: {json.dumps(value)}")
        else:
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
    size = f"{total:,} parameters" + (f", of which a token uses {active:,}" if active < total else "")
    text = _TEXT.format(
        name=repo.split("/")[1],
        repo=repo,
        architecture=architecture,
        parameters=size,
        dtype=dtype,
    )
    return "\n".join(["---", *lines, "---", "", text])
