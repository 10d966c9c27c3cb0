"""Pictures of scores, for light pages and for dark ones. Needs the `eval` extra."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import check_file, whole_file
from ..foreign import visible
from ..settings import interval, pairs
from .names import names
from .outcome import Outcome, Scores, outcomes

if TYPE_CHECKING:
    from .comparison import Measures
    from .trace import Loop, State, Trace

# Okabe and Ito's colours, which colour-blind readers can tell apart, less the pale and the black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_DARK = {"figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117", "text": "#e6edf3"}
_LIGHT = {"figure.facecolor": "white", "axes.facecolor": "white", "text": "#1f2328"}


def check_matplotlib() -> None:
    """Refuse what needs matplotlib where it is missing.

    Raises:
        UserError: it is.
    """
    if find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib: pip install matplotlib")


def check(path: Path, overwrite: bool = True) -> Path:
    """The name of the picture for dark pages, `...-dark`.

    Raises:
        UserError: matplotlib is missing, or `path` is not a name that a picture can have.
    """
    check_matplotlib()
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path} is not a picture's name: end it in .png, .svg or .pdf")
    dark = path.with_stem(f"{path.stem}-dark")
    for file in (path, dark):
        check_file(file, overwrite)
    return dark


def save(path: Path, draw: Callable[[Any], Any], overwrite: bool = True) -> tuple[Path, Path]:
    """Draw for light pages into `path` and for dark ones into a file named `...-dark`.

    Args:
        draw: given what is like matplotlib's pyplot, makes the figure.

    Raises:
        UserError: as `check`, or the files cannot be written.
    """
    dark = check(path, overwrite)
    canvas = _canvas()
    for file, theme in ((path, _LIGHT), (dark, _DARK)):
        with canvas.rc_context(_settings(theme)), whole_file(file, overwrite) as scratch:
            draw(canvas).savefig(scratch, dpi=150)
    return path, dark


def figure(draw: Callable[[Any], Any]) -> Any:
    """A matplotlib figure for light pages: a notebook shows it, `savefig` writes it.

    Args:
        draw: as in `save`.

    Raises:
        UserError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib import pyplot  # With it a notebook knows how to show figures.

    with pyplot.rc_context(_settings(_LIGHT)):
        drawn = draw(pyplot)
        pyplot.close(drawn)  # Else a notebook shows it twice.
    return drawn


def _canvas() -> Any:
    """What `draw` needs of pyplot, with no screen behind it and the caller's as it was."""
    import matplotlib
    from matplotlib.figure import Figure

    def subplots(*shape: int, figsize: Any, layout: str, **more: Any) -> tuple[Any, Any]:
        sheet = Figure(figsize=figsize, layout=layout)  # type: ignore[arg-type]
        return sheet, sheet.subplots(*shape, **more)

    return SimpleNamespace(
        subplots=subplots, rcParams=matplotlib.rcParams, rc_context=matplotlib.rc_context
    )


def words(text: str) -> str:
    """A text as it stands in a picture, where `$` would begin a formula."""
    return visible(text).replace("$", r"\$")


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


# --- What is drawn ---


def groups(found: Sequence[Outcome], *apart: str) -> dict[str, list[Outcome]]:
    """Looped settings that differ in these fields alone, by name; K ascending."""
    looped = sorted((outcome for outcome in found if outcome.loop), key=_loops)
    unset: Any = dict.fromkeys(apart)
    kinds = [replace(o.loop, **unset) for o in looped if o.loop is not None]
    unique = list(dict.fromkeys(kinds))
    titles = dict(zip(unique, names(unique), strict=True))
    members: dict[str, list[Outcome]] = {}
    for kind, outcome in zip(kinds, looped, strict=True):
        members.setdefault(titles[kind], []).append(outcome)
    return members


