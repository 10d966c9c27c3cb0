"""`mlx_loop evaluate`: tasks under many loop settings, with honest statistics."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import INTERRUPTED, UserError
from .. import options
from ..fields import combinations
from ..options import add, axes_from, fraction, from_zero, load_with_start, positive, refuse

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "long-context and other tasks under many loop settings, with honest statistics"
EXAMPLES = """examples:
  mlx_loop evaluate --tasks ruler --lengths 4096,16384 --loops 1,2,3,4,6,8,12
  mlx_loop evaluate --tasks lm_eval:arc_challenge,lm_eval:gsm8k --loops 2,3 --holdout 0.5
  mlx_loop evaluate --tasks niah_single_1 --lengths 384 --limit 20 --loops 2,4 --no-answer-prefix
Every setting gets the same problems and is compared with the un-looped model problem by problem.
DIR/report.html shows the result. Ctrl-C stops after the batch at hand; the same command goes on.
docs/evaluation.md explains tasks, statistics and files."""

DEFAULT_TASKS = "niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,cwe,fwe"
DEFAULT_AXES: dict[str, list[Any]] = {"loops": [2, 3, 4, 6, 8, 12]}
LM_EVAL = "lm_eval:"


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("problems")
    what = (
        "RULER's tasks with commas between: niah_single_1 to _3, niah_multikey_1 to _3, "
        "niah_multivalue, niah_multiquery, vt, cwe, fwe, qa; ruler: all but qa; lm_eval:NAME: a "
        "task of lm-evaluation-harness"
    )
    add(group, "--tasks", what, str, "NAMES", DEFAULT_TASKS)
    what = "RULER: context lengths in tokens, prompt and answer together (default: 4096)"
    add(group, "--lengths", what, _lengths, "N,N,...")
    what = "problems of each task and length; RULER's paper has 500"
    add(group, "--limit", what, positive, "N", 100)
    add(group, "--seed", "RULER: of the problems (default: 42)", from_zero, "N")
    add(group, "--filler", "a text to hide needles in, else our own", str, "FILE")
    what = 'for qa: lines of {"question": TEXT, "answers": [...], "documents": [...]}'
    add(group, "--documents", what, str, "FILE")
    what = "do not give the model the beginning of its answer, as RULER does"
    add(group, "--no-answer-prefix", what)
    what = "a folder with lm-evaluation-harness tasks of yours"
    add(group, "--include-path", what, str, "DIR")
    group = parser.add_argument_group("results")
    what = "the folder of the study; what it holds is not done again"
    add(group, "--out", what, str, "DIR", "evaluation")
    what = "choose the best setting on a share 1 - P of the problems and report it on the rest"
    add(group, "--holdout", what, fraction, "P")
    what = "RULER: problems of each length on which drift is measured (default: 2)"
    add(group, "--trace", what, from_zero, "N")
    add(group, "--reference", "show the paper's numbers beside yours")
    options.add_model_options(parser)
    widths = ("float32", "float16", "bfloat16")
    add(parser, "--dtype", "of the weights, else as stored", str, choices=widths)
    options.add_loop_options(parser, several=True)
    group = parser.add_argument_group("generation")
    add(group, "--batch-size", "prompts that are answered at a time", positive, "N", 8)
    options.add_prefill_option(group)
    options.add_template_options(group)


def _lengths(text: str) -> list[int]:
    return [positive(length) for length in text.split(",")]


def _refuse_idle(args: argparse.Namespace, ours: list[str], theirs: list[str]) -> None:
    """Refuse options of RULER's tasks without any, and of the harness's without any."""
    if theirs:
        refuse(args, ("system_prompt",), "in lm_eval: tasks, which have their own prompts")
    else:
        refuse(args, ("include_path",), "without an lm_eval: task")
    if not ours:
        names = ["filler", "documents", "no_answer_prefix", "seed", "trace", "prefill_step_size"]
        if args.include_path is None and not any(t.startswith(("ruler", "niah")) for t in theirs):
            names.append("lengths")  # The harness's own RULER reads them too.
        refuse(args, tuple(names), "without one of RULER's tasks")


def parse_tasks(text: str) -> tuple[list[str], list[str]]:
    """RULER's tasks and lm-evaluation-harness's in `--tasks`.

    Raises:
        UserError: a name that neither is.
    """
    from ...measure.tasks import ruler

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
    _refuse_idle(args, ours, theirs)
    from ...checkpoints.loading import find
    from ...generation.prefill import prefill_step
    from ...measure.comparison import distinct
    from ...measure.drift import DRIFT, measure, traced
    from ...measure.report import conclusion, overall_rows, write
    from ...measure.study import RESULTS, Study, answer_all, examples, item_name
    from ...measure.sweep import Results
    from ...measure.tasks import ruler
    from ...measure.tasks.harness import Harness, answer_tasks
    from ..terminal import err, interruptible, out, progress_bar

    lengths = args.lengths or [4096]
    axes = axes_from(args) or DEFAULT_AXES
    study = Study(
        model=args.model,
        tasks=ours,
        lengths=lengths if ours else [],
        limit=args.limit,
        sources=ruler.Sources(_path(args.filler), _path(args.documents)),
        seed=ruler.SEED if args.seed is None else args.seed,
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
        lengths,
        str(find(args.model)),
        args.chat_template_config,
    )
    with interruptible() as stop, progress_bar() as progress:
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
        chosen = traced(problems, 2 if args.trace is None else args.trace)
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
    from ...measure.report import HEADER
    from ..terminal import plain_table

    table = plain_table(*HEADER, left=("verdict",))
    for row in rows:
        table.add_row(*row)
    return table


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
