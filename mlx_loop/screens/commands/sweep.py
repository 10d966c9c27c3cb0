"""`mlx_loop sweep`: windows, loop counts and integrators over a task or a text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import INTERRUPTED, UserError
from ...settings import LoopConfig
from .. import options
from ..fields import combinations
from ..options import add, axes_from, load_with_start, positive

if TYPE_CHECKING:
    from rich.table import Table

    from ...measure.sweep import Summary, Task, Text

SUMMARY = "try many loop settings on a task or a text"
EXAMPLES = """examples:
  mlx_loop sweep --task demo --limit 200 --plot sweep.png
  mlx_loop sweep --task mine.jsonl --window 3:7,4:8,5:9 --loops 2,4,8 --integrator euler,anchored
  mlx_loop sweep --text book.txt --loops 2,3,4 --best
Ctrl-C stops after the results at hand are written; the same command goes on from there."""

DEFAULT_AXES: dict[str, list[Any]] = {"loops": [2, 4], "integrator": ["euler", "anchored"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_mutually_exclusive_group(required=True)
    what = (
        'questions, one JSON object a line with "messages" and "answer"; demo: those that ship '
        "with mlx_loop"
    )
    add(data, "--task", what, str, "FILE")
    add(data, "--text", "a text: loss and KL instead of answers", str, "FILE")
    what = "where results are appended; what it holds is not done again"
    add(parser, "--out", what, str, "FILE", "sweep.jsonl")
    add(parser, "--limit", "N items, evenly spread; default: all", positive, "N")
    add(parser, "--best", "print the LoopConfig to use")
    options.add_plot(parser)
    options.add_max_tokens(parser, None, " (default: 64)")
    add(parser, "--batch-size", "questions answered at a time (default: 32)", positive, "N")
    options.add_model_options(parser)
    options.add_loop_options(parser, several=True)
    options.add_template_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.text is not None:
        of_tasks = ("max_tokens", "batch_size", "system_prompt", "chat_template_config")
        options.refuse(args, of_tasks, "with --text")
    from ...measure.comparison import distinct
    from ...measure.plots import save
    from ...measure.sweep import (
        QUESTIONS,
        Results,
        Task,
        Text,
        best,
        complete,
        conclusion,
        fingerprint,
        read_task,
        read_text,
        summarise,
        sweep,
    )
    from ..terminal import err, interruptible, out, progress_bar

    axes = axes_from(args) or DEFAULT_AXES
    is_task = args.task is not None
    path = QUESTIONS if args.task == "demo" else Path(args.task or args.text).expanduser()
    items = read_task(path, args.limit) if is_task else []
    header = {
        "model": args.model,
        "adapter": args.adapter_path,
        "data": fingerprint(path),
        "max_tokens": (args.max_tokens or 64) if is_task else None,
        "template": args.chat_template_config if is_task else None,
        "measure": "task" if is_task else "text",
    }
    results = Results.open(Path(args.out).expanduser(), header)
    with err.status(f"loading {args.model}"):
        model, tokenizer, start = load_with_start(args)
    views = distinct(model, combinations(start, axes))
    if len(views) < 2:
        raise UserError("there is no looped setting to compare: give --loops 2 or more")
    work: Task | Text
    if is_task:
        if not tokenizer.has_chat_template:
            raise UserError("--task needs a model with a chat template; --text works with any")
        work = Task(
            items,
            args.max_tokens or 64,
            args.chat_template_config,
            args.system_prompt,
            args.batch_size or 32,
        )
    else:
        work = Text(read_text(path, tokenizer, args.limit))
    total = len(views) * len(work.items)
    done = sum(results.has(view.loop, item) for view in views for item in work.items)
    with interruptible() as stop, progress_bar("results,") as progress:
        bar = progress.add_task(f"{len(views)} settings", total=total, completed=done)

        def advance(count: int) -> bool:
            progress.advance(bar, count)
            return not stop.is_set()

        finished = sweep(views, tokenizer, work, results, advance)
    count = len(complete(views, work, results))
    if not finished:
        err.print(
            f"stopped after {count} of {len(work.items)} items; the same command goes on",
            style="yellow",
        )
    if not count:
        return INTERRUPTED
    summaries = summarise(views, work, results)
    show = err if args.best else out
    show.print(_table(summaries, work))
    show.print(conclusion(summaries, work.better, count))
    if not is_task:
        show.print("A lower loss does not promise better answers.", style="dim")
    if args.plot is not None:
        files = save(
            Path(args.plot).expanduser(), lambda pyplot: draw(pyplot, summaries, work, args.model)
        )
        err.print(f"drawn in {files[0]} and, for dark pages, {files[1]}", markup=False)
    if args.best:
        winner = best(summaries, work.better)
        print(python(None if winner is None else winner.loop))
    return 0 if finished else INTERRUPTED


def python(loop: LoopConfig | None) -> str:
    """The settings as an expression of Python; the un-looped model is one loop."""
    if loop is None:
        return "LoopConfig(loops=1)"
    given = {field.name: getattr(loop, field.name) for field in fields(loop)}
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    return f"LoopConfig({shown})"


# --- Table ---


def _table(summaries: Sequence[Summary], work: Task | Text) -> Table:
    from ..terminal import describe, plain_table

    is_task = work.better > 0
    names = ("right, %",) if is_task else ("loss",)
    kl = () if is_task else ("KL",)
    table = plain_table("setting", "cost", *names, "against no looping", "p", *kl)
    for summary in summaries:
        cells = [
            describe(summary.loop) if summary.loop else "no loop",
            f"+{summary.cost:.0%}",
            _interval(summary.mean, summary.interval, is_task, ""),
        ]
        if summary.loop is not None:
            cells += [
                _interval(summary.change, summary.change_interval, is_task, "+"),
                f"{summary.p:.2g}{' *' if summary.is_distinguishable else ''}",
            ]
            if summary.kl is not None:
                cells.append(f"{summary.kl:.2g}")
        table.add_row(*cells)
    return table


def _interval(mean: float, interval: tuple[float, float], is_task: bool, sign: str) -> str:
    form = f"{{:{sign}.1f}}" if is_task else f"{{:{sign}.4f}}"
    middle, low, high = (form.format(x * (100 if is_task else 1)) for x in (mean, *interval))
    return f"{middle} [{low}, {high}]"


# --- Picture ---


def draw(pyplot: Any, summaries: Sequence[Summary], work: Task | Text, name: str) -> Any:
    """Windows x loops as a heat map, and the change over loops with its interval as lines."""
    is_task = work.better > 0
    unit = "points" if is_task else "nats per token"
    scale = 100 if is_task else 1
    groups = _groups(summaries[1:])
    figure, axes = pyplot.subplots(
        2,
        len(groups),
        figsize=(max(3.4 * len(groups), 5), 6),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    most = max((abs(s.change) * scale for s in summaries), default=0) or 1
    for column, (title, group) in enumerate(groups.items()):
        windows = sorted({s.loop.window for s in group if s.loop})
        loops = sorted({s.loop.loops for s in group if s.loop})
        heat, lines = axes[0, column], axes[1, column]
        grid = [[float("nan")] * len(loops) for _ in windows]
        for s in group:
            assert s.loop is not None
            y, x = windows.index(s.loop.window), loops.index(s.loop.loops)
            grid[y][x] = s.change * scale
            text = f"{s.change * scale:+.1f}" if is_task else f"{s.change:+.3f}"
            dark = abs(grid[y][x]) > 0.6 * most
            heat.text(
                x,
                y,
                text + ("*" if s.is_distinguishable else ""),
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
        colours = "RdBu" if work.better > 0 else "RdBu_r"
        image = heat.imshow(grid, cmap=colours, vmin=-most, vmax=most, aspect="auto")
        heat.grid(False)
        heat.set_xticks(range(len(loops)), loops)
        heat.set_yticks(range(len(windows)), [f"[{a},{b})" for a, b in windows])
        heat.set(title=title, xlabel="loops K")
        for window in windows:
            line = sorted(
                (s for s in group if s.loop and s.loop.window == window),
                key=lambda s: s.loop.loops if s.loop else 0,
            )
            means = [s.change * scale for s in line]
            below = [m - s.change_interval[0] * scale for m, s in zip(means, line, strict=True)]
            above = [s.change_interval[1] * scale - m for m, s in zip(means, line, strict=True)]
            lines.errorbar(
                [s.loop.loops for s in line if s.loop],
                means,
                (below, above),
                marker="o",
                markersize=4,
                capsize=3,
                label=f"[{window[0]},{window[1]})",
            )
        lines.axhline(0, linewidth=0.8, linestyle="--", color=pyplot.rcParams["text.color"])
        lines.set(xlabel="loops K")
        lines.set_xticks(loops)
        if len(windows) > 1:
            lines.legend(title="window", frameon=False)
    axes[0, 0].set_ylabel("window")
    axes[1, 0].set_ylabel(f"change, {unit}, 95 % interval")
    figure.colorbar(image, ax=axes[0, :].tolist(), label=f"change, {unit}")
    what = "right answers" if is_task else "loss"
    figure.suptitle(f"{name}: {what} against no looping (* distinguishable)")
    return figure


def _groups(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """By everything but window and loops: an integrator, or whatever else was swept."""
    from ..board import titles

    rest = [replace(s.loop, window=None, loops=None) for s in summaries if s.loop]
    kinds = list(dict.fromkeys(rest))
    names = titles(kinds) if len(kinds) > 1 else [str(summaries[0].loop.integrator)]  # type: ignore[union-attr]
    groups: dict[str, list[Summary]] = {}
    for kind, summary in zip(rest, summaries, strict=True):
        groups.setdefault(names[kinds.index(kind)], []).append(summary)
    return groups
