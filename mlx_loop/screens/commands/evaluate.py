"""`mlx_loop evaluate`: tasks under many loop settings, with honest statistics."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ...checkpoints.loading import find
from ...errors import INTERRUPTED, UserError
from ...generation.prefill import prefill_step
from ...measure.comparison import distinct
from ...measure.drift import DRIFT, measure, traced
from ...measure.report import HEADER, conclusion, overall_rows, write
from ...measure.study import RESULTS, Study, answer_all, examples, item_name
from ...measure.sweep import Results
from ...measure.tasks import ruler
from ...measure.tasks.harness import Harness, answer_tasks
from ..options import axes_from, combinations, load_with_start
from ..terminal import err, interruptible, out

DEFAULT_AXES: dict[str, list[Any]] = {"loops": [2, 3, 4, 6, 8, 12]}
LM_EVAL = "lm_eval:"


def parse_tasks(text: str) -> tuple[list[str], list[str]]:
    """RULER's tasks and lm-evaluation-harness's in `--tasks`.

    Raises:
        UserError: a name that neither is.
    """
    ours: list[str] = []
    theirs: list[str] = []
    for name in filter(None, map(str.strip, text.split(","))):
        if name.startswith(LM_EVAL):
            theirs.append(name.removeprefix(LM_EVAL))
        elif name == "ruler":
            ours += [task for task in ruler.TASKS if task != "qa"]
        elif name in ruler.TASKS:
            ours.append(name)
        else:
            raise UserError(
                f"unknown task {name!r}: known are ruler, {', '.join(ruler.TASKS)}, and "
                f"{LM_EVAL}NAME for the tasks of lm-evaluation-harness"
            )
    if not ours and not theirs:
        raise UserError("there is no task: give --tasks niah_single_2,vt or --tasks ruler")
    return list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))


def run(args: argparse.Namespace) -> int:
    ours, theirs = parse_tasks(args.tasks)
    axes = axes_from(args) or DEFAULT_AXES
    study = Study(
        model=args.model,
        tasks=ours,
        lengths=args.lengths if ours else [],
        limit=args.limit,
        sources=ruler.Sources(_path(args.filler), _path(args.documents)),
        seed=args.seed,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        answer_prefix=not args.no_answer_prefix,
        system_prompt=args.system_prompt,
        template=args.chat_template_config,
        batch_size=args.batch_size,
        prefill_step_size=args.prefill_step_size or prefill_step(None),
    )
    folder = Path(args.out).expanduser()
    with err.status(f"loading {args.model}"):
        model, tokenizer, start = load_with_start(args)
    views = distinct(model, combinations(start, axes))
    if len(views) < 2:
        raise UserError("there is no looped setting to compare: give --loops 2 or more")
    harness = Harness(
        theirs,
        _path(args.include_path),
        args.limit,
        args.batch_size,
        args.lengths,
        str(find(args.model)),
        args.chat_template_config,
    )
    with interruptible() as stop, _progress() as progress:
        total = len(study.cells()) * study.limit
        bar = progress.add_task("making problems", total=total)
        problems = examples(study, tokenizer, folder, lambda: progress.advance(bar))
        progress.remove_task(bar)
        results = Results.open(folder / RESULTS, study.header())
        names = [{"item": item_name(e.task, e.length, e.index)} for e in problems]
        done = sum(results.has(view.loop, name) for view in views for name in names)
        title = f"{len(views)} settings"
        bar = progress.add_task(title, total=len(views) * len(problems), completed=done)

        def advance(count: int) -> bool:
            progress.advance(bar, count)
            return not stop.is_set()

        finished = answer_all(views, tokenizer, study, problems, results, advance)
        chosen = traced(problems, args.trace)
        if finished and theirs:
            bar = progress.add_task("lm-eval tasks", total=len(theirs) * len(views))
            finished = answer_tasks(views, tokenizer, harness, results, advance)
        if finished and chosen:
            drift = Results.open(folder / DRIFT, study.header())
            bar = progress.add_task("tracing", total=len(chosen) * (len(views) - 1))
            finished = measure(views, tokenizer, study, chosen, drift, advance)
    if not finished:
        err.print("stopped; the same command goes on from here", style="yellow")
    scores, page = write(folder, len(model.layers), args.holdout, args.reference)
    out.print(_table(overall_rows(scores, len(model.layers))))
    out.print(conclusion(scores))
    err.print(f"the whole report: {page}", markup=False, soft_wrap=True)
    return 0 if finished else INTERRUPTED


def _table(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("setting", "verdict") else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
