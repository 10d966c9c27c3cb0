"""The report of a study: what it says, in Markdown and HTML."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import whole_file
from ..foreign import read_text, to_json
from ..settings import ResolvedLoop, is_number
from .document import Block, Paragraph, Picture, Table, markdown, page
from .drift import MEASURES
from .outcome import (
    HEADER,
    Outcome,
    Problem,
    Scores,
    conclusion,
    held_out,
    outcomes,
    rows,
    said_held_out,
)
from .plots import draw_accuracy, draw_lengths, save
from .provenance import runs_table, settings_table
from .results import Row, key, parsed, read_lines, read_rows
from .study import DRIFT, EXAMPLES, RESULTS, RUNS, SECONDS
from .tasks import FROM_FILES
from .trace import VERDICTS, worst

SOURCE = "Training-Free Looped Transformers, arXiv 2605.23872"
# What the paper reports: per cent right un-looped and looped, or the difference alone.
PUBLISHED: tuple[tuple[str, str, float | None, float | None, float], ...] = (
    ("Qwen3-4B-Instruct", "MMLU-Pro", 57.14, 59.79, 2.65),
    ("Qwen3-4B-Instruct", "GPQA-Main", 33.71, 35.71, 2.00),
    ("Qwen3-4B-Instruct", "CommonsenseQA", 78.87, 79.93, 1.06),
    ("Llama-3.2-1B", "GPQA-Main", None, None, 1.79),
    ("Llama-3.2-3B", "GPQA-Main", None, None, 1.12),
    ("Qwen1.5-MoE-A2.7B", "ARC-Challenge", 48.29, 50.60, 2.31),
    ("Qwen3-30B-A3B", "CommonsenseQA", 78.71, 79.85, 1.14),
    ("Moonlight-16B-A3B", "OpenBookQA", 31.60, 32.80, 1.20),
    ("DeepSeek-V2-Lite", "ARC-Challenge", None, None, 0.85),
)
MOST_ANSWERS = 200  # problems whose answers a report shows.
# What rows call a score from 0 to 1.
SCORES = ("score", "right")


def read(folder: Path) -> Scores:
    """The scores in a study's folder.

    Raises:
        UserError: no problem is complete, or the file cannot be read.
    """
    found = _scores(folder, SCORES)
    if found is None:
        raise UserError("no problem has an answer of every setting yet: run it again to go on")
    return found


def beside(folder: Path) -> dict[str, Scores]:
    """The other scores in a study's folder, by which settings are compared too."""
    known = dict.fromkeys(score for task in FROM_FILES.values() for score in task.beside)
    found = ((score, _scores(folder, [score.name])) for score in known)
    return {
        score.title: replace(scores, better=score.better, unit=score.unit)
        for score, scores in found
        if scores is not None
    }


def _scores(folder: Path, names: Sequence[str]) -> Scores | None:
    """The first of these numbers that a row has, of complete problems; None: there are none."""
    header: Any = next(parsed(read_text(folder / RESULTS)), {})
    settings: dict[str, ResolvedLoop | None] = {}
    found: dict[str, dict[Problem, float]] = defaultdict(dict)
    for row in read_rows(folder / RESULTS):
        score = next((row[name] for name in names if is_number(row.get(name))), None)
        # Lines of something else, or settings that are none, are passed over.
        with suppress(UserError, TypeError, KeyError):
            name, loop = key(row["loop"]), row["loop"]
            if score is not None and name not in settings:
                settings[name] = loop and ResolvedLoop.from_dict(loop)
            if score is not None:
                found[name][row["task"], row["length"], row["index"]] = score
    keys = sorted(found, key=lambda name: settings[name] is not None)
    every = list(dict.fromkeys(p for scores in found.values() for p in scores))
    problems = [p for p in every if all(p in scores for scores in found.values())]
    if len(keys) < 2 or settings[keys[0]] is not None or not problems:
        return None
    values = np.array([[found[name][p] for p in problems] for name in keys], np.float64)
    return Scores([settings[name] for name in keys], problems, values, len(every), header)


