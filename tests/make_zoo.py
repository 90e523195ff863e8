"""Writes docs/zoo.md from the registry of families and the configs that the tests try each of them with.

python tests/make_zoo.py              writes the page
python tests/make_zoo.py --measure    measures docs/parity.json first; needs the `oracle` extra (see CONTRIBUTING.md)
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE, FIGURES = ROOT / "docs" / "zoo.md", ROOT / "docs" / "parity.json"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from cases import CASES, Case  # noqa: E402

import eqx_moe  # noqa: E402
from eqx_moe.family import FAMILIES, Family  # noqa: E402
from eqx_moe.hub import LAYOUTS  # noqa: E402
from eqx_moe.models import skeleton  # noqa: E402
from eqx_moe.nn.attention import Attention  # noqa: E402
from eqx_moe.nn.gating import ClampedSwiGLU  # noqa: E402
from eqx_moe.nn.mla import MLA  # noqa: E402
from eqx_moe.nn.moe import MoE  # noqa: E402
from eqx_moe.nn.router import SigmoidTopKRouter, SoftmaxTopKRouter  # noqa: E402

_HEAD = """\
# The zoo

Written by `python tests/make_zoo.py` from the registry (`eqx_moe/family`) and the configs of `tests/cases.py`; a test
holds this page against both. What a family *always* has, every one of its configs has; what it has *by config*, some
do. Every family takes the rotary embeddings default, linear, dynamic, llama3, yarn and longrope. A value of a config
that is not implemented is refused by name when the config is read.

*Parity* is the largest difference of a logit from transformers {transformers} (torch {torch}, float32, eager attention
and experts, CPU), relative to the largest logit, over so many configs, in texts longer than every window. For each of
them `tests/test_parity_logits.py` holds it to 5e-5, wants the same greedy text, and wants the very same logits from
what we write and transformers loads. *bfloat16* is our error divided by theirs where both compute in bfloat16: the
median over tokens of how far their logits are off, against float32 with the same weights. [How to add a
family](add-a-family.md) is a page of its own.
"""


def features(model: eqx_moe.Decoder) -> list[str]:
    """What a model is made of, in the order of its parts."""
    layers = model.layers
    found = [text for layer in layers for text in _attention(layer.attention)]
    windows = [getattr(layer.attention, "window", None) is not None for layer in layers]
    if any(windows):
        found.append("windows in all layers" if all(windows) else "windows in some layers")
    sparse = [layer.moe is not None for layer in layers]
    if not all(sparse):
        found.append("dense layers")
    found += [text for layer in layers if layer.moe is not None for text in _moe(layer.moe)]
    found += ["norms that round last"] if model.norm.round_last else []
    found += ["tied embeddings"] if model.head is None else []
    return list(dict.fromkeys(found))


def _attention(part: Attention | MLA) -> list[str]:
    if isinstance(part, MLA):
        found = ["multi-head latent attention"]
        found += ["a latent for queries"] if part.q_a is not None else []
        found += ["interleaved rotary embedding"] if part.interleaved else []
        return [*found, "biases of latents and output"] if part.o.bias is not None else found
    found = ["grouped-query attention"]
    found += {None: [], "head": ["q/k norm per head"], "all": ["q/k norm over all heads"]}[part.qk_norm]
    found += ["clipped q, k, v"] if part.clip is not None else []
    found += ["biases of q, k, v"] if part.q.bias is not None else []
    found += ["bias of o"] if part.o.bias is not None else []
    return [*found, "sinks"] if part.sinks is not None else found


def _moe(part: MoE) -> list[str]:
    router, found = part.router, ["experts"]
    if isinstance(router, SoftmaxTopKRouter):
        found.append("softmax router")
        found += ["renormalised weights"] if router.normalise else []
        found += ["router bias"] if router.bias is not None else []
    if isinstance(router, SigmoidTopKRouter):
        found += ["sigmoid router with a selection bias"]
        found += ["renormalised weights"] if router.normalise else []
        found += ["groups of experts"] if router.kept_groups < router.groups else []
    found += ["clamped SwiGLU"] if isinstance(part.experts.gating, ClampedSwiGLU) else []
    found += ["expert biases"] if part.experts.down_bias is not None else []
    return [*found, "shared expert"] if part.shared is not None else found


def page() -> str:
    """The text of docs/zoo.md."""
    figures = json.loads(FIGURES.read_text())
    rows = [_HEAD.format(**figures["versions"])]
    rows += ["| family | such as | always | by config | reads | writes | parity | bfloat16 |", "| --- " * 8 + "|"]
    for name, family in FAMILIES.items():
        cases = [case for case in CASES if case.model_type == name]
        sets = [features(skeleton(case.parsed)) for case in cases]
        always = [text for text in sets[0] if all(text in each for each in sets)]
        some = [text for text in dict.fromkeys(text for each in sets for text in each) if text not in always]
        figure = figures["families"][name]
        parity = f"{figure['error']:.0e} ({figure['configs']} configs)"
        cells = (f"`{name}`", ", ".join(family.covers), ", ".join(always), ", ".join(some))
        cells += (_reads(family, cases[0]), _writes(family, cases[0]), parity, f"{figure['bfloat16']:.2f}x")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _reads(family: Family, case: Case) -> str:
    tables = family.names(case.parsed)
    layouts = [name for name in tables if list(tables).index(name) == list(tables.values()).index(tables[name])]
    return ", ".join([*layouts, *(["FP8 128 x 128"] if "fp8" in family.containers else [])])


def _writes(family: Family, case: Case) -> str:
    tables = family.names(case.parsed)
    return "one layout" if tables["original"] == tables["packed"] else ", ".join(LAYOUTS)


def measure() -> None:
    """Compares every case with transformers, and writes docs/parity.json."""
    import numpy as np
    import torch
    import transformers
    from test_parity_logits import NARROW, bfloat16_errors, reference, reference_logits, text

    transformers.logging.disable_progress_bar()
    errors: dict[str, list[float]] = {name: [] for name in FAMILIES}
    ratios: dict[str, list[float]] = {name: [] for name in FAMILIES}
    for case in CASES:
        theirs, tokens = reference(case), text(case)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder, save_original_format=not case.packed)
            ours = eqx_moe.from_pretrained(folder, dtype="float32")
        expected = reference_logits(theirs, tokens)
        errors[case.model_type].append(float(np.abs(ours(tokens) - expected).max() / np.abs(expected).max()))
        print(f"{case}: {errors[case.model_type][-1]:.1e}", file=sys.stderr)
        if str(case) in NARROW:
            with tempfile.TemporaryDirectory() as folder:
                mine, other = bfloat16_errors(case, folder)
            ratios[case.model_type].append(float(np.median(mine) / np.median(other)))
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    found = {
        name: {"configs": len(each), "error": float(f"{max(each):.1e}"), "bfloat16": round(max(ratios[name]), 2)}
        for name, each in errors.items()
    }
    FIGURES.write_text(json.dumps({"versions": versions, "families": found}, indent=2) + "\n")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--measure", action="store_true", help="compare with transformers, and write the figures, first"
    )
    if parser.parse_args().measure:
        measure()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
