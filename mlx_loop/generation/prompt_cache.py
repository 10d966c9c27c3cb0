"""Prompt-cache files that know the model and the loop settings they were made with."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from mlx_lm.models.cache import load_prompt_cache as mlx_lm_load
from mlx_lm.models.cache import save_prompt_cache as mlx_lm_save
from safetensors import safe_open

from ..errors import UserError
from ..files import check_file, whole_file
from ..foreign import foreseen, path_of
from ..method.cache import leaves
from ..models.looped import Looped
from ..settings import LoopConfig
from ..upstream import position

# Where the file's metadata says what it was made with.
_KEY = "mlx_loop"
# What --kv-bits and --max-kv-size make of a model's own entries.
MADE_OF_THEM = {"QuantizedKVCache", "RotatingKVCache"}
SAMPLES = 64  # numbers of each array that tell weights apart


def save_prompt_cache(
    path: str | Path,
    cache: Sequence[Any],
    model: Looped,
    metadata: Mapping[str, str] | None = None,
    *,
    holds_no_answer: bool = False,
) -> None:
    """Write a cache to a safetensors file, in mlx-lm's format. An existing file is replaced.

    Args:
        cache: as filled by `model`.
        metadata: more strings to keep in the file.
        holds_no_answer: what was fed is the beginning of a prompt. Under `prompt="plain"` and
            `cache="first"` the file then fits every such setting, and the un-looped model.

    Raises:
        UserError: the cache is empty, or the file cannot be written.
    """
    path = cache_path(path)
    if any(entry.empty() for entry in cache):
        raise UserError("the cache is empty: feed it a prompt before it is saved")
    loop = None if holds_no_answer and model.leaves_prompts_plain else model.loop
    made_with = json.dumps({"model": _fingerprint(model), "loop": _settings(loop)})
    with whole_file(path, overwrite=True) as file:
        mlx_lm_save(str(file), list(cache), {**(metadata or {}), _KEY: made_with})


def load_prompt_cache(path: str | Path, model: Looped) -> tuple[list[Any], dict[str, str]]:
    """A cache and its metadata, for `model` with the loop settings that it has now.

    Raises:
        UserError: no such file, not a prompt cache, or made by another model or with other loop
            settings.
    """
    path = path_of(path)
    if not path.exists():
        raise UserError(f"there is no prompt cache {path}: make one with `mlx_loop cache_prompt`")
    with foreseen(f"{path} is not a whole prompt-cache file"):
        if not path.is_file():
            raise UserError(f"{path} is not a file: give one that `mlx_loop cache_prompt` has made")
        with safe_open(path, "numpy"):  # It looks at the header more closely than MLX.
            pass
        cache, metadata = mlx_lm_load(str(path), return_metadata=True)
        made_with = json.loads(metadata.pop(_KEY, "{}"))
        if made_with.get("model") != _fingerprint(model):
            raise UserError(f"{path} was made with another model, or not by mlx_loop")
    # K = 1 leaves what the un-looped model does.
    then = made_with.get("loop", {})
    fits_plain = then is None and model.leaves_prompts_plain
    if then != _settings(model.loop) and not fits_plain:
        if then is None:
            raise UserError(
                f"{path} holds a prompt without loops: use it with --loop-prompt plain and --cache "
                "first (prompt='plain', cache='first'), or without a loop"
            )
        difference = _difference(then, model.loop)
        raise UserError(
            f"{path} was made with other loop settings ({difference}): use those, or make the "
            "cache again"
        )
    with foreseen(f"{path} is not a whole prompt-cache file"):
        _check_fits(cache, model)
    return cache, metadata


def _settings(loop: LoopConfig | None) -> dict[str, Any] | None:
    return None if loop is None else loop.to_dict()


def _difference(made_with: Mapping[str, Any] | None, loop: LoopConfig | None) -> str:
    then, now = made_with or {"loops": "off"}, _settings(loop) or {"loops": "off"}
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{n} {then.get(n, 'unset')}, now {now.get(n, 'unset')}" for n in names)


def _fingerprint(model: Looped) -> str:
    """Of config.json and of the weights: their names, types, shapes, and some bytes of each."""
    config = {} if model.checkpoint is None else dict(model.checkpoint.config)
    config.pop("loop", None)
    arrays: list[tuple[str, mx.array]] = sorted(dict(tree_flatten(model.parameters())).items())
    said = [config, *((name, str(array.dtype), array.shape) for name, array in arrays)]
    samples = [_sample(array) for _, array in arrays]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    if samples:
        digest.update(bytes(mx.concatenate(samples)))
    return digest.hexdigest()[:16]


def _sample(array: mx.array) -> mx.array:
    """Some numbers of it, evenly spread, as bytes."""
    flat = array.reshape(-1)
    return flat[:: max(flat.size // SAMPLES, 1)][:SAMPLES].view(mx.uint8)


def _check_fits(cache: Sequence[Any], model: Looped) -> None:
    """Refuse entries of other kinds than the model's, or of shapes that it cannot go on from."""
    found, own = ({type(leaf).__name__ for leaf in leaves(of)} for of in (cache, model.new_cache()))
    if len(cache) != len(model.layers) or not found <= own | MADE_OF_THEM:
        raise ValueError("its entries are not those of this model")
    for leaf in leaves(cache):
        held = getattr(leaf, "keys", None)
        for array in (held, getattr(leaf, "values", None)):
            if isinstance(array, mx.array) and not mx.issubdtype(array.dtype, mx.floating):
                raise ValueError(f"its numbers are of type {array.dtype}")
        held = held[0] if isinstance(held, list | tuple) else held
        seen = position(leaf)
        if held is not None and seen is not None and type(leaf) is KVCache and seen > held.shape[2]:
            raise ValueError("it says that it holds more than it does")
    # Nothing is computed: shapes alone are tried.
    model.for_prompt(list(cache), 1)(mx.zeros((1, 1), mx.int32), cache=copy.deepcopy(list(cache)))


def cache_path(path: str | Path) -> Path:
    """The name of a file to write.

    Raises:
        UserError: nothing can be written there, or MLX would give it another name.
    """
    path = path_of(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a prompt cache's name: end it in .safetensors")
    check_file(path)
    return path