def write(
    folder: Path,
    layers: int,
    holdout: float | None = None,
    reference: bool = False,
    pictures: bool = True,
) -> tuple[Scores, Path]:
    """Write report.md and report.html into a study's folder, with pictures where matplotlib is.

    Args:
        layers: of the model; costs are layer passes.
        holdout: a setting is chosen on the other problems and reported on this share of them.
        reference: add the paper's numbers.
        pictures: draw; it takes seconds.
    """
    scores = read(folder)
    found, title = outcomes(scores), title_of(scores)
    blocks = opening(scores, found, _overall(found, layers, folder / SECONDS))
    others = beside(folder)
    if holdout:
        lines = said_held_out(held_out(scores, holdout), others, holdout)
        blocks += [
            Paragraph("Chosen on one part, reported on the other", 2),
            *map(Paragraph, lines),
        ]
    for title, of in others.items():
        blocks += [Paragraph(title.capitalize(), 2), Table(HEADER, rows(outcomes(of), layers))]
    try:
        blocks += _pictures(scores, folder) if pictures else []
    except UserError as error:
        blocks.append(Paragraph(f"Pictures are missing: {error}."))
    lengths = {f"{n} tokens": [p for p in scores.problems if p[1] == n] for n in scores.lengths()}
    tasks = {name: [p for p in scores.problems if p[0] == name] for name in scores.tasks()}
    for heading, parts in (("By context length", lengths), ("By task", tasks)):
        if len(parts) > 1:
            blocks += [Paragraph(heading, 2), by(scores, parts)]
    blocks += _drift(found, folder / DRIFT)
    if reference:
        blocks += _reference()
    runs = [run for run in read_lines(folder / RUNS) if isinstance(run, dict)]
    blocks += closing(scores, runs)
    blocks += answers(scores.names, _answered(scores, folder), RESULTS)
    for name, text in (("report.md", markdown(blocks)), ("report.html", page(title, blocks))):
        with whole_file(folder / name, overwrite=True) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return scores, folder / "report.html"


# --- What the reports of `evaluate` and `sweep` share ---


def title_of(scores: Scores) -> str:
    return f"{scores.header['model']}: does looping help?"


def opening(scores: Scores, found: Sequence[Outcome], table: Table) -> list[Block]:
    """What was found.

    Args:
        table: of the outcomes.
    """
    answered = len(scores.problems)
    blocks: list[Block] = [Paragraph(title_of(scores), 1), Paragraph(conclusion(found, answered))]
    if answered < scores.planned:
        blocks.append(
            Paragraph(f"Of {scores.planned} problems {answered} are answered everywhere.")
        )
    unit = "per cent" if scores.unit == "%" else scores.unit
    return [
        *blocks,
        table,
        Paragraph(
            f"Scores and differences in {unit}, with 95 % intervals over problems; p is exact and "
            "corrected for the number of settings (Holm). Cost: layer passes of a looped token "
            "beyond the plain model's. To see: problems that would show this difference with "
            "80 % power, if it is real."
        ),
    ]


