"""What mlx_loop relies on in mlx-lm beyond its documented interface, in one place.

tests/test_upstream.py has a test for each assumption. A name that a release of mlx-lm no longer
has is told in one line, when it is asked for here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import iter_modules, resolve_name
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx_lm.models import cache as caches

from .errors import UserError


def _need(name: str) -> Any:
    """What mlx-lm calls `module:attribute`.

    Raises:
        UserError: this release of mlx-lm does not have it.
    """
    try:
        return resolve_name(f"mlx_lm.{name}")
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"mlx-lm {version('mlx-lm')} has no {name}, which mlx_loop needs: install a release "
            "that it knows, pip install 'mlx-lm>=0.32.2,<0.33'"
        ) from error


# --- Models ---

REMAPPING: dict[str, str] = _need("utils:MODEL_REMAPPING")
# (model type, architecture, both as in config.json) -> model type.
ARCHITECTURES: dict[tuple[str, str], str] = _need("utils:MODEL_ARCHITECTURE_REMAPPING")
# What holds all experts of a layer, called with states and the numbers of the chosen ones.
EXPERTS = (_need("models.switch_layers:SwitchGLU"), _need("models.switch_layers:SwitchMLP"))
# Types whose mask lets a token see later ones of the same call.
NOT_CAUSAL = ("phi3small",)
# What holds the layers of types that can be a pipeline.
Pipeline: Any = _need("models.pipeline:PipelineMixin")
download: Callable[..., Path] = _need("utils:_download")


def model_types() -> list[str]:
    """The model types that mlx-lm has a file for."""
    files = (Path(folder) for folder in mlx_lm.models.__path__)
    return sorted(
        name
        for folder in files
        for _, name, _ in iter_modules([str(folder)])
        if "\nclass ModelArgs" in (folder / f"{name}.py").read_text()
    )


def file_of(config: Mapping[str, Any]) -> str:
    """The model type whose file mlx-lm uses for a config.json."""
    model_type, names = str(config.get("model_type")), config.get("architectures") or ()
    for name in (names,) if isinstance(names, str) else names:
        if (model_type, name) in ARCHITECTURES:
            return ARCHITECTURES[model_type, name]
    return REMAPPING.get(model_type, model_type)


def model_classes(model_type: str) -> tuple[type, type]:
    """mlx-lm's model class and arguments class.

    Raises:
        UserError: mlx-lm does not have the type, or a package that the type needs is missing.
    """
    name = REMAPPING.get(model_type, model_type)
    try:
        module = import_module(f"mlx_lm.models.{name}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"mlx-lm {version('mlx-lm')} does not run the model type {model_type!r}"
        ) from error
    except SystemExit as error:
        # olmo's file ends the process where the package that it wraps is missing.
        raise UserError(
            f"the model type {model_type!r} needs a package of its own: "
            f"see the first lines of mlx_lm/models/{name}.py"
        ) from error
    return module.Model, module.ModelArgs


def hugging_face(tokenizer: Any) -> Any:
    """The tokenizer of transformers in mlx-lm's wrapper."""
    return tokenizer._tokenizer


# --- Caches ---

BaseCache: type = _need("models.cache:_BaseCache")
# mlx-lm's own number of leading tokens that its rotating cache keeps.
ROTATING_KEEP = 4


def position(cache: Any) -> int | None:
    """How many tokens a cache has seen: in a batch with the padding, the same for all rows.

    None: a cache that does not count them, as those of recurrent state.
    """
    if isinstance(cache, caches.CacheList):
        return next((p for p in map(position, cache.caches) if p is not None), None)
    if isinstance(cache, caches.BatchKVCache):
        return cache._idx
    if isinstance(cache, caches.BatchRotatingKVCache):
        return cache._offset
    return getattr(cache, "offset", None)


