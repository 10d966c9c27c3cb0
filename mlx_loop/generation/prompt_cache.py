"""Prompt-cache files that know the model and the loop settings they were made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import load_prompt_cache as mlx_lm_load
from mlx_lm.models.cache import save_prompt_cache as mlx_lm_save

from ..errors import UserError
from ..files import whole_file
from ..models.looped import Looped
from ..settings import LoopConfig

# Where the file's metadata says what it was made with.
_KEY = "mlx_loop"


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
    if any(entry.empty() for entry in cache):
        raise UserError("the cache is empty: feed it a prompt before it is saved")
    loop = None if holds_no_answer and model.leaves_prompts_plain else model.loop
    made_with = json.dumps({"model": _fingerprint(model), "loop": _settings(loop)})
    with whole_file(Path(path), overwrite=True) as file:
        mlx_lm_save(str(file), list(cache), {**(metadata or {}), _KEY: made_with})


def load_prompt_cache(path: str | Path, model: Looped) -> tuple[list[Any], dict[str, str]]:
    """A cache and its metadata, for `model` with the loop settings that it has now.

    Raises:
        UserError: no such file, not a prompt cache, or made by another model or with other loop
            settings.
    """
    if not Path(path).exists():
        raise UserError(f"there is no prompt cache {path}: make one with `mlx_loop cache_prompt`")
    try:
        cache, metadata = mlx_lm_load(str(path), return_metadata=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a whole prompt-cache file: {error}") from error
    made_with = json.loads(metadata.pop(_KEY, "{}"))
    if made_with.get("model") != _fingerprint(model):
        raise UserError(f"{path} was made with another model, or not by mlx_loop")
    # K = 1 leaves what the un-looped model does.
    fits_plain = made_with["loop"] is None and model.leaves_prompts_plain
    if made_with["loop"] != _settings(model.loop) and not fits_plain:
        if made_with["loop"] is None:
            raise UserError(
                f"{path} holds a prompt without loops: use it with --loop-prompt plain and --cache "
                "first (prompt='plain', cache='first'), or without a loop"
            )
        difference = _difference(made_with["loop"], model.loop)
        raise UserError(
            f"{path} was made with other loop settings ({difference}): use those, or make the "
            "cache again"
        )
    return cache, metadata


def _settings(loop: LoopConfig | None) -> dict[str, Any] | None:
    return None if loop is None else loop.to_dict()


def _difference(made_with: Mapping[str, Any] | None, loop: LoopConfig | None) -> str:
    then, now = made_with or {"loops": "off"}, _settings(loop) or {"loops": "off"}
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{n} {then.get(n, 'unset')}, now {now.get(n, 'unset')}" for n in names)


def _fingerprint(model: Looped) -> str:
    config = {} if model.checkpoint is None else dict(model.checkpoint.config)
    config.pop("loop", None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
