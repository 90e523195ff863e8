"""Mistral's own layout: consolidated*.safetensors and params.json; reference: mistral-inference, `args.py` and others.

Its rotary embedding turns the pairs (2i, 2i + 1) of a head, that of the Hugging Face form (i, i + head_dim / 2): the
rows of q and k stand in another order.

The first files of Mixtral 8x7B are laid out otherwise, and are read only: `block_sparse_moe.w1`, `.w2` and `.w3` of a
layer have all experts under one another, [experts * ffn, hidden] each, so that an expert's w2 is transposed; and
params.json has the names that Hugging Face uses. Reference: transformers, `convert_mixtral_weights_to_hf.py`.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from convert.folders import Source
from eqx_moe.checkpoint.files import listing, open_plain
from eqx_moe.checkpoint.header import read_header
from eqx_moe.checkpoint.jsonfile import read_json
from eqx_moe.checkpoint.matching import match
from eqx_moe.checkpoint.names import Name, leaf_paths, matcher
from eqx_moe.checkpoint.quantised import decoded
from eqx_moe.checkpoint.shards import Stored, changed_while_reading
from eqx_moe.checkpoint.streaming import Unread, unread
from eqx_moe.errors import CheckpointError, quote
from eqx_moe.family.config import head_dim
from eqx_moe.models import family_of, parse_config, skeleton

PARAMS, CONSOLIDATED = "params.json", "consolidated.safetensors"
_DOING = "reading Mistral's own layout"
# Theirs -> ours; those without a default must be there.
_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_MOE_KEYS = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
_FIRST_KEYS = {ours: theirs for theirs, ours in _KEYS.items()}
_OTHERS = {"rope_theta", "sliding_window", "moe", "max_seq_len", "max_position_embeddings", "tied_embeddings"}
# Known, and the one value that is understood; None is any.
_FIXED = {
    "model_type": "transformer",
    "activation": "silu",
    "use_biases": False,
    "causal": True,
    "max_batch_size": None,
}
# Nothing in the layout says how long a text may be unless its makers do; what transformers' own converter takes.
_POSITIONS = 32_768


def config_of(params: Mapping[str, Any], file: str) -> Any:
    """The config that params.json describes: of a Mixtral if it has experts, else of a Mistral.

    Raises:
        CheckpointError: CFG-MISSING or CFG-VALUE; a key that is not known is refused, for it may say what is computed.
    """

    def refuse(item: str, expected: str, found: str) -> NoReturn:
        fix = "convert/mistral.py knows the layout of Mistral 7B, Nemo and Mixtral; a newer kind has to be added there"
        raise CheckpointError(
            code="CFG-VALUE", doing=_DOING, file=file, item=item, expected=expected, found=found, fix=fix
        )

    said: dict[str, str] = {}
    if "hidden_size" in params:
        params, said = _renamed(params), _KEYS
    needed = {"dim", "n_layers", "hidden_dim", "n_heads", "norm_eps", "vocab_size"}
    missing = sorted(said.get(key, key) for key in needed - params.keys())
    if missing:
        raise CheckpointError(
            code="CFG-MISSING",
            doing=_DOING,
            file=file,
            item=missing[0],
            expected=f"the keys {missing}",
            found="an object without them",
            fix="take params.json from the checkpoint's source again",
        )
    for key, value in params.items():
        if key in _FIXED and _FIXED[key] not in (None, value):
            refuse(key, repr(_FIXED[key]), quote(value))
        if key not in _FIXED and key not in _KEYS and key not in _OTHERS and value is not None:
            refuse(key, "a key that is known here", quote(value))
    data = {ours: params[theirs] for theirs, ours in _KEYS.items() if params.get(theirs) is not None}
    data.setdefault("num_key_value_heads", params["n_heads"])
    # Some files have it as a text.
    window = params.get("sliding_window")
    data["sliding_window"] = int(window) if isinstance(window, str) and window.isdecimal() else window
    # Before theta was written down, it went with the window; mistral-inference's rule at that time.
    theta = params.get("rope_theta") or (1e6 if window is None else 1e4)
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    data["tie_word_embeddings"] = params.get("tied_embeddings", False)
    data["max_position_embeddings"] = params.get("max_seq_len") or params.get("max_position_embeddings") or _POSITIONS
    data["model_type"] = "mistral"
    if params.get("moe") is not None:
        moe = params["moe"]
        if not isinstance(moe, dict) or moe.keys() != _MOE_KEYS.keys():
            refuse("moe", f"an object with the keys {sorted(_MOE_KEYS)}", quote(moe))
        data |= {ours: moe[theirs] for theirs, ours in _MOE_KEYS.items()}
        data["model_type"] = "mixtral"
    return parse_config(data, file)


def _renamed(params: Mapping[str, Any]) -> dict[str, Any]:
    """params.json of the first files in the later ones' names; two experts a token, and theta, need not be said."""
    result = {"rope_theta": 1e4} | {_FIRST_KEYS.get(key, key): value for key, value in params.items()}
    experts, per_token = result.pop("num_local_experts", None), result.pop("num_experts_per_tok", 2)
    return result if experts is None else result | {"moe": {"num_experts": experts, "num_experts_per_tok": per_token}}


