"""Loading a checkpoint as a looped model, through mlx-lm's own loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import mlx.core as mx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError
from ..foreign import foreseen, path_of, read_json
from ..models import get_classes
from ..models.looped import Checkpoint, Looped
from ..models.pipeline import into_stages
from ..settings import LoopConfig, LoopLike, as_loop
from ..upstream import EXPERTS, download
from . import memory, sensitivity
from . import whole as checkpoint
from .card import base_model
from .hub import cannot_have
from .quantise import (
    Params,
    Quantization,
    as_quantization,
    choose,
    evaluate,
    is_quantised,
    pieces,
    section,
)

# Checkpoints inside the package, by the names under which `load` knows them.
_DEMO = Path(__file__).parents[1] / "demo"
DEMOS = {"demo": _DEMO / "dense", "demo-moe": _DEMO / "moe", "demo-mla": _DEMO / "mla"}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")

LoopArgument = LoopLike | Literal["saved"]


def load(
    path_or_hf_repo: str | Path | None = None,
    *,
    loop: LoopArgument = "saved",
    dtype: str | None = None,
    quantize: int | str | Quantization | None = None,
    calibration: str | None = None,
    adapter_path: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    lazy: bool = False,
    force: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    group: mx.distributed.Group | None = None,
    pipeline: bool = False,
) -> tuple[Looped, TokenizerWrapper]:
    """Load a model, looped, and its tokenizer.

    Args:
        path_or_hf_repo: a folder, a Hugging Face repository, or the name of a checkpoint that
            ships with the package (`DEMOS`); None is `demo`.
        loop: settings, a number of loops, or a dict of `LoopConfig`'s fields. `saved`: the
            settings stored with the model, else the preset of its family and size. None:
            looping off.
        dtype: `float32`, `float16` or `bfloat16` for all parameters that are not quantised;
            None: as stored, but float32 for a model with experts on the CPU.
        quantize: quantise while loading: a number of bits, a mode (`mxfp4`, `nvfp4`, `mxfp8`) or
            a whole `Quantization`. The peak is near the quantised size plus the largest matrix.
        calibration: the text on which the recipe `budget` measures; None: one that ships with
            the package.
        adapter_path: a folder with LoRA adapters, as mlx-lm writes them.
        tokenizer_config: more settings for the tokenizer.
        lazy: read weights when they are first used, or now where they are quantised.
        force: try even what does not fit into memory.
        revision: branch, tag or commit of the repository.
        trust_remote_code: let the tokenizer run code from the checkpoint.
        group: the machines over which each layer is split (docs/several-macs.md); None: one.
        pipeline: give each machine whole layers instead.

    Raises:
        UserError: whatever is wrong with the checkpoint or the settings, in one line.
    """
    path = find(path_or_hf_repo, revision)
    settings = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    tokenizer = load_tokenizer(path, settings)
    measures = quantize is not None and as_quantization(quantize).recipe == "budget"
    model = load_model(
        path,
        loop=loop,
        dtype=dtype,
        quantize=quantize,
        calibration=sensitivity.encode(tokenizer, calibration) if measures else None,
        adapter_path=adapter_path,
        lazy=lazy,
        force=force,
        group=group,
        pipeline=pipeline,
    )
    check_vocabulary(path, model, tokenizer)
    return model, tokenizer


def check_vocabulary(path: Path, model: Looped, tokenizer: TokenizerWrapper) -> None:
    """Refuse a tokenizer with words that the model has no embedding for.

    Tokens that were added to a tokenizer may be beyond it: those of images are in Gemma 3. They are
    refused when a text has them.

    Raises:
        UserError: there is such a word.
    """
    count, added = model.vocabulary, tokenizer.added_tokens_decoder
    words = tokenizer.get_vocab().items()
    beyond = [(token, word) for word, token in words if token >= (count or math.inf)]
    worst = max((pair for pair in beyond if pair[0] not in added), default=None)
    if worst is not None:
        raise UserError(
            f"{path}: the tokenizer has token {worst[0]}, {worst[1]!r}, and the model knows "
            f"{count}: they do not belong together"
        )


def load_tokenizer(path: Path, settings: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer in the folder of a checkpoint.

    Args:
        settings: more settings for it.
    """
    config = read_config(path)
    # transformers makes up an empty tokenizer where it finds none.
    if not any(file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
        raise UserError(f"{path} has no tokenizer files; mlx_loop.load_model needs none")
    with foreseen(f"cannot load the tokenizer in {path}"):
        ends = config.get("eos_token_id")
        tokenizer = mlx_lm_utils.load_tokenizer(path, settings, eos_token_ids=ends)
        tokenizer.decode(tokenizer.encode("What is 12 + 30?\n"))  # Some damage shows in use only.
        return tokenizer


def load_model(
    path_or_hf_repo: str | Path | None = None,
    *,
    loop: LoopArgument = "saved",
    dtype: str | None = None,
    quantize: int | str | Quantization | None = None,
    calibration: mx.array | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    force: bool = False,
    revision: str | None = None,
    group: mx.distributed.Group | None = None,
    pipeline: bool = False,
) -> Looped:
    """The model alone, for a checkpoint without a tokenizer. Arguments as in `load`, but

    Args:
        calibration: tokens (batch, length) on which the recipe `budget` measures.
    """
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise UserError(f"dtype={dtype!r} is not valid: it must be float32, float16 or bfloat16")
    path = find(path_or_hf_repo, revision)
    model = open_checkpoint(path, loop)
    chosen = {}
    if quantize is not None:
        chosen = quantization_for(model, as_quantization(quantize), calibration)
    with foreseen(f"cannot load {path}"):
        if dtype is None and needs_float32(model):
            dtype = "float32"
        if group is not None and group.size() == 1:
            group = None
        if group is not None and (chosen or adapter_path is not None):
            raise UserError(
                "a model over several machines takes neither quantize nor adapters while it is "
                "loaded: save it with them first"
            )
        if group is not None and pipeline:
            into_stages(model, group)
        todo = pieces(model, chosen, None if dtype is None else getattr(mx, dtype))
        if dtype not in (None, "float32") and needs_float32(model, quantised=False):
            raise UserError(
                f"MLX computes experts on the CPU in float32 only: leave dtype ({dtype}) out"
            )
        if group is not None and not pipeline:
            split(model, group)
        if not (force or lazy):
            memory.refuse_what_does_not_fit(model, base_model(model) or str(path))
        if chosen or not lazy:
            evaluate(todo)
        del todo
    if adapter_path is not None:
        _load_adapters(path_of(adapter_path), model)
    with foreseen(f"cannot load {path}"):
        if not lazy:
            mx.eval(model.parameters())
    return model


def split(model: Looped, group: mx.distributed.Group) -> None:
    """Tensor parallelism: leave this rank's share of each layer, still lazy.

    Raises:
        UserError: mlx-lm does not split this type, or the heads do not divide evenly.
    """
    if not hasattr(model, "shard"):
        raise UserError(
            f"mlx-lm cannot split models of the type {model.model_type!r} over several machines"
        )
    count, args = group.size(), getattr(model, "args", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(args, name, None) or 0
        if heads % count:
            raise UserError(
                f"{count} machines cannot share the {heads} {name} of this model evenly"
            )
    model.shard(group)


def _load_adapters(path: Path, model: Looped) -> None:
    with foreseen(f"cannot load the adapters in {path}"):
        config = read_json(path / "adapter_config.json")
        if "peft_type" in config:
            raise UserError(
                f"{path} has adapters of PEFT, which mlx-lm does not read: convert them, or merge "
                "them into the model"
            )
        if not (path / "adapters.safetensors").is_file():
            raise UserError(f"{path} has no adapters.safetensors")
        mlx_lm_utils.load_adapters(model, str(path))
        model.eval()
        evaluate(pieces(model, {}))


def open_checkpoint(path: Path, loop: LoopArgument = "saved") -> Looped:
    """The model in a folder, checked, its weights not yet read.

    Raises:
        UserError: whatever is wrong with the checkpoint or the settings, in one line.
    """
    if loop != "saved":
        loop = as_loop(loop)
    config = read_config(path)
    with foreseen(f"cannot load {path}"), ExitStack() as stack:
        stale = checkpoint.check_whole(path, config)
        folder = stack.enter_context(_without(stale, path)) if stale else path
        loaded, config = mlx_lm_utils.load_model(folder, lazy=True, get_model_classes=get_classes)
        model = cast(Looped, loaded)
        model.checkpoint = Checkpoint(path, config)
        model.loop = saved_loop(model.checkpoint) if isinstance(loop, str) else loop
        # Shapes that do not fit are found here: nothing is computed, and no weight is read.
        plain = model.with_loop(None)
        plain(mx.zeros((1, 2), mx.int32), cache=plain.new_cache())
    return model


@contextmanager
def _without(stale: list[Path], path: Path) -> Iterator[Path]:
    """The folder without files that mlx-lm, which knows no index, would read too."""
    with TemporaryDirectory(prefix="mlx_loop.") as name:
        for file in path.iterdir():
            if file not in stale:
                (Path(name) / file.name).symlink_to(file.resolve())
        yield Path(name)


def quantization_for(
    model: Looped,
    quantization: Quantization,
    calibration: mx.array | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Params]:
    """How each matrix of a model from `open_checkpoint` is quantised; its config says so too.

    Args:
        calibration: tokens (batch, length), for the recipe `budget`.
        progress: called with the layers measured and the layers in all.

    Raises:
        UserError: the model is quantised already, or the recipe does not fit it.
    """
    checkpoint = model.checkpoint
    assert checkpoint is not None
    if is_quantised(model):
        raise UserError(
            f"{checkpoint.path} is quantised already: give the checkpoint in full precision"
        )
    widths = None
    if quantization.recipe == "budget":
        if calibration is None:
            raise UserError("the recipe budget needs a tokenizer: use mlx_loop.load")
        base, full = (open_checkpoint(checkpoint.path, model.loop) for _ in range(2))
        widths = sensitivity.budget(base, full, quantization, calibration, progress)
    chosen = choose(model, quantization, widths)
    written = section(quantization, chosen)
    config = {**checkpoint.config, "quantization": written, "quantization_config": written}
    model.checkpoint = replace(checkpoint, config=config)
    return chosen


def needs_float32(model: Looped, quantised: bool = True) -> bool:
    """MLX gathers experts on the CPU in float32 only.

    Args:
        quantised: whether experts count that are quantised, which it gathers in any type.
    """
    inside = (inner for m in model.modules() if isinstance(m, EXPERTS) for inner in m.modules())
    experts = any("weight" in inner and (quantised or "scales" not in inner) for inner in inside)
    return experts and mx.default_device() == mx.cpu


def saved_loop(checkpoint: Checkpoint) -> LoopConfig | None:
    """The settings stored with a checkpoint; empty ones where nothing is stored.

    Raises:
        UserError: what is stored is not valid.
    """
    saved = checkpoint.config.get("loop", {})
    try:
        return None if saved is None else LoopConfig.from_dict(saved)
    except UserError as error:
        file = checkpoint.path / "config.json"
        raise UserError(f"the loop section of {file}: {error}") from error


def find(path_or_hf_repo: str | Path | None, revision: str | None = None) -> Path:
    """The folder of a checkpoint; a repository is downloaded unless it is there already."""
    name = "demo" if path_or_hf_repo is None else str(path_or_hf_repo)
    if name in DEMOS:
        return DEMOS[name]
    path = path_of(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file: give the folder with config.json and the weights")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"there is no folder {name}: give a folder, a Hugging Face repository such as "
            f"Qwen/Qwen3-4B-Instruct-2507, or {', '.join(DEMOS)}"
        )
    try:
        return download(name, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise cannot_have(name, error) from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the checkpoint in `path`, with the tokens that generation ends at.

    Raises:
        UserError: it is missing or damaged, or of a model that mlx-lm does not run.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json: it is not a model's folder")
    for other in path.iterdir():
        if other.is_fifo() or other.is_socket():
            raise UserError(f"{other} is not a file: nothing can be read from it")
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{file} does not name a model_type")
    with foreseen(f"cannot read {file}, or the generation_config.json beside it"):
        config = mlx_lm_utils.load_config(path)
        get_classes(config)
    return config
