"""Where a measurement comes from: the settings in full, the command, the machine, the versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from .. import __version__
from ..settings import LoopConfig, interval
from .document import Table


def machine() -> str:
    """What this computer is."""
    return f"{mx.device_info()['device_name']}, {platform.machine()}, {platform.system()}"


def provenance(command: str) -> dict[str, str]:
    """What a run that begins now is made with.

    Args:
        command: as it was typed.
    """
    versions = (f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    return {
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "command": command,
        "machine": machine(),
        "versions": ", ".join(
            [f"mlx_loop {__version__}", *versions, f"Python {platform.python_version()}"]
        ),
    }


def runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """The provenance of one run or more."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    return Table(names, [[str(run.get(name, "")) for name in names] for run in runs], left=names)


def settings_table(names: Sequence[str], loops: Sequence[LoopConfig | None]) -> Table:
    """Every field of each setting that loops."""
    given = [(name, loop) for name, loop in zip(names, loops, strict=True) if loop is not None]
    shown = [
        f.name for f in fields(LoopConfig) if any(getattr(x, f.name) is not None for _, x in given)
    ]
    rows = [
        [name, *(_value(field, getattr(loop, field)) for field in shown)] for name, loop in given
    ]
    return Table(["setting", *shown], rows, left=shown)


def _value(field: str, value: Any) -> str:
    if field == "window":
        return interval(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
