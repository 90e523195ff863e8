"""config.json: two spellings of one thing must agree, and nothing that means something is lost."""

import pytest
from cases import LLAMA3, MIXTRAL, YARN

from eqx_moe.errors import CheckpointError
from eqx_moe.models import config_to_json, parse_config

PLAIN = {**MIXTRAL[0].config, "model_type": "mixtral"}


def parse(**changes):
    return parse_config({**PLAIN, **changes}, "config.json")


@pytest.mark.parametrize("empty", [{}, None])
def test_an_empty_rope_scaling_hides_nothing(empty):
    assert parse(rope_parameters=YARN, rope_scaling=empty).rope_parameters.rope_type == "yarn"


@pytest.mark.parametrize("rope", [YARN, LLAMA3])
def test_what_we_write_in_both_dialects_agrees_with_itself(rope):
    written = config_to_json(parse(rope_parameters=rope), "float32")
    assert written["rope_scaling"] and written["rope_parameters"]
    assert parse_config(written, "config.json").rope_parameters == parse(rope_parameters=rope).rope_parameters


WRITTEN = config_to_json(parse(rope_parameters=YARN), "float32")


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("rope_scaling.factor", dict(WRITTEN, rope_parameters={**WRITTEN["rope_parameters"], "factor": 9.0})),
        ("rope_scaling.factor", dict(WRITTEN, rope_scaling={**WRITTEN["rope_scaling"], "factor": 9.0})),
        ("rope_scaling.rope_type", dict(WRITTEN, rope_scaling={"rope_type": "linear", "factor": 4.0})),
        ("rope_scaling.factor", dict(WRITTEN, rope_scaling={"rope_type": "yarn"})),
        ("rope_theta", dict(WRITTEN, rope_theta=7.5)),
        ("rope_scaling.type", dict(rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 2.0})),
        ("original_max_position_embeddings", dict(WRITTEN, original_max_position_embeddings=17)),
        ("torch_dtype", dict(dtype="float32", torch_dtype="bfloat16")),
        ("num_experts", dict(num_experts=9)),
        ("rope_scaling", dict(rope_scaling=[])),
        ("layer_types", dict(layer_types=["full_attention"])),
        ("layer_types", dict(layer_types=["full_attention", "sliding_attention"])),
        ("layer_types", dict(layer_types=["full_attention"], num_hidden_layers=10**12)),
        ("layer_types", dict(layer_types="full_attention")),
        ("num_hidden_layers", dict(layer_types=["full_attention"], num_hidden_layers="2")),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(key, changes):
    with pytest.raises(CheckpointError) as caught:
        parse(**changes)
    assert (caught.value.code, caught.value.file, caught.value.item) == ("CFG-VALUE", "config.json", key)
    assert caught.value.expected and caught.value.fix


def test_equal_spellings_and_default_windows_pass():
    assert parse(torch_dtype="torch.bfloat16", dtype="bfloat16").dtype == "bfloat16"
    assert parse(layer_types=["full_attention"] * 2).extra
    mistral = {**PLAIN, "model_type": "mistral", "layer_types": ["sliding_attention"] * 2}
    mistral = {key: value for key, value in mistral.items() if not key.startswith("num_") or "expert" not in key}
    assert parse_config(mistral, "config.json").sliding_window == 4096  # the default, which the list must fit


def test_a_key_that_this_rope_does_not_read_is_kept():
    config = parse(original_max_position_embeddings=77)
    assert config_to_json(config, "float32")["original_max_position_embeddings"] == 77
