"""An evaluation: RULER's tasks, lm-evaluation-harness's and those of files, in one study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import several
from ..errors import UserError, suggestion
from ..files import alone
from ..models.looped import Looped
from .drift import Drift, traced
from .provenance import provenance
from .results import Results, append
from .study import DRIFT, RESULTS, RUNS, SECONDS, Study
from .tasks import FROM_FILES, Task, named, split_name
from .tasks.harness import Harness
from .tasks.ruler import TASKS, Ruler

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
            meant = suggestion(name, ("ruler", *TASKS)) or ":"
            raise UserError(
                f"unknown task {name!r}{meant} known are ruler, {', '.join(TASKS)}, {LM_EVAL}NAME "
                "for the tasks of lm-evaluation-harness, questions:FILE, choices:FILE and "
                "chat_choices:FILE"
            )
    if not ours and not theirs and not files:
        raise UserError("there is no task: give --tasks niah_single_2,vt or --tasks ruler")
    return list(dict.fromkeys(ours)), list(dict.fromkeys(theirs)), list(dict.fromkeys(files))


def other_tasks(
    study: Study,
    tokenizer: TokenizerWrapper,
    files: Mapping[str, Path],
    of_harness: Sequence[str],
    lengths: Sequence[int],
    place: str,
    include_path: Path | None = None,
) -> list[Task]:
    """The tasks of a study that are not RULER's.

    Args:
        files: by name, as `parse_tasks` gives it.
        of_harness: names in lm-evaluation-harness.
        lengths: for the harness's own `ruler`.
        place: of the tokenizer, a folder.
        include_path: a folder with task files of the user's.
    """
    asked = {
        "template": study.template,
        "system": study.system_prompt,
        "batch": study.batch_size,
        "step": study.prefill_step_size,
    }
    found: list[Task] = [
        named(FROM_FILES[split_name(name)[0]].read(path, tokenizer, study.limit, **asked), name)
        for name, path in files.items()
    ]
    if of_harness:
        size = study.limit, study.batch_size
        found.append(Harness(of_harness, include_path, *size, lengths, place, study.template))
    return found


def carry_out(
    study: Study,
    views: Sequence[Looped],
    tokenizer: TokenizerWrapper,
    folder: Path,
    problems: Ruler,
    others: Sequence[Task],
    traces: int,
    measure: Callable[..., bool],
    command: str,
) -> bool:
    """Measure what a study's folder lacks, and how far settings drift on some of its problems.

    Args:
        traces: problems of each length on which drift is measured.
        measure: (title, views, tokenizer, task, results, seconds): as `study.run`, and shows how
            far it is.
        command: what was typed; the folder tells where its answers come from.

    Returns:
        Whether it came to the end.
    """
    with several.held_by_first(lambda: alone(folder / RESULTS)):
        results = Results.open(folder / RESULTS, study.header())
        title, known, made = f"{len(views)} settings", len(results.rows), provenance(command)
        try:
            for task in (problems, *others):
                if not measure(title, views, tokenizer, task, results, folder / SECONDS):
                    return False
        finally:
            new = len(results.rows) - known
            if new and several.is_first():
                append(folder / RUNS, {**made, "results": new})
        chosen = problems.of(traced(problems.problems, traces))
        if not chosen.problems:
            return True
        drift = Results.open(folder / DRIFT, study.header())
        return measure("tracing", views[1:], tokenizer, Drift(chosen), drift)
