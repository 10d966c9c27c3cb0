"""Defaults of a model's kind and size, and the completion of partial settings with them."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from .errors import UserError
from .integrators import INTEGRATORS
from .settings import (
    INTEGRATOR_FIELDS,
    LoopConfig,
    Pair,
    ResolvedLoop,
    Window,
    check_order,
    pairs,
)

# Windows published as good for one model, where they differ from the rule of `default_window`
# (Training-Free Looped Transformers, arXiv 2605.23872): (model_type, layers) -> window.
KNOWN_WINDOWS = {("qwen3_moe", 48): (22, 26)}

DEFAULT_WIDTH = 4
# The best centres lie at 0.43 to 0.71 of the depth (the same paper, section on the window).
DEFAULT_CENTRE = 0.47

# The paper's recipe for all model families: anchored Runge-Kutta over the whole window.
_PAPER = LoopConfig(
    loops=3,
    integrator="anchored",
    beta=0.5,
    scope="block",
    routing="live",
    norm="free",
    cache="first",
    decode="full",
)
# The authors' best for long answers, on Qwen3-30B-A3B: layers [29, 33) of 48.
_GENERATIVE = replace(
    _PAPER,
    window=(29 / 48, 33 / 48),
    loops=6,
    scope="layer",
    routing="frozen",
    norm="interpolated",
)

# Settings as published, by name; a window of fractions fits any depth.
RECIPES = {
    "paper": _PAPER,
    "generative": _GENERATIVE,
    # Twice the integration time; with four times they saw answers collapse.
    "generative-t2": replace(_GENERATIVE, horizon=2.0),
}

# A mixture of experts chooses others in each pass, so that the map changes under a loop; every
# layer has its own choice to keep.
MIXTURE_PRESET = {"scope": "layer", "routing": "frozen"}
DENSE_PRESET = {"scope": "block", "routing": "live"}


def default_window(num_layers: int) -> tuple[int, int]:
    """Width 4 around depth fraction 0.47, narrower where fewer than 6 layers leave no room.

    From 3 layers up, at least one layer stays before and one after the window.
    """
    width = max(1, min(DEFAULT_WIDTH, num_layers - 2))
    start = max(0, round(DEFAULT_CENTRE * num_layers - width / 2))
    return start, start + width


def resolve(
    config: LoopConfig, model_type: str, num_layers: int, mixes_experts: bool = False
) -> ResolvedLoop:
    """`config` with every field filled in that its integrator reads, and the others `None`.

    Args:
        model_type: as in the checkpoint's config.json.
        num_layers: of the whole model.
        mixes_experts: whether layers choose among experts.

    Raises:
        UserError: the window does not fit the model, or fields do not fit each other.
    """
    name = config.integrator or "anchored"
    integrator = INTEGRATORS[name]
    loops = config.loops or (4 if integrator.even else 3)
    defaults = {
        "window": KNOWN_WINDOWS.get((model_type, num_layers)) or default_window(num_layers),
        "loops": loops,
        "integrator": name,
        "norm": "free",
        "cache": "first",
        "decode": "full",
        **(MIXTURE_PRESET if mixes_experts else DENSE_PRESET),
        **{name: d(loops) if callable(d) else d for name, d in integrator.reads.items()},
    }
    changes = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    changes |= {name: None for name in INTEGRATOR_FIELDS if name not in integrator.reads}
    if config.window is not None:
        changes["window"] = _as_layers(config.window, num_layers)
    return cast(ResolvedLoop, replace(config, **changes))


def _as_layers(window: Window, num_layers: int) -> Window:
    found = [_pair(pair, num_layers) for pair in pairs(window)]
    if found[-1][1] > num_layers:
        raise UserError(
            f"window={window!r} is not valid: the model has {num_layers} layers, so window must "
            f"be (start, stop) with 0 <= start < stop <= {num_layers}"
        )
    check_order(window, found)
    return found[0] if len(found) == 1 else tuple(found)


def _pair(pair: Pair, num_layers: int) -> tuple[int, int]:
    start, stop = pair
    if isinstance(start, float):
        first = min(round(start * num_layers), num_layers - 1)
        return first, max(round(stop * num_layers), first + 1)
    return int(start), int(stop)
