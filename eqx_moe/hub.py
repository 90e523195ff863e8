"""Models in and out of Hugging Face folders: joins the families with the checkpoint format.

A folder holds config.json, model.safetensors (or shards with an index), and as a rule generation_config.json and
tokenizer.json. This version reads and writes local folders; the arguments that speak of the Hub are there for it.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import warnings
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from eqx_moe.checkpoint.dtypes import weight_dtype
from eqx_moe.checkpoint.files import exists, listing
from eqx_moe.checkpoint.jsonfile import read_json
from eqx_moe.checkpoint.names import leaf_paths, replace_leaves
from eqx_moe.checkpoint.reader import load_leaves
from eqx_moe.checkpoint.replacing import finish_replacing
from eqx_moe.checkpoint.writer import save_leaves
from eqx_moe.errors import CheckpointError, quote
from eqx_moe.execution import AbstractExecution
from eqx_moe.family.generation_config import generation_config_to_json, parse_generation_config
from eqx_moe.models import config_to_json, family_of, parse_config, plan_sharding, skeleton, unstack
from eqx_moe.nn.decoder import Decoder

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# With tied embeddings some writers store the head all the same.
_TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
# A router with a NaN in it still routes, somehow.
_ROUTERS = ("layers.{l}.moe.router.weight",)

_log = logging.getLogger("eqx_moe")


def load_config(folder: str | os.PathLike) -> Any:
    """The config of a folder's model: the dataclass of its family, from config.json.

    Raises:
        CheckpointError: CFG-* codes, see `eqx_moe.errors`.
    """
    file = _folder(folder, "loading a config") / _CONFIG
    if not exists(file):
        raise CheckpointError(
            code="CFG-MISSING",
            doing="loading a config",
            file=str(file),
            expected=f"a folder with {_CONFIG}",
            found=listing(file.parent),
            fix="check the folder's name, or download the model again",
        )
    return parse_config(read_json(file, "config", doing="loading a config"), str(file))


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder, from tokenizer.json.

    Raises:
        CheckpointError: TOK-* codes, see `eqx_moe.errors`. Among them: added tokens whose ids the tokenizers library
            assigns otherwise than the file, which it does without a word if they leave a gap or clash.
    """
    file = _folder(folder, "loading a tokenizer") / _TOKENIZER

    def refuse(code: str, expected: str, found: str, fix: str, item: str = "") -> NoReturn:
        raise CheckpointError(
            code=code, doing="loading a tokenizer", file=str(file), item=item, expected=expected, found=found, fix=fix
        )

    if not exists(file):
        fix = "write it once with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        refuse("TOK-MISSING", f"a folder with {_TOKENIZER}", listing(file.parent), fix)
    data = read_json(file, "tokenizer", doing="loading a tokenizer")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(data))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # A panic of the Rust code is no Exception.
        found = quote(str(error))
        refuse("TOK-LOAD", "a tokenizer that the tokenizers library loads", found, "download the file again")
    for token in data.get("added_tokens") or ():
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"] or tokenizer.id_to_token(token["id"]) != token["content"]:
            expected = f"the id {token['id']}, as the file says"
            fix = "number the added tokens without gaps, after the vocabulary"
            refuse("TOK-ADDED", expected, f"{found} once loaded", fix, token["content"])
    return tokenizer


