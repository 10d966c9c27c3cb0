"""`mlx_loop evaluate`: tasks under many loop settings, with honest statistics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ... import several
from ...errors import INTERRUPTED, UserError
from ...files import check_file
from ...foreign import path_of
from .. import options
from ..options import add, fraction, from_zero, positive, refuse

SUMMARY = "long-context and other tasks under many loop settings, with honest statistics"
EXAMPLES = """examples:
  mlx_loop evaluate --tasks ruler --lengths 4096,16384 --loops 1,2,3,4,6,8,12
  mlx_loop evaluate --tasks lm_eval:arc_challenge,lm_eval:gsm8k --loops 2,3 --holdout 0.5
  mlx_loop evaluate --tasks niah_single_1 --lengths 384 --limit 20 --loops 2,4 --no-answer-prefix
Every setting gets the same problems and is compared with the un-looped model
problem by problem. DIR/report.html shows the result. Ctrl-C keeps the answers
so far; the same command goes on.
docs/evaluation.md explains tasks, statistics and files."""

DEFAULT_TASKS = "niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,cwe,fwe"
DEFAULT_AXES: dict[str, list[Any]] = {"loops": [2, 3, 4, 6, 8, 12]}


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("problems")
    what = (
        "RULER's tasks with commas between: niah_single_1 to _3, niah_multikey_1 to _3, "
        "niah_multivalue, niah_multiquery, vt, cwe, fwe, qa; ruler: all but qa; lm_eval:NAME: a "
        "task of lm-evaluation-harness; questions:FILE, choices:FILE, chat_choices:FILE: as in "
        "sweep"
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
    options.add_loop_options(parser, several=True)
    group = parser.add_argument_group("generation")
    add(group, "--batch-size", "prompts that are answered at a time", positive, "N", 8)
    options.add_prefill_option(group)
    options.add_template_options(group)


def _lengths(text: str) -> list[int]:
    return [positive(length) for length in text.split(",")]


def _refuse_idle(
    args: argparse.Namespace, ours: list[str], theirs: list[str], files: list[str]
) -> None:
    """Refuse options of RULER's tasks without any, and of the harness's without any."""
    from ...measure.tasks import FROM_FILES, split_name

    reads = {name for file in files for name in FROM_FILES[split_name(file)[0]].reads}
    if files and not ours and "system" not in reads:
        template = ("system_prompt", "chat_template_config")
        refuse(args, template, "with choices:, which are plain text")
    if theirs:
        refuse(args, ("system_prompt",), "in lm_eval: tasks, which have their own prompts")
    else:
        refuse(args, ("include_path",), "without an lm_eval: task")
    if not ours:
        names = ["filler", "documents", "no_answer_prefix", "seed", "trace"]
        names += [] if files else ["prefill_step_size"]
        if args.include_path is None and not any(t.startswith(("ruler", "niah")) for t in theirs):
            names.append("lengths")  # The harness's own RULER reads them too.
        refuse(args, tuple(names), "without one of RULER's tasks")


def run(args: argparse.Namespace) -> int:
    from ...measure.evaluation import carry_out, other_tasks, parse_tasks

    ours, theirs, names = parse_tasks(args.tasks)
    _refuse_idle(args, ours, theirs, names)
    from ...checkpoints.loading import find
    from ...measure.outcome import HEADER, conclusion, outcomes, rows
    from ...measure.report import beside, write
    from ...measure.results import fingerprint
    from ...measure.study import RESULTS, Study, examples
    from ...measure.tasks import split_name
    from ...measure.tasks.ruler import SEED, Sources
    from ..measuring import load_views, measuring, table
    from ..terminal import command_line, err, out

    if theirs and several.count() > 1:
        raise UserError("lm_eval: tasks run on one machine: leave them out, or mlx.launch")
    lengths, include_path = args.lengths or [4096], _path(args.include_path)
    files = {name: path_of(split_name(name)[1]) for name in names}
    study = Study(
        model=args.model,
        tasks=ours,
        lengths=lengths if ours else [],
        limit=args.limit,
        sources=Sources(_path(args.filler), _path(args.documents)),
        seed=SEED if args.seed is None else args.seed,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        answer_prefix=not args.no_answer_prefix,
        system_prompt=args.system_prompt,
        template=args.chat_template_config,
        batch_size=args.batch_size,
        prefill_step_size=options.prefill_step_from(args),
        files={name: fingerprint(path) for name, path in files.items()},
    )
    folder = path_of(args.out)
    several.from_first(lambda: check_file(folder / RESULTS))
    views, tokenizer = load_views(args, DEFAULT_AXES)
    place = str(find(args.model))
    others = other_tasks(study, tokenizer, files, theirs, lengths, place, include_path)
    with measuring() as (bars, measure):
        bar = bars.add_task("making problems", total=len(study.cells()) * study.limit)
        problems = examples(study, tokenizer, folder, lambda: bars.advance(bar))
        bars.remove_task(bar)
        traces = 2 if args.trace is None else args.trace
        asked = problems, others, traces, measure, command_line()
        finished = carry_out(study, views, tokenizer, folder, *asked)
    if not several.is_first():
        return 0 if finished else INTERRUPTED
    if not finished:
        err.print("stopped; the same command goes on from here", style="yellow")
    layers = len(views[0].layers)
    try:
        # Ctrl-C is not to wait for pictures.
        scores, page = write(folder, layers, args.holdout, args.reference, pictures=finished)
    except UserError:
        if finished:
            raise
        return INTERRUPTED  # There is nothing to report yet.
    found = outcomes(scores)
    out.print(table(HEADER, rows(found, layers)))
    out.print(conclusion(found, len(scores.problems)))
    for title, of in beside(folder).items():
        out.print(f"\n{title}, {of.unit}", table(HEADER, rows(outcomes(of), layers)))
    err.print(f"the whole report: {page}", soft_wrap=True)
    return 0 if finished else INTERRUPTED


def _path(text: str | None) -> Path | None:
    return None if text is None else path_of(text)