def params_of(config: Any) -> dict[str, Any]:
    """params.json of a config; `ValueError` if the layout has no way to say what the config says."""
    family = family_of(config).model_type
    if family not in ("mistral", "mixtral"):
        raise ValueError(f"Mistral's own layout is for Mistral and Mixtral models; got one of the family {family!r}.")
    if config.rope_parameters.rope_type != "default":
        raise ValueError(
            f"params.json speaks of no other rotary embedding than the default one; got {config.rope_parameters}."
        )
    params = {theirs: getattr(config, ours) for theirs, ours in _KEYS.items()}
    params |= {"head_dim": head_dim(config), "rope_theta": config.rope_parameters.rope_theta}
    params["max_seq_len"] = config.max_position_embeddings
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    if config.tie_word_embeddings:
        params["tied_embeddings"] = True
    if family == "mixtral":
        params["moe"] = {theirs: getattr(config, ours) for theirs, ours in _MOE_KEYS.items()}
    return params


def names(config: Any) -> tuple[Name, ...]:
    """The name table of the layout."""
    ours, theirs = "layers.{l}.", "layers.{l}."
    rows = [Name("embed.weight", "tok_embeddings.weight"), Name("norm.weight", "norm.weight")]
    rows += [Name(f"{ours}{part}_norm.weight", f"{theirs}{part}_norm.weight") for part in ("attention", "ffn")]
    rows += [Name(f"{ours}attention.{part}.weight", f"{theirs}attention.w{part}.weight") for part in "qkvo"]
    matrices = {"gate": "w1", "down": "w2", "up": "w3"}
    if family_of(config).model_type == "mixtral":
        rows.append(Name(ours + "moe.router.weight", theirs + "feed_forward.gate.weight"))
        rows += [
            Name(f"{ours}moe.experts.{part}", theirs + f"feed_forward.experts.{{e}}.{matrix}.weight")
            for part, matrix in matrices.items()
        ]
    else:
        rows += [
            Name(f"{ours}mlp.{part}.weight", f"{theirs}feed_forward.{matrix}.weight")
            for part, matrix in matrices.items()
        ]
    if not config.tie_word_embeddings:
        rows.append(Name("head.weight", "output.weight"))
    return tuple(rows)


def first_names(config: Any) -> tuple[Name, ...]:
    """The name table of the first files of a Mixtral, their stacks as [experts, ffn, hidden]."""
    theirs = "layers.{l}.block_sparse_moe."
    rows = [row for row in names(config) if ".moe." not in row.ours]
    rows.append(Name("layers.{l}.moe.router.weight", theirs + "gate.weight"))
    rows += [Name(f"layers.{{l}}.moe.experts.{part}", theirs + name) for part, name in (("gate", "w1"), ("up", "w3"))]
    return (*rows, Name("layers.{l}.moe.experts.down", theirs + "w2", transposed=True))


