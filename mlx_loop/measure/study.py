"""Studies: the same items under every setting, batch by batch, resumable.

Batches are the same however often a run was interrupted, so the files are too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import several
from ..files import check_space, whole_file
from ..foreign import read_text, to_json
from ..models.looped import Looped
from .outcome import Scores
from .results import Results, Row, append, check_header, fingerprint, parsed
from .tasks import ruler
from .tasks.task import Found, Score, Task

BYTES = 1000  # of a result, about


def run(
    views: Sequence[Looped],
    tokenizer: TokenizerWrapper,
    task: Task,
    results: Results,
    advance: Callable[[int], None],
    seconds: Path | None = None,
) -> None:
    """Measure what `results` lacks, every setting in turn for each batch.

    Several machines do a batch each, at the same time.

    Args:
        views: the un-looped one first.
        advance: called with how many items were done.
        seconds: a file that is told how long each batch took, which differs from run to run.

    Raises:
        UserError: the disk has no room for what comes, or a file cannot be written.
    """
    if results.path is not None:
        total, done = extent(views, task, results)
        check_space(results.path.parent, results.path, (total - done) * BYTES)
    jobs = ((items, _lacking(views, task, results, items)) for items in task.batches())
    todo = ((items, lacking) for items, lacking in jobs if lacking)

    def measure(job: Job) -> Iterator[list[Found]]:
        items, lacking = job
        return task.measure([views[number] for number in lacking], tokenizer, items)

    for (items, lacking), together in several.shared_out(todo, measure):
        names = [item["item"] for item in items]
        done = 0
        for number, rows, spent in together:
            loop = views[lacking[number]].loop
            for row in rows:
                if not results.has(loop, row, task.numbers if row["item"] in names else ()):
                    results.add(loop, row)
                    done += row["item"] in names
            if seconds is not None and spent is not None and several.is_first():
                line = {"answers": len(items), "seconds": round(spent, 4)}
                append(seconds, {"loop": loop and loop.to_dict(), **line})
        advance(done)


# A batch, and the numbers of the views under which it is measured.
Job = tuple[Sequence[Row], list[int]]


def _lacking(
    views: Sequence[Looped], task: Task, results: Results, items: Sequence[Row]
) -> list[int]:
    return [
        number
        for number, view in enumerate(views)
        if not all(results.has(view.loop, item, task.numbers) for item in items)
    ]


def extent(views: Sequence[Looped], task: Task, results: Results) -> tuple[int, int]:
    """How many answers a task takes under the views, and how many of them there are."""
    done = sum(results.has(view.loop, item) for view in views for item in task.items)
    return len(views) * len(task.items), done


def complete(views: Sequence[Looped], task: Task, results: Results) -> list[Row]:
    """The items that have a result of every setting."""
    return [
        item
        for item in task.items
        if all(results.has(view.loop, item, task.numbers) for view in views)
    ]


def gather(
    views: Sequence[Looped], task: Task, results: Results, score: Score | None = None
) -> Scores:
    """The scores of the complete items.

    Args:
        score: one of `task.beside`; None: the task's own.
    """
    score = score or Score(task.score, task.score, task.unit, task.better)
    items = complete(views, task, results)
    values = [[results.of(view.loop, item)[score.name] for item in items] for view in views]
    return Scores(
        [view.loop for view in views],
        [(i.get("task", ""), i.get("length"), i.get("index", i["item"])) for i in items],
        np.array(values, np.float64),
        len(task.items),
        better=score.better,
        unit=score.unit,
    )


# --- The folder of `mlx_loop evaluate` ---

# Problems; answers with their scores; how long each batch took; traces; where answers come from.
EXAMPLES, RESULTS = "examples.jsonl", "results.jsonl"
SECONDS, DRIFT, RUNS = "seconds.jsonl", "drift.jsonl", "runs.jsonl"


@dataclass(frozen=True)
class Study:
    """Everything that the answers depend on, other than the loop settings.

    Args:
        tasks: names in `ruler.TASKS`.
        lengths: context lengths in tokens, prompt and answer together.
        limit: problems of each task and length.
        answer_prefix: whether the model is given the beginning of its answer, as published.
        template: more arguments for the chat template.
        batch_size: prompts that are answered at a time; it changes the rounding.
        files: other tasks that are read from files: name and fingerprint.
    """

    model: str
    tasks: Sequence[str]
    lengths: Sequence[int]
    limit: int
    sources: ruler.Sources = field(default_factory=ruler.Sources)
    seed: int = ruler.SEED
    adapter_path: str | None = None
    dtype: str | None = None
    answer_prefix: bool = True
    system_prompt: str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    prefill_step_size: int = 2048
    files: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> Row:
        """As JSON; files by their content."""
        values = {**vars(self)}
        sources = values.pop("sources")
        if not self.files:
            del values["files"]
        for name in ("filler", "documents"):
            path = getattr(sources, name)
            values[name] = path and fingerprint(path)
        return json.loads(json.dumps(values))

    def cells(self) -> list[tuple[str, int]]:
        """Each task at each length."""
        return [(task, length) for length in self.lengths for task in self.tasks]


def examples(
    study: Study,
    tokenizer: TokenizerWrapper,
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> ruler.Ruler:
    """The long-context problems of a study, from its folder, or made and written there.

    Of several machines the first one has the folder.

    Args:
        advance: called after each problem that is made.

    Raises:
        UserError: a task does not fit a length, or the file cannot be read or written.
    """
    task = ruler.Ruler(
        [],
        study.answer_prefix,
        study.system_prompt,
        study.template,
        study.batch_size,
        study.prefill_step_size,
    )
    problems = several.from_first(lambda: _examples(study, task, tokenizer, folder, advance))
    return task.of([ruler.Example(**problem) for problem in problems])


def _examples(
    study: Study,
    task: ruler.Ruler,
    tokenizer: TokenizerWrapper,
    folder: Path,
    advance: Callable[[], None],
) -> list[Row]:
    path = folder / EXAMPLES
    text = read_text(path) if path.exists() else ""
    if not to_json(study.header()).startswith(text):
        header, *lines = [*parsed(text)] or [None]
        check_header(path, header, study.header())
        with suppress(TypeError):
            found = [ruler.Example(**line) for line in lines]  # type: ignore[arg-type]
            wanted = [(*cell, index) for cell in study.cells() for index in range(study.limit)]
            if wanted == [(e.task, e.length, e.index) for e in found]:
                return lines

    def size(text: str, prefix: str) -> int:
        return len(task.tokens(tokenizer, text, prefix))

    made: list[Row] = []
    for name, length in study.cells():
        for index in range(study.limit):
            example = ruler.example(name, length, index, size, study.sources, study.seed)
            made.append(asdict(example))
            advance()
    rows = [study.header(), *made]
    # A damaged file is made again: the same problems come of the same header.
    with whole_file(path, overwrite=True) as scratch:
        scratch.write_bytes("".join(to_json(row) + "\n" for row in rows).encode())
    return made
