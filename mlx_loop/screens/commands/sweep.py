"""`mlx_loop sweep`: windows, loop counts and integrators over a task or a text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ... import several
from ...errors import INTERRUPTED, UserError
from ...files import alone, check_file
from ...foreign import path_of
from ...settings import LoopConfig
from .. import options
from ..options import add, positive

if TYPE_CHECKING:
    from rich.console import Console

    from ...measure.outcome import Scores

SUMMARY = "try many loop settings on a task or a text"
EXAMPLES = """examples:
  mlx_loop sweep --task demo --limit 200 --plot sweep.png
  mlx_loop sweep --task mine.jsonl --window 3:7,4:8,5:9 --loops 2,4,8 --integrator euler,anchored
  mlx_loop sweep --task choices:arc_easy.jsonl,choices:openbookqa.jsonl --loops 2,3,4 --best
  mlx_loop sweep --text book.txt --loops 2,3,4
FILE.html beside the results shows them, with the answers that differ.
Ctrl-C keeps the results so far; the same command goes on from there."""

DEFAULT_AXES: dict[str, list[Any]] = {"loops": [2, 4], "integrator": ["euler", "anchored"]}
# What a score is called on the screen.
TITLES = {"right": "right, %"}
# What a task may be asked, and the option that says it.
ASKED = {
    "max_tokens": "max_tokens",
    "template": "chat_template_config",
    "system": "system_prompt",
    "batch": "batch_size",
    "step": "prefill_step_size",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_mutually_exclusive_group(required=True)
    what = (
        'questions, one JSON object a line with "messages" and "answer"; demo: those that ship '
        'with mlx_loop; choices:FILE: "question", "choices" and "answer"; chat_choices:FILE: the '
        "same through the chat template; KIND:FILE,KIND:FILE: several of one kind"
    )
    add(data, "--task", what, str, "FILE")
    add(data, "--text", "a text: loss and KL instead of answers", str, "FILE")
    what = "where results are appended; what it holds is not done again"
    add(parser, "--out", what, str, "FILE", "sweep.jsonl")
    add(parser, "--limit", "N items of each file, evenly spread; default: all", positive, "N")
    what = "choose on one half of the items, report on the other, print the LoopConfig to use"
    add(parser, "--best", what)
    options.add_plot(parser)
    options.add_max_tokens(parser, None, " (default: 64)")
    add(parser, "--batch-size", "questions at a time (default: 32; of choices 8)", positive, "N")
    options.add_prefill_option(parser)
    options.add_model_options(parser)
    options.add_loop_options(parser, several=True)
    options.add_template_options(parser)


def run(args: argparse.Namespace) -> int:
    from ...measure.outcome import best, conclusion, held_out, outcomes, said_held_out
    from ...measure.plots import check, save
    from ...measure.results import Results, fingerprint
    from ...measure.study import complete, gather
    from ...measure.sweep_report import drawing, means, page_of, write
    from ...measure.tasks import FROM_FILES, files_of, kind_of, read_tasks, split_names
    from ..measuring import load_views, measuring
    from ..terminal import command_line, err, out

    names = [f"text:{args.text}"] if args.task is None else split_names(args.task)
    of_kind = kind_of(names)
    kind = FROM_FILES[of_kind]
    unread = tuple(option for name, option in ASKED.items() if name not in kind.reads)
    options.refuse(args, unread, "with --text" if args.text else f"with --task {of_kind}:FILE")
    if of_kind == "text":
        options.refuse(args, options.OF_ANSWERS, "with a text, all of which loops as a prompt does")
    if args.best and kind.no_choice:
        raise UserError(f"--best needs a --task: {kind.no_choice}")
    asked = {name: getattr(args, option) for name, option in ASKED.items() if name in kind.reads}
    if "step" in kind.reads:
        asked["step"] = options.prefill_step_from(args)
    asked = {name: value for name, value in asked.items() if value is not None}
    data = [fingerprint(path) for path in files_of(names)]
    out_file = path_of(args.out)
    several.from_first(lambda: check_file(out_file))
    # A place that is none has no page.
    several.from_first(lambda: check_file(page_of(out_file)))
    if args.plot is not None:
        several.from_first(lambda: check(path_of(args.plot)))
    views, tokenizer = load_views(args, DEFAULT_AXES)
    task = read_tasks(names, tokenizer, args.limit, **asked)
    header = {
        "model": args.model,
        "adapter": args.adapter_path,
        "dtype": args.dtype,
        "data": data[0] if len(data) == 1 else data,
        **{name: getattr(task, name, None) for name in ASKED},
        "measure": "task" if of_kind == "questions" else of_kind,
    }
    with several.held_by_first(lambda: alone(out_file)), measuring() as (_, measure):
        results = Results.open(out_file, header)
        finished = measure(f"{len(views)} settings", views, tokenizer, task, results)
    if not several.is_first():
        return 0 if finished else INTERRUPTED
    items = complete(views, task, results)
    if not finished:
        err.print(
            f"stopped after {len(items)} of {len(task.items)} items; the same command goes on",
            style="yellow",
        )
    if not items:
        return INTERRUPTED
    scores = replace(gather(views, task, results), header=header)
    others = {score.title: gather(views, task, results, score) for score in task.beside}
    show = err if args.best else out
    _show(
        show,
        [TITLES.get(task.score, task.score), *task.also],
        scores,
        others,
        means(views, task, results),
        len(views[0].layers),
    )
    found = outcomes(scores)
    show.print(conclusion(found, len(items)))
    if task.no_choice is not None:
        show.print(f"No setting is recommended: {task.no_choice}.")
    elif best(found) is not None and not args.best:
        show.print("The best of many looks better than it is: --best confirms it on other items.")
    if args.plot is not None:
        files = save(path_of(args.plot), drawing(scores, task))
        err.print(f"drawn in {files[0]} and, for dark pages, {files[1]}")
    held = held_out(scores, 0.5) if args.best else None
    chosen = said_held_out(held, others, 0.5) if args.best else []
    for line in chosen:
        show.print(line)
    if finished:  # A page with its picture would take its time after Ctrl-C.
        page = write(out_file, scores, others, views, task, results, command_line(), chosen)
        err.print(f"the whole report: {page}", soft_wrap=True)
    if args.best:
        won = held is not None and held.winner.verdict == "better"
        print(python(held.winner.loop if held and won else None))
    return 0 if finished else INTERRUPTED


def _show(
    show: Console,
    titles: Sequence[str],
    scores: Scores,
    others: Mapping[str, Scores],
    more: Sequence[Sequence[str]],
    layers: int,
) -> None:
    """Tables of the score, of the other ones, and of each file.

    Args:
        titles: of the score, and of `more`: more columns, for each setting.
    """
    from ...measure.outcome import HEADER, outcomes, rows
    from ...measure.report import by
    from ..measuring import table

    every = zip(rows(outcomes(scores), layers), more, strict=True)
    cells = [[*row, *last] for row, last in every]
    score, *also = titles
    show.print(table([*HEADER[:2], score, *HEADER[3:], *map(str.upper, also)], cells))
    for title, of in others.items():
        show.print(f"\n{title}, {of.unit}", table(HEADER, rows(outcomes(of), layers)))
    files = {name: [p for p in scores.problems if p[0] == name] for name in scores.tasks()}
    if len(files) > 1:
        shown = by(scores, files)
        show.print(f"\n{score}, by file", table(shown.header, shown.rows))


def python(loop: LoopConfig | None) -> str:
    """The settings as an expression of Python; the un-looped model is one loop."""
    if loop is None:
        return "LoopConfig(loops=1)"
    given = {field.name: getattr(loop, field.name) for field in fields(loop)}
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    return f"LoopConfig({shown})"
