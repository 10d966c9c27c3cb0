"""Saving a looped model, and quantising one from disk to disk, so that plain mlx-lm loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError
from ..files import check_space, whole_folder
from ..models.looped import Looped
from .card import write_card
from .memory import weights_bytes
from .quantise import Params, pieces, shards

# A shard is held in memory until it is written. mlx-lm's own are five times as large.
SHARD_BYTES = 1 << 30

# What belongs to a checkpoint besides its weights and config.json.
COMPANIONS = (
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.py",
)


# What else may lie in the folder of one, as libraries, hubs and desktops leave it there.
_BESIDE = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "LICENSE*",
    "*.jinja",
    ".gitattributes",
    ".DS_Store",
)


def check_checkpoint(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a checkpoint.

    Raises:
        UserError: it has files of another kind, or no config.json. An empty one is no loss.
    """
    known = (*COMPANIONS, *_BESIDE)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, so it is not replaced: choose another name")
    names = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())
    other = [name for name in names if not any(map(partial(fnmatch, name), known))]
    if other or (names and "config.json" not in names):
        what = f"holds {other[0]}" if other else "has no config.json"
        raise UserError(
            f"{folder} {what}, so it is no checkpoint and is not replaced: choose another name, or "
            "empty it first"
        )


def save(
    path: str | Path,
    model: Looped,
    tokenizer: TokenizerWrapper | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write weights, config.json with a `loop` section, and tokenizer to the folder `path`.

    The folder appears when it is complete. config.json keeps the model's own `model_type`, so
    hosts that do not know loops load it as the plain model.

    Raises:
        UserError: `path` exists (and not `overwrite`, or it is no checkpoint), the disk is full or
            not writable, the model was not loaded from a checkpoint, or its adapters are not fused.
    """
    if model.checkpoint is None:
        raise UserError("only a model that mlx_loop.load or load_model loaded can be saved")
    weights = dict(tree_flatten(model.parameters()))
    if any(name.endswith(".lora_a") for name in weights):
        raise UserError("the model has adapters: fuse them into its weights first (mlx_lm.fuse)")
    path = Path(path)
    with whole_folder(path, overwrite, check_checkpoint) as folder:
        check_space(folder, path, sum(array.nbytes for array in weights.values()))
        mlx_lm_utils.save_model(folder, model)
        generation = model.checkpoint.path / "generation_config.json"
        if generation.exists():
            shutil.copy(generation, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_card(folder, model, path.name)
        _save_config(folder, model)


def quantize(
    path: str | Path,
    model: Looped,
    chosen: Mapping[str, Params],
    *,
    recipe: str = "",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Quantise a checkpoint from disk to disk; memory holds one shard and two matrices.

    The folder appears when it is complete, as `save` would have written it. `model` is used up.

    Args:
        model: from `loading.open_checkpoint`, not evaluated, with the loop settings to save.
        chosen: from `loading.quantization_for`.
        recipe: words for the model card.
        progress: called with the bytes written so far, of `memory.weights_bytes(model, chosen)`.

    Raises:
        UserError: `path` exists (and not `overwrite`, or it is no checkpoint), the disk is full or
            not writable, or the weights hold NaN or infinity.
    """
    path = Path(path)
    with whole_folder(path, overwrite, check_checkpoint) as folder:
        size = weights_bytes(model, chosen)
        check_space(folder, path, size)
        groups = shards(pieces(model, chosen), SHARD_BYTES)
        write_card(folder, model, path.name, recipe)
        parameters = mlx_lm_utils.get_total_parameters(model)
        # What the model still held would stay in memory after it is written.
        model.update(tree_map(lambda _: mx.array([]), model.parameters()))
        places: dict[str, str] = {}
        done, count = 0, len(groups)
        for number in range(count):
            name = (
                f"model-{number + 1:05d}-of-{count:05d}.safetensors"
                if count > 1
                else "model.safetensors"
            )
            shard: dict[str, mx.array] = {}
            group, groups[number] = groups[number], []
            while group:
                piece = group.pop(0)
                following = group or (groups[number + 1] if number + 1 < count else [])
                for ahead in following[:1]:
                    ahead.start()
                piece.evaluate()
                shard |= piece.arrays
                done += piece.nbytes
                progress(done)
            mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
            places |= dict.fromkeys(shard, name)
            del shard
        index = {
            "metadata": {"total_size": size, "total_parameters": parameters},
            "weight_map": dict(sorted(places.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
        assert model.checkpoint is not None
        for pattern in COMPANIONS:
            for file in model.checkpoint.path.glob(pattern):
                shutil.copy(file, folder)
        # Last, because without it nothing takes the folder for a model.
        _save_config(folder, model)


def _save_config(folder: Path, model: Looped) -> None:
    loop = None if model.loop is None else model.loop.to_dict()
    assert model.checkpoint is not None
    config: dict[str, Any] = {**model.checkpoint.config, "loop": loop}
    mlx_lm_utils.save_config(config, folder / "config.json")
