"""Short names for loop settings that stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..settings import LoopConfig, interval


def names(settings: Sequence[LoopConfig | None], brief: bool = False) -> list[str]:
    """Integrator and K of each, `anchored, K = 3`, and the other fields where they differ.

    Args:
        brief: the fields that differ and nothing else, `[4,8), 3 loops`: for columns.
    """
    loops = [loop for loop in settings if loop is not None]
    shown = [f.name for f in fields(LoopConfig) if _differs(loops, f.name, brief)]
    if brief:
        shown = shown or ["loops"]
    else:
        others = [name for name in shown if name not in ("integrator", "loops")]
        shown = ["integrator", *others, "loops"]
    return [
        "no loop"
        if loop is None
        else ", ".join(
            _word(name, getattr(loop, name), brief)
            for name in shown
            if getattr(loop, name) is not None
        )
        for loop in settings
    ]


def _differs(loops: Sequence[LoopConfig], name: str, brief: bool) -> bool:
    values = {getattr(loop, name) for loop in loops}
    if len(values) < 2 or brief:
        return len(values) > 1
    # A field that only one integrator has does not tell the settings of that one apart.
    pairs = {(loop.integrator, getattr(loop, name)) for loop in loops}
    return len(values - {None}) > 1 or len(pairs) > len({loop.integrator for loop in loops})


def _word(name: str, value: Any, brief: bool) -> str:
    if name == "integrator":
        return str(value)
    if name == "loops":
        return f"{value} loops" if brief else f"K = {value}"
    if name == "window":
        return interval(value) if brief else f"window {interval(value)}"
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{name} {shown}"
