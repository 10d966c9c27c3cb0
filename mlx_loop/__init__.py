"""Training-free looped transformers on MLX: more compute for a frozen model, no more memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.loading import load, load_model
    from .checkpoints.saving import save
    from .errors import UserError
    from .generation.generate import generate, make_prompt_cache, stream_generate
    from .generation.prompt_cache import load_prompt_cache, save_prompt_cache
    from .measure.library import compare, evaluate, sweep, trace
    from .settings import Guard, LoopConfig

__version__ = "0.1.0"

__all__ = [
    "Guard",
    "LoopConfig",
    "UserError",
    "compare",
    "evaluate",
    "generate",
    "load",
    "load_model",
    "load_prompt_cache",
    "make_prompt_cache",
    "save",
    "save_prompt_cache",
    "stream_generate",
    "sweep",
    "trace",
]

# mlx-lm takes seconds to import: only what needs it waits for it. The commands hear Ctrl-C once
# this file is read.
_HOMES = {
    "Guard": "settings",
    "LoopConfig": "settings",
    "UserError": "errors",
    "compare": "measure.library",
    "evaluate": "measure.library",
    "generate": "generation.generate",
    "load": "checkpoints.loading",
    "load_model": "checkpoints.loading",
    "load_prompt_cache": "generation.prompt_cache",
    "make_prompt_cache": "generation.generate",
    "save": "checkpoints.saving",
    "save_prompt_cache": "generation.prompt_cache",
    "stream_generate": "generation.generate",
    "sweep": "measure.library",
    "trace": "measure.library",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