def closing(scores: Scores, runs: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What it was found with."""
    header = [[name, to_json(value)] for name, value in scores.header.items()]
    blocks: list[Block] = [
        Paragraph("Settings", 2),
        settings_table(scores.names, scores.settings),
        Paragraph("Configuration", 2),
        Table(["field", "value"], header, left=["value"]),
    ]
    return [*blocks, Paragraph("Runs", 2), runs_table(runs)] if runs else blocks


class Answered(NamedTuple):
    """A problem, the answer that was expected, and that of each setting."""

    problem: str
    expected: str
    answers: Sequence[str]


def answers(names: Sequence[str], found: Sequence[Answered], results: str) -> list[Block]:
    """Answers side by side, where settings differ in them.

    Args:
        names: of the settings.
        results: the file where all of them are.
    """
    if not found:
        return []
    different = [one for one in found if len(set(one.answers)) > 1]
    text = f"Of {len(found)} problems {len(different)} have answers that differ. "
    if len(different) > MOST_ANSWERS:
        text += f"Here are the first {MOST_ANSWERS}. "
    rows = [[one.problem, one.expected, *one.answers] for one in different[:MOST_ANSWERS]]
    header = ["problem", "expected", *names]
    return [
        Paragraph("Answers", 2),
        Paragraph(f"{text}All are in {results}; ✓ is right, ✗ is wrong."),
        *([Table(header, rows, left=header, search=True)] if rows else []),
    ]


def marked(answer: str, score: Any) -> str:
    """An answer with a sign of whether it is right."""
    return {1: "✓ ", 0: "✗ "}.get(score, "") + answer.strip()


# --- Of `evaluate` ---


def _answered(scores: Scores, folder: Path) -> list[Answered]:
    said: dict[Problem, dict[str, str]] = defaultdict(dict)
    for row in read_rows(folder / RESULTS):
        # Lines of something else are passed over.
        with suppress(TypeError, KeyError):
            answer: Any = row.get("answer", row.get("text"))
            words = answer if isinstance(answer, str) else ", ".join(map(str, answer))
            words = marked(words, row.get("score", row.get("right")))
            said[row["task"], row["length"], row["index"]][key(row["loop"])] = words
    settings, expected = [key(loop) for loop in scores.settings], _expected(folder / EXAMPLES)
    return [
        Answered(
            " ".join(str(part) for part in p if part is not None),
            expected.get(p, ""),
            [said[p].get(name, "") for name in settings],
        )
        for p in scores.problems
        if p in said
    ]


def _expected(path: Path) -> dict[Problem, str]:
    found: dict[Problem, str] = {}
    for row in read_lines(path):
        with suppress(TypeError, KeyError):
            found[row["task"], row["length"], row["index"]] = ", ".join(row["answers"])
    return found


def _overall(found: Sequence[Outcome], layers: int, path: Path) -> Table:
    """Args: path: of seconds per answer, which are shown where every setting has some."""
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for line in read_rows(path, "seconds", "answers"):
        total = spent[key(line["loop"])]
        total[0] += line["seconds"]
        total[1] += line["answers"]
    table = rows(found, layers)
    if not all(key(outcome.loop) in spent for outcome in found):
        return Table(HEADER, table)
    for row, outcome in zip(table, found, strict=True):
        seconds, answers = spent[key(outcome.loop)]
        row.append(f"{seconds / max(answers, 1):.2g}")
    return Table([*HEADER, "s / problem"], table)


def by(scores: Scores, parts: Mapping[str, Sequence[Problem]]) -> Table:
    """The scores in each part of the problems."""
    header = ["setting", *(f"{name} (n = {len(part)})" for name, part in parts.items())]
    columns = [outcomes(scores.of(part.__contains__)) for part in parts.values()]
    return Table(
        header, [[of[0].name, *(o.said() for o in of)] for of in zip(*columns, strict=True)]
    )


def _drift(found: Sequence[Outcome], path: Path) -> list[Block]:
    by_setting: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(path, *MEASURES):
        if row.get("verdict") in VERDICTS:
            by_setting[key(row["loop"])].append(row)
    known = [outcome for outcome in found if key(outcome.loop) in by_setting]
    if not known:
        return []
    table, means = [], []
    for outcome in known:
        traces = by_setting[key(outcome.loop)]
        means.append([float(np.mean([row[name] for row in traces])) for name in MEASURES])
        cells = [f"{x:.3g}" for x in means[-1]]
        table.append([outcome.name, *cells, worst(row["verdict"] for row in traces)])
    blocks: list[Block] = [
        Paragraph("Drift", 2),
        Table(["setting", *MEASURES.values(), "verdict"], table),
    ]
    if len(known) >= 5:
        changes = [outcome.change for outcome in known]
        measures = zip(MEASURES, zip(*means, strict=True), strict=True)
        said = ", ".join(f"{name} {spearman(x, changes):+.2f}" for name, x in measures)
        blocks.append(
            Paragraph(
                f"Spearman's rank correlation with the change in score, over {len(known)} "
                f"settings: {said}. Negative: the more drift, the lower the score."
            )
        )
    return blocks


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where either is constant."""
    a, b = _ranks(x), _ranks(y)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _reference() -> list[Block]:
    rows = [
        [model, task, *("" if x is None else f"{x:.2f}" for x in shares), f"{change:+.2f}"]
        for model, task, *shares, change in PUBLISHED
    ]
    return [
        Paragraph("Published", 2),
        Table(["model", "task", "no loop", "looped", "difference"], rows),
        Paragraph(f"Source: {SOURCE}. It gives no intervals for these."),
    ]


def _pictures(scores: Scores, folder: Path) -> list[Block]:
    pictures: list[Block] = []
    drawn = [("accuracy", "score over loops K", draw_accuracy)]
    if scores.lengths():
        drawn.append(("lengths", "change by context length and loops K", draw_lengths))
    for name, title, draw in drawn:
        light, dark = save(folder / f"{name}.png", partial(draw, scores))
        pictures.append(Picture(light, dark, title))
    return pictures