def draw_accuracy(scores: Scores, pyplot: Any) -> Any:
    """Score over K with 95 % intervals, a line for each kind of setting."""
    figure, axes = pyplot.subplots(figsize=(6.5, 3.8), layout="constrained")
    found = outcomes(scores)
    members = groups(found, "loops")
    for offset, (name, line) in enumerate(members.items()):
        # Side by side, so that intervals do not hide each other.
        shift = 0.06 * (offset - (len(members) - 1) / 2)
        _line(axes, line, [(o.mean, *o.interval) for o in line], name, 100, shift)
    plain, (low, high) = 100 * found[0].mean, found[0].interval
    colour = pyplot.rcParams["text.color"]
    axes.axhline(plain, linestyle="--", linewidth=1, color=colour, label="no loop")
    axes.axhspan(100 * low, 100 * high, color=colour, alpha=0.08, linewidth=0)
    axes.set_xticks(sorted({_loops(outcome) for outcome in found[1:]}))
    axes.set(xlabel="loops K", ylabel="score, %, 95 % interval", ylim=(-2, 102))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{words(str(scores.header['model']))}, {len(scores.problems)} problems")
    return figure


def draw_lengths(scores: Scores, pyplot: Any) -> Any:
    """Change against no looping in points, a map of context length x K for each kind."""
    members, lengths = groups(outcomes(scores), "loops"), scores.lengths()
    widths = [max(len(line), 1.6) for line in members.values()]
    figure, axes = pyplot.subplots(
        1,
        len(members),
        figsize=(max(1.5 + 0.5 * sum(widths) + 0.3 * len(members), 5), 1.5 + 0.5 * len(lengths)),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    parts = [scores.of(lambda p, n=n: p[1] == n) for n in lengths]  # type: ignore[misc]
    changes = [
        dict(zip(part.settings, (part.values - part.values[0]).mean(axis=1), strict=True))
        for part in parts
    ]
    for axis, (name, line) in zip(axes[0], members.items(), strict=True):
        grid = [[100 * float(change[outcome.loop]) for outcome in line] for change in changes]
        texts = [[f"{change:+.0f}" for change in row] for row in grid]
        image = _heat(axis, grid, texts, 100, [_loops(o) for o in line], lengths)
        axis.set_title(name.replace(", ", "\n"), fontsize=8)
    axes[0][0].set_ylabel("context, tokens")
    figure.colorbar(image, ax=axes[0].tolist(), label="change, points")
    return figure


def draw_windows(found: Sequence[Outcome], title: str, pyplot: Any) -> Any:
    """Windows x loops as a heat map, and the change over loops with its interval as lines."""
    in_points = found[0].unit == "%"
    unit, scale = ("points", 100) if in_points else (f"{found[0].unit} per token", 1)
    members = groups(found, "window", "loops")
    figure, axes = pyplot.subplots(
        2,
        len(members),
        figsize=(max(3.4 * len(members), 5), 6),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    most = max(abs(outcome.change) * scale for outcome in found) or 1
    for column, (name, group) in enumerate(members.items()):
        windows = sorted({o.loop.window for o in group if o.loop}, key=pairs)
        loops = sorted({_loops(outcome) for outcome in group})
        grid = [[float("nan")] * len(loops) for _ in windows]
        texts = [[""] * len(loops) for _ in windows]
        for outcome in group:
            assert outcome.loop is not None
            y, x = windows.index(outcome.loop.window), loops.index(outcome.loop.loops)
            grid[y][x] = outcome.change * scale
            mark = "*" if outcome.is_distinguishable else ""
            texts[y][x] = f"{grid[y][x]:+.{1 if in_points else 3}f}{mark}"
        heat, lines = axes[0, column], axes[1, column]
        shown = [interval(window) for window in windows]
        colours = "RdBu" if found[0].better > 0 else "RdBu_r"
        image = _heat(heat, grid, texts, most, loops, shown, colours)
        heat.set_title(name)
        for window, label in zip(windows, shown, strict=True):
            line = [o for o in group if o.loop and o.loop.window == window]
            _line(lines, line, [(o.change, *o.change_interval) for o in line], label, scale)
        lines.axhline(0, linewidth=0.8, linestyle="--", color=pyplot.rcParams["text.color"])
        lines.set(xlabel="loops K")
        lines.set_xticks(loops)
        if len(windows) > 1:
            lines.legend(title="window", frameon=False)
    axes[0, 0].set_ylabel("window")
    axes[1, 0].set_ylabel(f"change, {unit}, 95 % interval")
    figure.colorbar(image, ax=axes[0, :].tolist(), label=f"change, {unit}")
    figure.suptitle(f"{words(title)} against no looping (* distinguishable)")
    return figure


def draw_comparison(
    settings: Sequence[str], measures: Sequence[Sequence[Measures]], pyplot: Any
) -> Any:
    """How far each setting is from the un-looped answer; a dot for each prompt."""
    panels = {
        "KL to the un-looped model, mean, nats": lambda m: m.mean_kl,
        "the same token first, %": lambda m: 100 * m.agreement,
    }
    figure, axes = pyplot.subplots(
        1, 2, figsize=(8, 1.2 + 0.3 * len(settings)), layout="constrained", sharey=True
    )
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for row, of_setting in enumerate(measures):
            axis.scatter([value(one) for one in of_setting], [row] * len(of_setting), alpha=0.6)
        axis.set_title(title)
    axes[0].set_yticks(range(len(settings)), settings)
    axes[0].invert_yaxis()
    return figure


def draw_trace(traced: Trace, pyplot: Any) -> Any:
    """Residual, contraction, norm and lens KL over the passes: the median token, and of a
    single loop the middle 80 %.
    """
    figure, axes = pyplot.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
    panels = {
        "residual |g(x) - x| / |g(x0)|": lambda loop: [p.residual for p in loop.passes],
        "contraction |g(x) - g(x')| / |x - x'|": lambda loop: [p.contraction for p in loop.passes],
        "norm of the state / natural pass": lambda loop: [s.norm for s in _states(loop)],
        "KL of the logit lens to the natural pass": lambda loop: [s.lens_kl for s in _states(loop)],
    }
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
        for loop in traced.loops:
            alone = len(traced.loops) == 1
            _band(axis, values(loop), "median token" if alone else loop.where, alone)
        passes = len(traced.loops[0].passes)
        axis.set_title(title)
        axis.set_xticks(range(1, passes + 2), [*map(str, range(1, passes + 1)), "result"])
        axis.set_xlim(0.8, passes + 1.2)
    for axis in (axes[0, 1], axes[1, 0]):
        axis.axhline(1, linewidth=0.8, linestyle="--", color=pyplot.rcParams["text.color"])
    for axis in axes[1]:
        axis.set_xlabel("before pass")
    labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{traced.loop}: {traced.verdict}, {len(traced.tokens)} tokens")
    return figure


def _states(loop: Loop) -> list[State]:
    return [*(one.before for one in loop.passes), loop.result]


def _band(axis: Any, values: Sequence[Sequence[float]], label: str, band: bool) -> None:
    numbers, bands = [], []
    for number, tokens in enumerate(values, start=1):
        known = [value for value in tokens if math.isfinite(value)]
        if known:
            low, *_, high = statistics.quantiles(known, n=10) if len(known) > 1 else known * 2
            numbers.append(number)
            bands.append((low, statistics.median(known), high))
    if numbers:
        lows, medians, highs = zip(*bands, strict=True)
        (line,) = axis.plot(numbers, medians, marker="o", markersize=4, label=label)
        if band:
            colour, label = line.get_color(), "middle 80 % of tokens"
            axis.fill_between(
                numbers, lows, highs, alpha=0.2, color=colour, linewidth=0, label=label
            )


def _loops(outcome: Outcome) -> int:
    return outcome.loop.loops if outcome.loop else 1


def _line(
    axes: Any,
    line: Sequence[Outcome],
    values: Sequence[tuple[float, float, float]],
    label: str,
    scale: float,
    shift: float = 0.0,
) -> None:
    """Values over K; each with its interval, which is left out where it has no bounds."""
    scaled = [tuple(scale * x if math.isfinite(x) else math.nan for x in of) for of in values]
    middles, lows, highs = zip(*scaled, strict=True)
    axes.errorbar(
        [_loops(outcome) + shift for outcome in line],
        middles,
        (
            [m - low for m, low in zip(middles, lows, strict=True)],
            [high - m for m, high in zip(middles, highs, strict=True)],
        ),
        marker="o",
        markersize=4,
        capsize=3,
        label=label,
    )


def _heat(
    axes: Any,
    grid: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    most: float,
    columns: Sequence[Any],
    rows: Sequence[Any],
    colours: str = "RdBu",
) -> Any:
    """A map of numbers from -most to most over K, with texts on it."""
    image = axes.imshow(grid, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            colour = "white" if abs(grid[y][x]) > 0.6 * most else "black"
            axes.text(x, y, text, ha="center", va="center", color=colour)
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="loops K")
    return image
