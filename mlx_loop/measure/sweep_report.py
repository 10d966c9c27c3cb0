"""The page of a sweep, beside its file of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import UserError
from ..files import whole_file
from ..models.looped import Looped
from .document import Block, Paragraph, Picture, Table, page
from .outcome import HEADER, Scores, outcomes, rows
from .plots import draw_windows, save
from .provenance import provenance
from .report import Answered, answers, by, closing, marked, opening, title_of
from .results import Results
from .study import complete
from .tasks import Task


def page_of(results: Path) -> Path:
    """Where the page of a file of results is."""
    return results.with_name(f"{results.name}.html")


def write(
    path: Path,
    scores: Scores,
    beside: Mapping[str, Scores],
    views: Sequence[Looped],
    task: Task,
    results: Results,
    command: str,
    chosen: Sequence[str] = (),
) -> Path:
    """Write the page, with a picture in it where matplotlib is.

    Args:
        path: of the results.
        beside: other scores, by title.
        command: what was typed.
        chosen: what became of a setting that was chosen on a part of the problems, in sentences.
    """
    found, layers = outcomes(scores), len(views[0].layers)
    every = zip(rows(found, layers), means(views, task, results), strict=True)
    blocks = opening(scores, found, Table([*HEADER, *task.also], [a + b for a, b in every]))
    if task.no_choice is not None:
        blocks.append(Paragraph(f"No setting is recommended: {task.no_choice}."))
    if chosen:
        head = Paragraph("Chosen on one part, reported on the other", 2)
        blocks += [head, *map(Paragraph, chosen)]
    for title, of in beside.items():
        heading = Paragraph(f"{title.capitalize()}, {of.unit}", 2)
        blocks += [heading, Table(HEADER, rows(outcomes(of), layers))]
    files = {name: [p for p in scores.problems if p[0] == name] for name in scores.tasks()}
    if len(files) > 1:
        blocks += [Paragraph("By file", 2), by(scores, files)]
    with TemporaryDirectory() as folder:
        blocks.append(_picture(drawing(scores, task), Path(folder)))
        blocks += closing(scores, [provenance(command)])
        blocks += answers(scores.names, _answered(views, task, results), path.name)
        with whole_file(page_of(path), overwrite=True) as scratch:
            scratch.write_text(page(title_of(scores), blocks), encoding="utf-8")
    return page_of(path)


def means(views: Sequence[Looped], task: Task, results: Results) -> list[list[str]]:
    """Of each setting, the means of the other numbers of a task (`task.also`)."""
    items = complete(views, task, results)

    def mean(view: Looped, name: str) -> str:
        return f"{sum(results.of(view.loop, item)[name] for item in items) / len(items):.2g}"

    return [[mean(view, name) for name in task.also] for view in views]


def drawing(scores: Scores, task: Task) -> Callable[[Any], Any]:
    """What draws the picture, given what is like matplotlib's pyplot."""
    what = "right answers" if task.score == "right" else task.score
    return partial(draw_windows, outcomes(scores), f"{scores.header['model']}: {what}")


def _picture(draw: Callable[[Any], Any], folder: Path) -> Block:
    try:
        light, dark = save(folder / "sweep.png", draw)
    except UserError as error:
        return Paragraph(f"A picture is missing: {error}.")
    return Picture(light, dark, "change by window and loops K")


def _answered(views: Sequence[Looped], task: Task, results: Results) -> list[Answered]:
    found = []
    for item in complete(views, task, results):
        every = [results.of(view.loop, item) for view in views]
        told = [task.told(item, row) for row in every]
        said = [one for one in told if one is not None]
        if said:
            question, expected, _ = said[0]
            shown = [marked(one[2], row[task.score]) for one, row in zip(said, every, strict=True)]
            found.append(Answered(question, expected, shown))
    return found
