"""Models in and out of Hugging Face folders and repos: joins the families with the checkpoint format.

A folder holds config.json, model.safetensors (or shards with an index), and as a rule generation_config.json and
tokenizer.json; so does a repo on the Hub. Where a function takes either, a folder that is there is the folder, and
another string "org/name" is a repo.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from eqx_moe.checkpoint.checksums import CHECKSUMS
from eqx_moe.checkpoint.dtypes import WEIGHT_DTYPES, weight_dtype
from eqx_moe.checkpoint.files import exists, listing
from eqx_moe.checkpoint.jsonfile import read_json
from eqx_moe.checkpoint.matching import match
from eqx_moe.checkpoint.names import Name, leaf_paths, replace_leaves
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.reader import load_leaves
from eqx_moe.checkpoint.replacing import finish_replacing
from eqx_moe.checkpoint.shards import Stored, open_weights
from eqx_moe.checkpoint.writer import save_leaves
from eqx_moe.errors import CheckpointError, quote
from eqx_moe.execution import AbstractExecution
from eqx_moe.family.generation_config import generation_config_to_json, parse_generation_config
from eqx_moe.models import (
    config_to_json,
    family_of,
    parse_config,
    plan_sharding,
    skeleton,
    unstack,
)
from eqx_moe.nn.decoder import Decoder
from eqx_moe.remote.client import is_repo
from eqx_moe.remote.download import Snapshot, open_snapshot
from eqx_moe.remote.space import check_memory, gigabytes, memory_needs

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_MISTRAL = "params.json"  # beside consolidated.safetensors: Mistral's own layout
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
#: With tied embeddings some writers store the head all the same.
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
#: Layouts that are written. What else a family has in its table (a quantised release, say) is read only.
LAYOUTS = ("original", "packed")
# A router with a NaN in it still routes, somehow.
_ROUTERS = ("layers.{l}.moe.router.weight",)

_log = logging.getLogger("eqx_moe")


def load_config(
    repo_or_folder: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Any:
    """The config of a model: the dataclass of its family, from config.json. The options are `from_pretrained`'s.

    Raises:
        CheckpointError: CFG-* and HUB-* codes, see `eqx_moe.errors`.
    """
    source = _source(repo_or_folder, "loading a config", revision, token, cache_dir, local_files_only)
    return read_config(_fetch(source, _CONFIG))


def pinned(repo_or_folder: str | os.PathLike) -> str | None:
    """The commit that a repo is at, None for a folder: as their `revision` it makes several calls read the same.

    The Hub is asked once, and by the calls not again.
    """
    source = _source(repo_or_folder, "loading a model", None, None, None, False)
    return None if isinstance(source, pathlib.Path) else source.commit


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder or a repo holds: the config, its files with their bytes, and the tensors as their headers have them
    (None without weights), of which nothing can be read."""

    config: Any
    files: dict[str, int]
    stored: dict[str, Stored] | None


def look_into(repo_or_folder: str | os.PathLike) -> Contents:
    """The contents of a folder or a repo; no weights are read or downloaded.

    Raises:
        CheckpointError: CFG-*, ST-*, IDX-* and HUB-* codes.
    """
    source = _source(repo_or_folder, "looking into a model", None, None, None, False)
    folder = _fetch(source, _CONFIG)
    config = read_config(folder)
    if isinstance(source, Snapshot) and source.files is not None:
        files = {name: file.size for name, file in source.files.items()}
    else:
        files = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    try:
        if isinstance(source, Snapshot):
            stored = source.headers()
        else:
            with open_weights(folder) as opened:
                stored = dict(opened)
    except CheckpointError as error:
        if error.code != "ST-WEIGHTS":
            raise
        stored = None
    return Contents(config, dict(sorted(files.items())), stored)


def read_config(folder: pathlib.Path) -> Any:
    file = folder / _CONFIG
    if not exists(file):
        raise CheckpointError(
            code="CFG-MISSING",
            doing="loading a config",
            file=str(file),
            expected=f"a folder with {_CONFIG}",
            found=listing(file.parent),
            fix="python -m convert.from_mistral makes of it a folder that is read here"
            if exists(folder / _MISTRAL)
            else "check the folder's name, or download the model again",
        )
    return parse_config(read_json(file, "config", doing="loading a config"), str(file))


def read_generation_config(folder: pathlib.Path, config: Any) -> Any:
    """The generation config in a folder, None without one."""
    file = folder / _GENERATION
    if not exists(file):
        return None
    data = read_json(file, "generation config", doing="loading a generation config")
    return parse_generation_config(data, str(file), config)


