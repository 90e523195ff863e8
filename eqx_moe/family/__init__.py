"""One record per model_type."""

from eqx_moe.family import deepseek_v3, gpt_oss, llama, mistral, mixtral, olmoe, qwen2, qwen3, qwen3_moe
from eqx_moe.family.base import Family as Family

_ALL = (mixtral, qwen3_moe, olmoe, gpt_oss, deepseek_v3, llama, mistral, qwen2, qwen3)
FAMILIES: dict[str, Family] = {family.FAMILY.model_type: family.FAMILY for family in _ALL}

#: Every model_type that is read -> its family.
BY_MODEL_TYPE = FAMILIES | {name: family for family in FAMILIES.values() for name in family.also}