def _stacks(stored: Mapping[str, Stored], config: Any) -> dict[str, Stored]:
    """The tensors, those that are the first files' stacks of experts in the shape of a stack."""
    experts, ffn, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
    result = dict(stored)
    for name in filter(re.compile(r"layers\.[0-9]+\.block_sparse_moe\.w[123]").fullmatch, stored):
        entry = stored[name].entry
        if entry.shape == (experts * ffn, hidden) and stored[name].decode is None:
            result[name] = stored[name]._replace(entry=entry._replace(shape=(experts, ffn, hidden)))
    return result


@contextlib.contextmanager
def open_mistral(folder: pathlib.Path, dtype: str = "auto") -> Iterator[Source]:
    """A folder in Mistral's own layout, its leaves in our order of rows.

    Raises:
        CheckpointError: CFG-* and ST-* codes.
    """
    config = config_of(read_json(folder / PARAMS, "config", doing=_DOING), str(folder / PARAMS))
    leaves = leaf_paths(skeleton(config))
    with _open_consolidated(folder) as opened:
        stored, tables = decoded(opened), {"consolidated": names(config)}
        if family_of(config).model_type == "mixtral":
            stored, tables["first"] = _stacks(stored, config), first_names(config)
        tensors = match(folder, leaves, tables, stored, skipped={}, tied=(), one_dtype=dtype == "auto")
        keep_fp32 = family_of(config).keep_fp32
        found = unread(leaves, tensors, stored, dtype=dtype, keep_fp32=keep_fp32)
        yield Source(folder, config, reordered(found, config, to_halves))


def reordered(
    leaves: Mapping[str, Unread], config: Any, order: Callable[[np.ndarray, int], np.ndarray]
) -> dict[str, Unread]:
    """The leaves, the rows of q and k in the other order, as soon as they are read."""
    result = dict(leaves)
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        for path in filter(matcher(f"layers.{{l}}.attention.{part}.weight").fullmatch, leaves):
            result[path] = _Reordered(leaves[path], heads, order).unread()
    return result


def to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * head_dim, hidden] from pairs (2i, 2i + 1) to pairs (i, i + head_dim / 2)."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_halves`."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


class _Reordered:
    def __init__(self, leaf: Unread, heads: int, order: Callable[[np.ndarray, int], np.ndarray]):
        self._leaf, self._heads, self._order = leaf, heads, order

    def unread(self) -> Unread:
        return Unread(self._leaf.shape, self._leaf.dtype, self._read)

    def _read(self, index: tuple[int, ...]) -> np.ndarray:
        return np.ascontiguousarray(self._order(self._leaf.read(()), self._heads)[index])


@contextlib.contextmanager
def _open_consolidated(folder: pathlib.Path) -> Iterator[dict[str, Stored]]:
    """All tensors of the files consolidated*.safetensors."""
    files = sorted(folder.glob("consolidated*.safetensors"))
    if not files:
        pickles = sorted(folder.glob("consolidated*.pt*"))
        raise CheckpointError(
            code="ST-PICKLE" if pickles else "ST-WEIGHTS",
            doing=_DOING,
            file=str(pickles[0] if pickles else folder),
            expected=f"{CONSOLIDATED}, or several consolidated*.safetensors",
            found=listing(folder),
            fix="take the model's safetensors form; pickled weights can run code and are never read"
            if pickles
            else "check the folder's name, or download the weights",
        )
    stored: dict[str, Stored] = {}
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_plain(path, code="ST-FILE", doing=_DOING)) for path in files]
        before = [_version(file) for file in opened]
        for path, file in zip(files, opened, strict=True):
            for name, entry in read_header(file, str(path)).items():
                if name in stored:
                    raise CheckpointError(
                        code="ST-EXTRA",
                        doing=_DOING,
                        file=str(path),
                        item=name,
                        expected="each tensor in one file",
                        found=f"the name in {quote(pathlib.Path(stored[name].path).name)}, too",
                        fix="remove what belongs to another checkpoint; slices of one tensor are not read",
                    )
                stored[name] = Stored(file, str(path), entry)
        yield stored
        for path, file, version in zip(files, opened, before, strict=True):
            if _version(file) != version:
                changed_while_reading(str(path))


def _version(file) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
