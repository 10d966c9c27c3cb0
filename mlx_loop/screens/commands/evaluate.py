"""`mlx_loop evaluate`: tasks under many loop settings, with honest statistics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...checkpoints.loading import find
from ...errors import INTERRUPTED, UserError
from ...generation.prefill import prefill_step
from ...measure.drift import Drift, traced
from ...measure.outcome import HEADER, conclusion, outcomes, rows
from ...measure.report import write
from ...measure.results import Results, fingerprint
from ...measure.study import DRIFT, RESULTS, SECONDS, Study, examples
from ...measure.tasks import FROM_FILES, Task, named, split_name
from ...measure.tasks.harness import Harness
from ...measure.tasks.ruler import TASKS, Sources
from ..measuring import load_views, measuring, table
from ..terminal import err, out

DEFAULT_AXES: dict[str, list[Any]] = {"loops": [2, 3, 4, 6, 8, 12]}
LM_EVAL = "lm_eval:"


def parse_tasks(text: str) -> tuple[list[str], list[str], list[str]]:
    """RULER's tasks, lm-evaluation-harness's, and those in files, in `--tasks`.

    Raises:
        UserError: a name that none of them is.
    """
    ours: list[str] = []
    theirs: list[str] = []
    files: list[str] = []
    for name in filter(None, map(str.strip, text.split(","))):
        if name.startswith(LM_EVAL):
            theirs.append(name.removeprefix(LM_EVAL))
        elif name == "ruler":
            ours += [task for task in TASKS if task != "qa"]
        elif name in TASKS:
            ours.append(name)
        elif ":" in name and FROM_FILES[split_name(name)[0]].unit == "%":
            files.append(name)
        else:
            raise UserError(
                f"unknown task {name!r}: known are ruler, {', '.join(TASKS)}, {LM_EVAL}NAME for "
                "the tasks of lm-evaluation-harness, and questions:FILE"
            )
    if not ours and not theirs and not files:
        raise UserError("there is no task: give --tasks niah_single_2,vt or --tasks ruler")
    return list(dict.fromkeys(ours)), list(dict.fromkeys(theirs)), list(dict.fromkeys(files))


def run(args: argparse.Namespace) -> int:
    ours, theirs, names = parse_tasks(args.tasks)
    files = {name: Path(split_name(name)[1]).expanduser() for name in names}
    study = Study(
        model=args.model,
        tasks=ours,
        lengths=args.lengths if ours else [],
        limit=args.limit,
        sources=Sources(_path(args.filler), _path(args.documents)),
        seed=args.seed,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        answer_prefix=not args.no_answer_prefix,
        system_prompt=args.system_prompt,
        template=args.chat_template_config,
        batch_size=args.batch_size,
        prefill_step_size=args.prefill_step_size or prefill_step(None),
        files={name: fingerprint(path) for name, path in files.items()},
    )
    folder = Path(args.out).expanduser()
    views, tokenizer = load_views(args, DEFAULT_AXES)
    asked = {"template": study.template, "system": study.system_prompt, "batch": study.batch_size}
    others: list[Task] = [
        named(FROM_FILES[split_name(name)[0]].read(path, tokenizer, study.limit, **asked), name)
        for name, path in files.items()
    ]
    if theirs:
        others.append(
            Harness(
                theirs,
                _path(args.include_path),
                args.limit,
                args.batch_size,
                args.lengths,
                str(find(args.model)),
                args.chat_template_config,
            )
        )
    with measuring() as (bars, measure):
        bar = bars.add_task("making problems", total=len(study.cells()) * study.limit)
        problems = examples(study, tokenizer, folder, lambda: bars.advance(bar))
        bars.remove_task(bar)
        results = Results.open(folder / RESULTS, study.header())
        title = f"{len(views)} settings"
        finished = all(
            measure(title, views, tokenizer, task, results, folder / SECONDS)
            for task in (problems, *others)
        )
        chosen = problems.of(traced(problems.problems, args.trace))
        if finished and chosen.problems:
            drift = Results.open(folder / DRIFT, study.header())
            finished = measure("tracing", views[1:], tokenizer, Drift(chosen), drift)
    if not finished:
        err.print("stopped; the same command goes on from here", style="yellow")
    layers = len(views[0].layers)
    scores, page = write(folder, layers, args.holdout, args.reference)
    found = outcomes(scores)
    out.print(table(HEADER, rows(found, layers)))
    out.print(conclusion(found, len(scores.problems)))
    err.print(f"the whole report: {page}", markup=False, soft_wrap=True)
    return 0 if finished else INTERRUPTED


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
