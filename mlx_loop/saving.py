"""Saving a looped model so that plain mlx-lm loads the same folder, un-looped."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import UserError
from .files import whole_folder
from .loop import Looped


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
        UserError: `path` exists (and not `overwrite`), the disk is full or not writable, the
            model was not loaded from a checkpoint, or it has adapters that are not fused.
    """
    if model.path is None:
        raise UserError("only a model that mlx_loop.load or load_model loaded can be saved")
    weights = dict(tree_flatten(model.parameters()))
    if any(name.endswith(".lora_a") for name in weights):
        raise UserError("the model has adapters: fuse them into its weights first (mlx_lm.fuse)")
    path = Path(path)
    with whole_folder(path, overwrite) as folder:
        size = sum(array.nbytes for array in weights.values())
        free = shutil.disk_usage(folder).free
        if free < size:
            raise UserError(
                f"{path} needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on that disk"
            )
        mlx_lm_utils.save_model(folder, model)
        loop = None if model.loop is None else model.loop.to_dict()
        mlx_lm_utils.save_config({**model.config, "loop": loop}, folder / "config.json")
        generation = model.path / "generation_config.json"
        if generation.exists():
            shutil.copy(generation, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