def load_tokenizer(
    repo_or_folder: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Tokenizer:
    """The tokenizer of a model, from tokenizer.json. The options are `from_pretrained`'s.

    Raises:
        CheckpointError: TOK-* and HUB-* codes, see `eqx_moe.errors`. Among them: added tokens whose ids the tokenizers
            library assigns otherwise than the file, which it does without a word if they leave a gap or clash.
    """
    source = _source(repo_or_folder, "loading a tokenizer", revision, token, cache_dir, local_files_only)
    file = _fetch(source, TOKENIZER) / TOKENIZER

    def refuse(code: str, expected: str, found: str, fix: str, item: str = "") -> NoReturn:
        raise CheckpointError(
            code=code, doing="loading a tokenizer", file=str(file), item=item, expected=expected, found=found, fix=fix
        )

    if not exists(file):
        fix = "write it once with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        refuse("TOK-MISSING", f"a folder with {TOKENIZER}", listing(file.parent), fix)
    data = read_json(file, "tokenizer", doing="loading a tokenizer")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(data))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # A panic of the Rust code is no Exception.
        found = quote(str(error))
        refuse("TOK-LOAD", "a tokenizer that the tokenizers library loads", found, "download the file again")
    for added in data.get("added_tokens") or ():
        found = tokenizer.token_to_id(added["content"])
        if found != added["id"] or tokenizer.id_to_token(added["id"]) != added["content"]:
            expected = f"the id {added['id']}, as the file says"
            fix = "number the added tokens without gaps, after the vocabulary"
            refuse("TOK-ADDED", expected, f"{found} once loaded", fix, added["content"])
    return tokenizer


