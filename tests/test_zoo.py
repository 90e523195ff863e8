"""docs/zoo.md says what the registry says."""

import re

import make_zoo
from cases import CASES

from eqx_moe.family import FAMILIES


def test_the_page_is_what_the_registry_makes_of_it():
    assert make_zoo.PAGE.read_text() == make_zoo.page(), "run `python tests/make_zoo.py`"


def test_the_figures_are_of_all_configs_and_within_the_tolerance():
    import json

    figures = json.loads(make_zoo.FIGURES.read_text())["families"]
    counts = {name: sum(case.model_type == name for case in CASES) for name in FAMILIES}
    assert {name: figure["configs"] for name, figure in figures.items()} == counts
    assert all(0 < figure["error"] < 5e-5 for figure in figures.values())


def test_features_are_those_of_the_model():
    case = next(case for case in CASES if str(case) == "deepseek_v3-no-query-latent")
    found = make_zoo.features(make_zoo.skeleton(case.parsed))
    assert "a latent for queries" not in found and "groups of experts" not in found
    assert found[:2] == ["multi-head latent attention", "interleaved rotary embedding"] and "shared expert" in found


def test_what_the_guide_shows_is_in_the_project(root):
    guide = (root / "docs" / "add-a-family.md").read_text()
    blocks = re.findall(r"^```(?:python|text)\n(.*?)^```$", guide, re.DOTALL | re.M)
    sources = [(root / file).read_text() for file in ("eqx_moe/family/olmoe.py", "tests/cases.py")]
    assert len(blocks) == 5 and all(any(block in source for source in sources) for block in blocks)
