"""Training-free looped transformers on MLX: more compute for a frozen model, no more memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import Guard, LoopConfig
from .errors import UserError

if TYPE_CHECKING:
    from .generation import generate, make_prompt_cache, stream_generate
    from .loading import load, load_model
    from .prompt_cache import load_prompt_cache, save_prompt_cache
    from .saving import save

__version__ = "0.1.0"

__all__ = [
    "Guard",
    "LoopConfig",
    "UserError",
    "generate",
    "load",
    "load_model",
    "load_prompt_cache",
    "make_prompt_cache",
    "save",
    "save_prompt_cache",
    "stream_generate",
]

# mlx-lm takes seconds to import: only what needs it waits for it.
_HOMES = {
    "generate": "generation",
    "load": "loading",
    "load_model": "loading",
    "load_prompt_cache": "prompt_cache",
    "make_prompt_cache": "generation",
    "save": "saving",
    "save_prompt_cache": "prompt_cache",
    "stream_generate": "generation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