def from_pretrained(
    repo_or_folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    execution: str | AbstractExecution | None = None,
    verify: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Decoder:
    """A model with the weights, the config and the generation config of a folder, or of a repo on the Hub.

    Everything is checked before weights are read: no tensor is made up, none is dropped unless its family says why. The
    same is checked before a repo's weights are downloaded, and that disk and memory suffice. What was downloaded is
    held against the Hub's hashes.

    Args:
        repo_or_folder: a local folder, or the name of a repo, "org/name".
        dtype: "auto" keeps every tensor as it is stored; a float dtype or its name casts all but those that the family
            keeps in float32; None is "auto" on an accelerator and float32 on a CPU.
        mesh: the devices to spread the weights over, see `eqx_moe.sharding`. The host holds a leaf at a time, and no
            device more than its parts. In a program of several processes all call this, each with the folder at hand.
        execution: how MoE blocks run: None picks the dropless one for the platform; see `eqx_moe.execution`.
        verify: reads every byte and holds it against the checksums in eqx_moe.json that `save_pretrained` wrote; all
            values must be finite. Without it only norms, biases and routers are looked at, and a large tensor that lies
            in its file as the model wants it is mapped, not read (Linux, local disk): do not write into the file then.
        revision: of a repo: a branch, a tag or a commit; None is main. A commit that is in the cache needs no network.
        token: of a repo: what to log in with; None is the login of `hf auth login` or HF_TOKEN, False is none.
        cache_dir: of a repo: where downloads are kept; None is the cache that Hugging Face libraries share.
        local_files_only: of a repo: take what the cache has, and ask nobody.

    Raises:
        CheckpointError: something is wrong with the files; its `code` says what, see `eqx_moe.errors`.
        ValueError: an argument is wrong.
    """
    source = _source(repo_or_folder, "loading a model", revision, token, cache_dir, local_files_only)
    folder = _fetch(source, _CONFIG, optional=(_GENERATION, *([CHECKSUMS] if verify else [])))
    config = read_config(folder)
    family = family_of(config)
    named = _dtype_to_load(dtype)
    model = skeleton(config, mesh=mesh, execution=execution)
    generation_config = read_generation_config(folder, config) or model.generation_config
    if isinstance(source, Snapshot):
        source.fetch_weights(lambda stored: _preview(stored, source, config, named, mesh))
    with open_weights(folder) as opened:
        leaves = load_leaves(
            folder,
            leaf_paths(model),
            family.names(config),
            skipped=family.skipped(config),
            tied=TIED if config.tie_word_embeddings else (),
            dtype=named,
            keep_fp32=family.keep_fp32,
            finite=_ROUTERS,
            verify=verify,
            shardings=None if mesh is None else plan_sharding(model, mesh).shardings,
            opened=opened,
        )
        if config.dtype is None:  # gpt-oss's releases name none
            config = dataclasses.replace(config, dtype=dtype_of_most(decoded(opened)))
    return dataclasses.replace(replace_leaves(model, leaves), config=config, generation_config=generation_config)


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
    model, names, keep_fp32 = to_write(model, layout)
    save_leaves(
        folder,
        leaf_paths(model),
        names,
        max_shard_size=max_shard_size,
        dtype=None if dtype is None else weight_dtype(dtype).name,
        keep_fp32=keep_fp32,
        other_files=small_files(model, tokenizer, dtype, pathlib.Path(folder)),
    )


def to_write(model: Decoder, layout: str) -> tuple[Decoder, tuple[Name, ...], tuple[str, ...]]:
    """The model with its layers apart, the name table of the layout, and what is written in float32 in any case."""
    model = unstack(model)
    family = family_of(model.config)
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {list(LAYOUTS)}; got {layout!r}.")
    _check_shapes(leaf_paths(model), leaf_paths(skeleton(model.config)))
    return model, family.names(model.config)[layout], family.keep_fp32


def small_files(
    model: Decoder, tokenizer: Tokenizer | None, dtype: DTypeLike | None, earlier: pathlib.Path | None
) -> dict[str, bytes]:
    """What stands beside the weights; `earlier` is a folder that may have a tokenizer_config.json to go on from."""
    files = {_GENERATION: _json(generation_config_to_json(model.generation_config))}
    if tokenizer is not None:
        files |= {
            TOKENIZER: tokenizer.to_str(pretty=True).encode(),
            TOKENIZER_CONFIG: _json(_tokenizer_config(tokenizer, model, earlier)),
        }
    saved = dtype_to_save(leaf_paths(model), dtype, model.config.dtype)
    files[_CONFIG] = _json(config_to_json(model.config, saved))
    return files


def _source(
    where: str | os.PathLike,
    doing: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    local_files_only: bool,
) -> pathlib.Path | Snapshot:
    """The folder, or the commit of a repo on the Hub, that a user's text stands for."""
    if not isinstance(where, str) or not is_repo(where) or exists(pathlib.Path(where)):
        or_repo = ', or the name "org/name" of a repo on the Hub' if isinstance(where, str) else ""
        return local_folder(where, doing, f"a local folder{or_repo}")
    return open_snapshot(
        where,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        doing=f"{doing} from the Hub, as there is no folder of that name",
    )


def _fetch(source: pathlib.Path | Snapshot, *names: str, optional: tuple[str, ...] = ()) -> pathlib.Path:
    return source if isinstance(source, pathlib.Path) else source.fetch(*names, optional=optional)


def local_folder(folder: str | os.PathLike, doing: str, expected: str = "a local folder") -> pathlib.Path:
    if not os.path.isdir(folder):
        there = exists(pathlib.Path(folder))
        absent = "check the name; a repo on the Hub must be downloaded first (`hf download`)"
        raise CheckpointError(
            code="CFG-FOLDER",
            doing=doing,
            file=str(folder),
            expected=expected,
            found="something else under that name" if there else "nothing of that name",
            fix="give the folder that the file lies in" if there else absent,
        )
    finish_replacing(pathlib.Path(folder))
    return pathlib.Path(folder)


def match_weights(stored: Mapping[str, Stored], folder: pathlib.Path, config: Any, *, one_dtype: bool) -> None:
    """Refuses (decoded) tensors that are not those of the config's model, from their headers alone."""
    family = family_of(config)
    match(
        folder,
        leaf_paths(skeleton(config)),
        family.names(config),
        stored,
        skipped=family.skipped(config),
        tied=TIED if config.tie_word_embeddings else (),
        one_dtype=one_dtype,
    )


def dtype_of_most(stored: Mapping[str, Stored]) -> str:
    """The dtype of most bytes."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in stored.values():
        sizes[tensor.entry.dtype] += tensor.entry.stop - tensor.entry.start
    return WEIGHT_DTYPES[sizes.most_common(1)[0][0]].name


def _preview(stored: Mapping[str, Stored], source: Snapshot, config: Any, dtype: str, mesh: Mesh | None) -> str:
    """Refuses a model that would not load, or not fit; says what it will be in memory."""
    stored = decoded(stored)
    match_weights(stored, source.folder, config, one_dtype=dtype == "auto")
    dtype = dtype_of_most(stored) if dtype == "auto" else dtype
    model = skeleton(config, dtype=dtype)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaf_paths(model).values()]
    if mesh is None:
        devices, each = jax.local_devices()[:1], sum(sizes)
    else:
        devices, each = mesh.local_devices, plan_sharding(model, mesh).bytes_per_device
    check_memory(memory_needs(devices, each, max(sizes)), source.doing, source.repo)
    return f"{gigabytes(sum(sizes))} of {dtype}, {gigabytes(each)} on each of {len(devices)} devices here"


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


def dtype_to_save(leaves: dict[str, jax.Array], dtype: DTypeLike | None, loaded: str | None) -> str:
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
            stacklevel=4,
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


def _tokenizer_config(tokenizer: Tokenizer, model: Decoder, folder: pathlib.Path | None) -> dict[str, Any]:
    """What transformers needs to make its own tokenizer of tokenizer.json, over what the folder's file says already."""
    ids = generation_config_to_json(model.generation_config)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.max_position_embeddings}
    if folder is not None and exists(folder / TOKENIZER_CONFIG):
        config |= read_json(folder / TOKENIZER_CONFIG, "tokenizer config", doing="saving a tokenizer")
    for name in ("bos", "eos", "pad"):
        value = ids.get(f"{name}_token_id")
        token = None if value is None else tokenizer.id_to_token(value[0] if isinstance(value, list) else value)
        if token is not None:
            config[f"{name}_token"] = token
    return config


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=2, allow_nan=False).encode() + b"\n"
