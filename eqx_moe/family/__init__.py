"""One record per model_type."""

from eqx_moe.family import llama, mistral, mixtral, qwen2, qwen3
from eqx_moe.family.base import Family as Family

FAMILIES: dict[str, Family] = {
    family.FAMILY.model_type: family.FAMILY for family in (mixtral, llama, mistral, qwen2, qwen3)
}
