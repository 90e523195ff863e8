"""Pushing models, and folders that hold one, to the Hub."""

import collections
import os
import pathlib

import jax
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from eqx_moe.checkpoint.checksums import CHECKSUMS
from eqx_moe.checkpoint.dtypes import weight_dtype
from eqx_moe.checkpoint.files import exists, open_plain
from eqx_moe.checkpoint.jsonfile import read_json
from eqx_moe.checkpoint.names import leaf_paths
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.shards import INDEX, open_weights
from eqx_moe.checkpoint.writer import is_of_one_process, weight_files
from eqx_moe.errors import CheckpointError
from eqx_moe.hub import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    dtype_of_most,
    dtype_to_save,
    load_tokenizer,
    local_folder,
    match_weights,
    read_config,
    read_generation_config,
    small_files,
    to_write,
)
from eqx_moe.models import count_parameters, family_of, skeleton
from eqx_moe.nn.decoder import Decoder
from eqx_moe.remote.card import model_card
from eqx_moe.remote.download import open_snapshot
from eqx_moe.remote.upload import Content, check_push, push

_DOING = "pushing a model"
# What goes to the Hub with the weights of a folder, if it is there.
_BESIDE = (INDEX, "config.json", "generation_config.json", "chat_template.jinja", "README.md")
# What transformers makes its tokenizer of besides tokenizer.json; each is one JSON object.
_TOKENIZER_JSON = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
_BESIDE += (TOKENIZER, *_TOKENIZER_JSON)
_BESIDE += ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
_BESIDE += ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")


def push_to_hub(
    model: Decoder,
    repo_id: str,
    tokenizer: Tokenizer | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    max_shard_size: int | str = "5GB",
    layout: str = "original",
    dtype: DTypeLike | None = None,
    base_model: str | None = None,
) -> str:
    """Writes a model to a repo on the Hub, so that `from_pretrained` and transformers load it from there.

    Each file of weights is written to the disk (`TMPDIR`), uploaded, and removed before the next. One commit at the end
    makes the model visible: until then the repo is what it was, and after a failure too. Pushing again sends what is
    missing. Other files in the repo stay as they are; a README.md is written if there is none. In a program of several
    processes all must call this; the first uploads.

    Args:
        repo_id: "org/name"; made if it is not there.
        private: whether a repo that is made is private; None is the owner's default.
        revision: the branch, made if it is not there; None is main.
        create_pr: whether to open a pull request against main instead of committing to it.
        token: what to log in with; None is the login of `hf auth login` or HF_TOKEN.
        base_model: the repo that the model was made from, for the model card.
        tokenizer, max_shard_size, layout, dtype: as for `save_pretrained`.

    Returns:
        The address of the commit or of the pull request (in processes but the first, an empty text).

    Raises:
        ValueError: an argument is wrong; the weights do not have the shapes of `model.config`.
        CheckpointError: HUB-* codes; a value does not fit in `dtype`.
    """
    check_push(repo_id, revision, create_pr)
    model, names, keep_fp32 = to_write(model, layout)
    leaves, named = leaf_paths(model), None if dtype is None else weight_dtype(dtype).name
    weights, _ = weight_files(
        leaves, names, max_shard_size=max_shard_size, dtype=named, keep_fp32=keep_fp32, place=repo_id
    )
    card = _card(repo_id, model, dtype_to_save(leaves, dtype, None), base_model)
    address, alone = "", is_of_one_process(leaves)
    if alone or jax.process_index() == 0:
        earlier = None if tokenizer is None else _earlier(repo_id, revision, token)
        address = push(
            repo_id,
            {**weights, **small_files(model, tokenizer, dtype, earlier)},
            card=card,
            private=private,
            revision=revision,
            message=commit_message,
            create_pr=create_pr,
            token=token,
        )
    else:
        for content in weights.values():
            collections.deque(content(), maxlen=0)
    if not alone:
        multihost_utils.sync_global_devices("eqx_moe.push_to_hub")
    return address


def push_folder(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> tuple[str, list[str]]:
    """Uploads a folder that `save_pretrained` or transformers wrote, as `push_to_hub` does a model.

    Returns:
        The address of the commit, and the names of what was left out: what makes up neither a model nor its tokenizer,
        and is no model card or licence.

    Raises:
        ValueError: `repo_id` is no name of a repo.
        CheckpointError: the folder's model, generation config or tokenizer would not load; HUB-* codes.
    """
    check_push(repo_id, None, False)
    path = local_folder(folder, _DOING)
    config = read_config(path)
    model = skeleton(config)
    read_generation_config(path, config)
    if exists(path / TOKENIZER):
        load_tokenizer(path)
    for name in _TOKENIZER_JSON:
        if exists(path / name):
            read_json(path / name, "tokenizer config", doing=_DOING)
    with open_weights(path) as opened:
        stored = decoded(opened)
        match_weights(stored, path, config, one_dtype=False)
        shards = sorted({pathlib.Path(tensor.path).name for tensor in opened.values()})
        dtype = dtype_of_most(stored)
    files: dict[str, Content] = {shard: path / shard for shard in shards}
    for name in _BESIDE:
        if exists(path / name):
            with open_plain(path / name, code="CFG-FOLDER", doing=_DOING) as file:
                files[name] = file.readall()
    card = _card(repo_id, model, dtype, None)
    address = push(
        repo_id, files, card=card, private=private, revision=None, message=None, create_pr=False, token=token
    )
    return address, sorted(entry.name for entry in path.iterdir() if entry.name not in {*files, CHECKSUMS})


def _earlier(repo: str, revision: str | None, token: str | bool | None) -> pathlib.Path | None:
    """The folder with a repo's tokenizer_config.json, if the repo is there; a new branch starts from main."""
    for named in (revision, None):
        try:
            return open_snapshot(
                repo, revision=named, token=token, cache_dir=None, local_files_only=False, doing=_DOING
            ).fetch(optional=(TOKENIZER_CONFIG,))
        except CheckpointError as error:
            if error.code != "HUB-REPO":
                raise
    return None


def _card(repo: str, model: Decoder, dtype: str, base_model: str | None) -> str:
    family = family_of(model.config)
    return model_card(
        repo,
        architecture=family.architecture,
        model_type=family.model_type,
        parameters=count_parameters(model),
        dtype=dtype,
        base_model=base_model,
    )
