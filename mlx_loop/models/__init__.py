"""Looped model classes, one for each model class of mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache, wraps
from importlib.metadata import version
from typing import Any

from ..errors import UserError
from ..upstream import REMAPPING, file_of, model_classes, model_types
from .looped import Looped
from .rope import reader


def supported() -> list[str]:
    """Model types as config.json names them."""
    return sorted({*model_types(), *REMAPPING})


def get_classes(config: Mapping[str, Any]) -> tuple[type[Looped], type]:
    """mlx-lm's `get_model_classes` hook: config.json -> (model class, arguments class).

    Raises:
        UserError: a model type that mlx-lm does not run.
    """
    model_type = config.get("model_type", "")
    if model_type not in supported():
        near = get_close_matches(str(model_type), supported(), 5)
        raise UserError(
            f"model type {model_type!r} is none of the {len(supported())} that mlx-lm "
            f"{version('mlx-lm')} runs" + (f"; near it are {', '.join(near)}" if near else "")
        )
    name = file_of(config)
    return looped_class(name), reader(model_classes(name)[1])


@cache
def looped_class(model_type: str) -> type[Looped]:
    """mlx-lm's model class of a type, with `Looped` in front."""
    base, _ = model_classes(model_type)

    # mlx-lm looks at the names of the arguments.
    @wraps(base.__call__)
    def call(self: Looped, *args: Any, **kwargs: Any) -> Any:
        return Looped.__call__(self, *args, **kwargs)

    members = {"__call__": call, "__doc__": base.__doc__, "__module__": __name__}
    return type(model_type, (Looped, base), members)


def __getattr__(name: str) -> type[Looped]:
    """So that models can be pickled: a class is found by its model type."""
    if name not in model_types():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return looped_class(name)