def one_step_back(cache: caches.RotatingKVCache | caches.BatchRotatingKVCache) -> None:
    """Undo the write of one token, so that the next write takes its place.

    It is in place, over the oldest entry when the cache is full. `trim` alone does not give back
    what `BatchRotatingKVCache` took off the padding.
    """
    cache.trim(1)
    if isinstance(cache, caches.BatchRotatingKVCache) and cache.rotated:
        cache.left_padding = cache.left_padding + 1


def rows_before(cache: caches.BatchKVCache, rows: mx.array, length: int) -> caches.BatchKVCache:
    """Copies of some rows, as they were before the last `length` tokens; `cache` stays as it is.

    mlx-lm's own `filter` looks at numbers, for which it waits for the device.
    """
    some = copy.copy(cache)
    some.keys, some.values = (array[rows] for array in cache.keys_and_values())
    some.offset, some.left_padding = cache.offset[rows], cache.left_padding[rows]
    some.trim(length)
    return some


def snapshot(cache: Any) -> dict[str, Any]:
    """All that a cache holds, unharmed by what is written to it later.

    Arrays are shared until then: a write in place goes to another handle of the same array.
    """
    return {name: handles(value) for name, value in vars(cache).items()}


def restore(cache: Any, state: dict[str, Any]) -> None:
    """Make a cache what it was when `snapshot` was taken of it."""
    vars(cache).update({name: handles(value) for name, value in state.items()})


def handles(value: Any) -> Any:
    """The same arrays, unharmed by what is written in place through the given ones."""
    if isinstance(value, mx.array):
        return value.reshape(value.shape)
    if isinstance(value, list | tuple):
        return type(value)(map(handles, value))
    return value


class KVCache(caches.KVCache):
    """mlx-lm's KVCache whose quantised form keeps what was hung on it.

    Of the same name, because prompt-cache files name classes that mlx-lm looks up by name; what
    is read back from a file is mlx-lm's own.
    """

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> caches.QuantizedKVCache:
        return _carry(self, super().to_quantized(group_size=group_size, bits=bits))


class CacheList(caches.CacheList):
    """mlx-lm's CacheList, of one history per evaluation, that `kv_bits` can quantise."""

    @property
    def offset(self) -> int | None:
        return position(self)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> caches.CacheList:
        members = (c.to_quantized(group_size=group_size, bits=bits) for c in self.caches)
        return _carry(self, caches.CacheList(*members))


_MARK = "loop_phase"


def mark(cache: Sequence[Any], value: object) -> None:
    """Hang something on a model's cache that survives what mlx-lm does to its entries."""
    setattr(cache[0], _MARK, value)
    if type(cache[0]) is caches.KVCache:
        # `kv_bits` replaces the entry by its quantised form.
        cache[0].__class__ = KVCache


def marked(cache: Sequence[Any]) -> Any:
    """What `mark` hung there; None: nothing."""
    return getattr(cache[0], _MARK, None)


def _carry(old: Any, new: Any) -> Any:
    if hasattr(old, _MARK):
        setattr(new, _MARK, getattr(old, _MARK))
    return new


@dataclass(frozen=True)
class Request:
    """How mlx-lm's `make_prompt_cache` was called.

    Args:
        max_kv_size: its argument, which it drops where a model makes its own caches.
        by_mlx_lm: whether it was called by another function of mlx-lm.
        drafts: whether that is speculative decoding.
    """

    max_kv_size: int | None = None
    by_mlx_lm: bool = False
    drafts: bool = False


def request() -> Request:
    """The call of `make_prompt_cache` that is under way; an empty one where there is none."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not caches.make_prompt_cache.__code__:
        frame = frame.f_back
    if frame is None or frame.f_back is None:
        return Request()
    caller = frame.f_back
    return Request(
        frame.f_locals["max_kv_size"],
        caller.f_globals.get("__name__", "").partition(".")[0] == "mlx_lm",
        caller.f_code.co_name == "speculative_generate_step",
    )
