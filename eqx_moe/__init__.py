"""Open mixture-of-experts language models as plain Equinox modules, in and out of Hugging Face checkpoints.

Everything public stands on this page. A name is imported when it is first used, so that `import eqx_moe` is instant and
a program that needs only a part (a tokenizer, an error class) does not wait for JAX.

Set the environment variable `EQX_MOE_TYPECHECK=1` to check the shapes and types of every call into this library while
it is traced: jaxtyping and beartype then name the argument that is wrong. It is off by default and changes no result.
"""

import importlib
import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eqx_moe import checkpoint as checkpoint
    from eqx_moe import execution as execution
    from eqx_moe import sharding as sharding
    from eqx_moe import train as train
    from eqx_moe.errors import CheckpointError as CheckpointError
    from eqx_moe.errors import EqxMoeError as EqxMoeError
    from eqx_moe.family.config import RopeParameters as RopeParameters
    from eqx_moe.family.deepseek_v3 import DeepseekV3Config as DeepseekV3Config
    from eqx_moe.family.gpt_oss import GptOssConfig as GptOssConfig
    from eqx_moe.family.llama import LlamaConfig as LlamaConfig
    from eqx_moe.family.mistral import MistralConfig as MistralConfig
    from eqx_moe.family.mixtral import MixtralConfig as MixtralConfig
    from eqx_moe.family.olmoe import OlmoeConfig as OlmoeConfig
    from eqx_moe.family.qwen2 import Qwen2Config as Qwen2Config
    from eqx_moe.family.qwen3 import Qwen3Config as Qwen3Config
    from eqx_moe.family.qwen3_moe import Qwen3MoeConfig as Qwen3MoeConfig
    from eqx_moe.generation import generate as generate
    from eqx_moe.generation import stream as stream
    from eqx_moe.hub import from_pretrained as from_pretrained
    from eqx_moe.hub import load_config as load_config
    from eqx_moe.hub import load_tokenizer as load_tokenizer
    from eqx_moe.hub import save_pretrained as save_pretrained
    from eqx_moe.models import families as families
    from eqx_moe.models import init as init
    from eqx_moe.models import plan_sharding as plan_sharding
    from eqx_moe.models import stack as stack
    from eqx_moe.models import unstack as unstack
    from eqx_moe.models import with_options as with_options
    from eqx_moe.nn.decoder import Decoder as Decoder
    from eqx_moe.nn.decoder import Output as Output
    from eqx_moe.push import push_to_hub as push_to_hub

# The same list for run time; a test holds the two together. "eqx_moe" stands for a subpackage.
_PUBLIC = {
    "checkpoint": "eqx_moe",
    "execution": "eqx_moe",
    "sharding": "eqx_moe",
    "train": "eqx_moe",
    "CheckpointError": "eqx_moe.errors",
    "EqxMoeError": "eqx_moe.errors",
    "RopeParameters": "eqx_moe.family.config",
    "LlamaConfig": "eqx_moe.family.llama",
    "MistralConfig": "eqx_moe.family.mistral",
    "MixtralConfig": "eqx_moe.family.mixtral",
    "Qwen2Config": "eqx_moe.family.qwen2",
    "Qwen3Config": "eqx_moe.family.qwen3",
    "DeepseekV3Config": "eqx_moe.family.deepseek_v3",
    "GptOssConfig": "eqx_moe.family.gpt_oss",
    "OlmoeConfig": "eqx_moe.family.olmoe",
    "Qwen3MoeConfig": "eqx_moe.family.qwen3_moe",
    "generate": "eqx_moe.generation",
    "stream": "eqx_moe.generation",
    "from_pretrained": "eqx_moe.hub",
    "load_config": "eqx_moe.hub",
    "load_tokenizer": "eqx_moe.hub",
    "save_pretrained": "eqx_moe.hub",
    "families": "eqx_moe.models",
    "init": "eqx_moe.models",
    "plan_sharding": "eqx_moe.models",
    "stack": "eqx_moe.models",
    "unstack": "eqx_moe.models",
    "with_options": "eqx_moe.models",
    "Decoder": "eqx_moe.nn.decoder",
    "Output": "eqx_moe.nn.decoder",
    "push_to_hub": "eqx_moe.push",
}

if os.environ.get("EQX_MOE_TYPECHECK") == "1":
    # Before any submodule is imported: the hook rewrites modules as they are loaded.
    from jaxtyping import install_import_hook

    install_import_hook("eqx_moe", "beartype.beartype")


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'eqx_moe' has no attribute {name!r}; its public names are {sorted(_PUBLIC)}.")
    if _PUBLIC[name] == __name__:
        return importlib.import_module(f"eqx_moe.{name}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*_PUBLIC, "__version__"]
