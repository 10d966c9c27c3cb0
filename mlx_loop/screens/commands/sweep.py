"""`mlx_loop sweep`: windows, loop counts and integrators over a task or a text."""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import INTERRUPTED
from ...settings import LoopConfig
from .. import options
from ..options import add, positive

SUMMARY = "try many loop settings on a task or a text"
EXAMPLES = """examples:
  mlx_loop sweep --task demo --limit 200 --plot sweep.png
  mlx_loop sweep --task mine.jsonl --window 3:7,4:8,5:9 --loops 2,4,8 --integrator euler,anchored
  mlx_loop sweep --text book.txt --loops 2,3,4 --best
Ctrl-C stops after the results at hand are written; the same command goes on from there."""

DEFAULT_AXES: dict[str, list[Any]] = {"loops": [2, 4], "integrator": ["euler", "anchored"]}
# What a score is called on the screen.
TITLES = {"right": "right, %"}


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
    from ...measure.outcome import HEADER, best, conclusion, outcomes, rows
    from ...measure.plots import draw_windows, save
    from ...measure.results import Results, fingerprint
    from ...measure.study import complete, gather
    from ...measure.tasks import FROM_FILES, split_name
    from ...measure.tasks.questions import QUESTIONS
    from ..measuring import load_views, measuring, table
    from ..terminal import err, out

    if args.text is not None:
        of_tasks = ("max_tokens", "batch_size", "system_prompt", "chat_template_config")
        options.refuse(args, of_tasks, "with --text")
    kind, file = split_name(args.task) if args.task else ("text", args.text)
    path = QUESTIONS if args.task == "demo" else Path(file).expanduser()
    asked = {
        "max_tokens": args.max_tokens or 64,
        "template": args.chat_template_config,
        "system": args.system_prompt,
    }
    data = fingerprint(path)
    views, tokenizer = load_views(args, DEFAULT_AXES)
    task = FROM_FILES[kind].read(path, tokenizer, args.limit, **asked, batch=args.batch_size or 32)
    header = {
        "model": args.model,
        "adapter": args.adapter_path,
        "data": data,
        **dict.fromkeys(("max_tokens", "template", "system"), None),
        **({} if kind == "text" else asked),
        "measure": "task" if kind == "questions" else kind,
    }
    results = Results.open(Path(args.out).expanduser(), header)
    with measuring() as (_, measure):
        finished = measure(f"{len(views)} settings", views, tokenizer, task, results)
    items = complete(views, task, results)
    if not finished:
        err.print(
            f"stopped after {len(items)} of {len(task.items)} items; the same command goes on",
            style="yellow",
        )
    if not items:
        return INTERRUPTED
    found = outcomes(gather(views, task, results))
    winner = best(found)
    cells = rows(found, len(views[0].layers))
    for name in task.also:
        for view, row in zip(views, cells, strict=True):
            mean = sum(results.of(view.loop, item)[name] for item in items) / len(items)
            row.append(f"{mean:.2g}")
    columns = ["setting", "cost", TITLES.get(task.score, task.score), *HEADER[3:]]
    show = err if args.best else out
    show.print(table([*columns, *map(str.upper, task.also)], cells))
    show.print(conclusion(found, len(items)))
    if winner is not None:
        show.print("The best of many looks better than it is: confirm it on other items.")
    if task.score == "loss":
        show.print("A lower loss does not promise better answers.", style="dim")
    if args.plot is not None:
        what = "right answers" if task.score == "right" else task.score
        draw = partial(draw_windows, found, f"{args.model}: {what}")
        files = save(Path(args.plot).expanduser(), draw)
        err.print(f"drawn in {files[0]} and, for dark pages, {files[1]}", markup=False)
    if args.best:
        print(python(None if winner is None else winner.loop))
    return 0 if finished else INTERRUPTED


def python(loop: LoopConfig | None) -> str:
    """The settings as an expression of Python; the un-looped model is one loop."""
    if loop is None:
        return "LoopConfig(loops=1)"
    given = {field.name: getattr(loop, field.name) for field in fields(loop)}
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    return f"LoopConfig({shown})"
