"""Pictures: one file for light pages and one for dark ones. Needs the `eval` extra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import whole_file

# Okabe and Ito's colours, which colour-blind readers can tell apart, less the pale and the black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_DARK = {"figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117", "text": "#e6edf3"}
_LIGHT = {"figure.facecolor": "white", "axes.facecolor": "white", "text": "#1f2328"}


def save(path: Path, draw: Callable[[Any], Any], overwrite: bool = True) -> tuple[Path, Path]:
    """Draw for light pages into `path` and for dark ones into a file named `...-dark`.

    Args:
        draw: given matplotlib's pyplot, makes the figure.

    Raises:
        UserError: matplotlib is missing, or the files cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "pictures need matplotlib: install mlx-loop with its eval extra, pip install "
            "'mlx-loop[eval]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path} is not a picture's name: end it in .png, .svg or .pdf")
    dark = path.with_stem(f"{path.stem}-dark")
    for file, theme in ((path, _LIGHT), (dark, _DARK)):
        with pyplot.rc_context(_settings(theme)), whole_file(file, overwrite) as scratch:
            figure = draw(pyplot)
            figure.savefig(scratch, dpi=150)
            pyplot.close(figure)
    return path, dark


def _settings(theme: dict[str, str]) -> Any:
    text = theme["text"]
    names = "text.color axes.labelcolor axes.edgecolor axes.titlecolor grid.color xtick.color"
    colours = dict.fromkeys([*names.split(), "ytick.color"], text)
    return {
        **colours,
        "figure.facecolor": theme["figure.facecolor"],
        "savefig.facecolor": theme["figure.facecolor"],
        "axes.facecolor": theme["axes.facecolor"],
        "legend.facecolor": theme["axes.facecolor"],
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.prop_cycle": _cycle(),
    }


def _cycle() -> Any:
    from cycler import cycler

    return cycler(color=COLOURS)