def from_pretrained(
    repo_or_folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    execution: str | AbstractExecution | None = None,
    verify: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Decoder:
    """A model with the weights, the config and the generation config of a folder.

    Everything is checked before weights are read: no tensor is made up, none is dropped unless its family says why.

    Args:
        repo_or_folder: a local folder.
        dtype: "auto" keeps every tensor as it is stored; a float dtype or its name casts all but those that the family
            keeps in float32; None is "auto" on an accelerator and float32 on a CPU.
        mesh: the devices to spread the weights over, see `eqx_moe.sharding`. The host holds a leaf at a time, and no
            device more than its parts. In a program of several processes all call this, each with the folder at hand.
        execution: how MoE blocks run: None picks the dropless one for the platform; see `eqx_moe.execution`.
        verify: reads every byte and holds it against the checksums in eqx_moe.json that `save_pretrained` wrote; all
            values must be finite. Without it only norms, biases and routers are looked at, and a large tensor that lies
            in its file as the model wants it is mapped, not read (Linux, local disk): do not write into the file then.
        revision, token, cache_dir, local_files_only: for names on the Hub; a local folder has no use for them.

    Raises:
        CheckpointError: something is wrong with the files; its `code` says what, see `eqx_moe.errors`.
        ValueError: an argument is wrong.
    """
    folder = _folder(repo_or_folder, "loading a model")
    config = load_config(folder)
    family = family_of(config)
    model = skeleton(config, mesh=mesh, execution=execution)
    generation_config = model.generation_config
    if exists(folder / _GENERATION):
        data = read_json(folder / _GENERATION, "generation config", doing="loading a generation config")
        generation_config = parse_generation_config(data, str(folder / _GENERATION), config)
    leaves = load_leaves(
        folder,
        leaf_paths(model),
        family.names(config),
        skipped=family.skipped,
        tied=_TIED if config.tie_word_embeddings else (),
        dtype=_dtype_to_load(dtype),
        keep_fp32=family.keep_fp32,
        finite=_ROUTERS,
        verify=verify,
        shardings=None if mesh is None else plan_sharding(model, mesh).shardings,
    )
    return dataclasses.replace(replace_leaves(model, leaves), generation_config=generation_config)


def save_pretrained(
    model: Decoder,
    folder: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int | str = "5GB",
    layout: str = "original",
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a model as a folder that `from_pretrained` and transformers load.

    The folder may be the one that it was loaded from. An earlier model in it stands until the new one is whole on the
    disk; other files in it stay as they are.

    Args:
        tokenizer: written as tokenizer.json, with a small tokenizer_config.json; what such a file in the folder says
            besides the special tokens (a chat template, say) is kept.
        max_shard_size: bytes, or a text such as "5GB" or "2GiB".
        layout: "original", as the model's makers released it, or "packed", as transformers 5 holds it in memory.
        dtype: a float dtype or its name, for all but the tensors that the family keeps in float32; None writes what is
            in memory, and warns if that is wider than what was loaded.

    Raises:
        ValueError: an argument is wrong; the weights do not have the shapes of `model.config`.
        CheckpointError: the folder cannot be one; a value does not fit in `dtype`.
    """
    model = unstack(model)
    config = model.config
    family = family_of(config)
    layouts = family.names(config)
    if layout not in layouts:
        raise ValueError(f"`layout` must be one of {sorted(layouts)}; got {layout!r}.")
    leaves = leaf_paths(model)
    _check_shapes(leaves, leaf_paths(skeleton(config)))
    files = {_GENERATION: _json(generation_config_to_json(model.generation_config))}
    if tokenizer is not None:
        files |= {
            _TOKENIZER: tokenizer.to_str(pretty=True).encode(),
            _TOKENIZER_CONFIG: _json(_tokenizer_config(tokenizer, model, pathlib.Path(folder))),
        }
    files[_CONFIG] = _json(config_to_json(config, _dtype_to_save(leaves, dtype, config.dtype)))
    save_leaves(
        folder,
        leaves,
        layouts[layout],
        max_shard_size=max_shard_size,
        dtype=None if dtype is None else weight_dtype(dtype).name,
        keep_fp32=family.keep_fp32,
        other_files=files,
    )


def _folder(folder: str | os.PathLike, doing: str) -> pathlib.Path:
    if not os.path.isdir(folder):
        there = exists(pathlib.Path(folder))
        raise CheckpointError(
            code="CFG-FOLDER",
            doing=doing,
            file=str(folder),
            expected="a local folder",
            found="something else under that name" if there else "nothing of that name",
            fix="give the folder that the file lies in"
            if there
            else "give a local folder; this version does not download from the Hub by itself: "
            "`hf download ORG/NAME --local-dir FOLDER` does",
        )
    finish_replacing(pathlib.Path(folder))
    return pathlib.Path(folder)


def _dtype_to_load(dtype: DTypeLike | None) -> str:
    if dtype is None:
        if jax.default_backend() != "cpu":
            return "auto"
        _log.info(
            "Loading in float32, whatever is stored: on CPU, bfloat16 matrix-vector products are about 30 times slower "
            'in jax 0.10. dtype="auto" keeps what is stored.'
        )
        return "float32"
    return "auto" if isinstance(dtype, str) and dtype == "auto" else weight_dtype(dtype).name


def _dtype_to_save(leaves: dict[str, jax.Array], dtype: DTypeLike | None, loaded: str | None) -> str:
    """What config.json says: the dtype of most bytes."""
    if dtype is not None:
        return weight_dtype(dtype).name
    sizes: collections.Counter[str] = collections.Counter()
    for leaf in leaves.values():
        sizes[leaf.dtype.name] += leaf.nbytes
    held = sizes.most_common(1)[0][0]
    if loaded is not None and weight_dtype(held).itemsize > weight_dtype(loaded).itemsize:
        warnings.warn(
            f"Saving in {held}, as the weights are in memory; config.json says that they were {loaded}. Pass "
            f'dtype="{loaded}" for files of half the size.',
            stacklevel=3,
        )
    return held


def _check_shapes(leaves: dict[str, Any], expected: dict[str, Any]) -> None:
    for path in {**expected, **leaves}:
        shapes = [tree[path].shape if path in tree else None for tree in (expected, leaves)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`model.config` gives the leaf {path!r} the shape {shapes[0]}; the model has {shapes[1]}. "
                "A changed model needs the config that describes it."
            )


def _tokenizer_config(tokenizer: Tokenizer, model: Decoder, folder: pathlib.Path) -> dict[str, Any]:
    """What transformers needs to make its own tokenizer of tokenizer.json, over what the folder's file says already."""
    ids = generation_config_to_json(model.generation_config)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.max_position_embeddings}
    if exists(folder / _TOKENIZER_CONFIG):
        config |= read_json(folder / _TOKENIZER_CONFIG, "tokenizer config", doing="saving a tokenizer")
    for name in ("bos", "eos", "pad"):
        value = ids.get(f"{name}_token_id")
        token = None if value is None else tokenizer.id_to_token(value[0] if isinstance(value, list) else value)
        if token is not None:
            config[f"{name}_token"] = token
    return config


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=2, allow_nan=False).encode() + b"\n"
