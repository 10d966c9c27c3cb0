"""The report of a study: Markdown, and one HTML file that opens anywhere."""

from __future__ import annotations

import base64
import html
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import whole_file
from ..method.loop import layer_passes
from ..settings import LoopConfig
from .drift import DRIFT, MEASURES
from .plots import save
from .significance import Paired, holm, mean_interval, paired, verdict
from .study import RESULTS, SECONDS

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
Problem = tuple[str, int | None, int]  # task, length, index


@dataclass(frozen=True)
class Scores:
    """What a study has found: the same problems under every setting.

    Attributes:
        header: the study's configuration.
        settings: complete settings, None (the un-looped model) first.
        problems: those that every setting has answered.
        values: (settings, problems), 0 to 1.
        planned: problems that some setting has answered.
    """

    header: Mapping[str, Any]
    settings: list[LoopConfig | None]
    problems: list[Problem]
    values: NDArray[np.float64]
    planned: int
    names: list[str] = field(default_factory=list)

    def of(self, wanted: Callable[[Problem], bool]) -> Scores:
        """The part with some of the problems."""
        chosen = [i for i, problem in enumerate(self.problems) if wanted(problem)]
        problems = [self.problems[i] for i in chosen]
        return replace(self, problems=problems, values=self.values[:, chosen])

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _, _ in self.problems))

    def lengths(self) -> list[int]:
        return sorted({length for _, length, _ in self.problems if length is not None})


def read(folder: Path) -> Scores:
    """The scores in a study's folder.

    Raises:
        UserError: no problem is complete, or the file cannot be read.
    """
    header, rows = _lines(folder / RESULTS)
    by_setting: dict[str, dict[Problem, float]] = defaultdict(dict)
    for row in rows:
        if "score" not in row:
            continue
        problem = (row["task"], row["length"], row["index"])
        by_setting[json.dumps(row["loop"])][problem] = row["score"]
    keys = sorted(by_setting, key="null".__ne__)
    every = list(dict.fromkeys(p for found in by_setting.values() for p in found))
    problems = [p for p in every if all(p in found for found in by_setting.values())]
    if "null" not in by_setting or len(keys) < 2 or not problems:
        raise UserError("no problem has an answer of every setting yet: run it again to go on")
    settings = [None if k == "null" else LoopConfig.from_dict(json.loads(k)) for k in keys]
    values = np.array([[by_setting[key][p] for p in problems] for key in keys], np.float64)
    return Scores(header, settings, problems, values, len(every), labels(settings))


def labels(settings: Sequence[LoopConfig | None]) -> list[str]:
    """A short name for each: integrator and K, and other fields where they differ."""
    loops = [loop for loop in settings if loop is not None]
    differing = [
        f.name
        for f in fields(LoopConfig)
        if f.name not in ("integrator", "loops")
        and len({getattr(loop, f.name) for loop in loops} - {None}) > 1
    ]
    return ["no loop" if loop is None else _label(loop, differing) for loop in settings]


def _label(loop: LoopConfig, differing: Sequence[str]) -> str:
    words = [loop.integrator]
    for name in differing:
        value = getattr(loop, name)
        if value is not None:
            words.append(f"{name} {value}".replace("(", "[").replace(", ", ","))
    return ", ".join(words if loop.loops is None else [*words, f"K = {loop.loops}"])


def compare(scores: Scores) -> tuple[list[Paired], list[float]]:
    """Every looped setting against the un-looped model, and Holm's p over all of them."""
    found = [paired(row, scores.values[0]) for row in scores.values[1:]]
    return found, holm([result.p for result in found])


def conclusion(scores: Scores) -> str:
    """What may be said, in a sentence or two."""
    found, adjusted = compare(scores)
    said = [verdict(r.difference, p) for r, p in zip(found, adjusted, strict=True)]
    n, tried = len(scores.problems), len(found)
    corrected = f", corrected for {tried} settings" if tried > 1 else ""
    how = f"{n} problems, exact paired test{corrected}, 5 %"
    names = {
        word: [scores.names[i] for i, said_of in enumerate(said, 1) if said_of == word]
        for word in ("better", "worse")
    }
    if not names["better"] and not names["worse"]:
        return f"No detectable difference between any setting and no looping ({how})."
    parts = [
        f"{word.capitalize()} than no looping: {'; '.join(which)}."
        for word, which in names.items()
        if which
    ]
    rest = tried - sum(map(len, names.values()))
    if rest:
        parts.append(f"No detectable difference: the other {rest}.")
    return f"{' '.join(parts)} ({how[0].upper()}{how[1:]}.)"


# --- Blocks of a document ---


@dataclass(frozen=True)
class Text:
    text: str
    heading: int = 0


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    path: Path
    dark: Path
    title: str


Block = Text | Table | Picture


def markdown(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown; pictures are beside it."""
    out = []
    for block in blocks:
        if isinstance(block, Text):
            out.append(f"{'#' * block.heading} {block.text}".strip())
        elif isinstance(block, Picture):
            out.append(f"![{block.title}]({block.path.name})")
        else:
            lines = [block.header, ["---"] * len(block.header), *block.rows]
            out.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(out) + "\n"


STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """Blocks as one HTML file; pictures are inside it."""
    body = []
    for block in blocks:
        if isinstance(block, Text):
            tag = f"h{block.heading}" if block.heading else "p"
            body.append(f"<{tag}>{html.escape(block.text)}</{tag}>")
        elif isinstance(block, Picture):
            body.append(
                f'<picture><source srcset="{_inline(block.dark)}" '
                f'media="(prefers-color-scheme: dark)"><img src="{_inline(block.path)}" '
                f'alt="{html.escape(block.title)}"></picture>'
            )
        else:
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
            lines = [
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in block.rows
            ]
            body.append(f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title>\n<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# --- What a report says ---


def write(
    folder: Path, layers: int, holdout: float | None = None, reference: bool = False
) -> tuple[Scores, Path]:
    """Write report.md and report.html into a study's folder, with pictures where matplotlib is.

    Args:
        layers: of the model; costs are layer passes.
        holdout: a setting is chosen on the other problems and reported on this share of them.
        reference: add the paper's numbers.
    """
    scores = read(folder)
    title = f"{scores.header['model']}: does looping help?"
    blocks: list[Block] = [Text(title, 1), Text(conclusion(scores))]
    if len(scores.problems) < scores.planned:
        blocks.append(
            Text(f"Of {scores.planned} problems {len(scores.problems)} are answered everywhere.")
        )
    blocks.append(_overall(scores, layers, _seconds(folder / SECONDS)))
    blocks.append(
        Text(
            "Scores and differences in per cent, with 95 % intervals over problems; p is exact and "
            "corrected for the number of settings (Holm). Cost: layer passes of a looped token "
            "beyond the plain model's. To see: problems that would show this difference with "
            "80 % power, if it is real."
        )
    )
    if holdout:
        blocks += _held_out(scores, holdout)
    try:
        blocks += _pictures(scores, folder)
    except UserError as error:
        blocks.append(Text(f"Pictures are missing: {error}."))
    if len(scores.lengths()) > 1:
        parts = {
            f"{length} tokens": scores.of(lambda p, n=length: p[1] == n)  # type: ignore[misc]
            for length in scores.lengths()
        }
        blocks += [Text("By context length", 2), _by(scores, parts)]
    if len(scores.tasks()) > 1:
        parts = {t: scores.of(lambda p, t=t: p[0] == t) for t in scores.tasks()}  # type: ignore[misc]
        blocks += [Text("By task", 2), _by(scores, parts)]
    blocks += _drift(scores, folder / DRIFT)
    if reference:
        blocks += _reference()
    blocks += [
        Text("Configuration", 2),
        Table(
            ["field", "value"],
            [[name, json.dumps(value)] for name, value in scores.header.items()],
        ),
    ]
    for name, text in (("report.md", markdown(blocks)), ("report.html", page(title, blocks))):
        with whole_file(folder / name, overwrite=True) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return scores, folder / "report.html"


def overall_rows(scores: Scores, layers: int) -> list[list[str]]:
    """Name, cost, score, difference, p, problems needed and verdict of each setting."""
    found, adjusted = compare(scores)
    rows = []
    for i, (name, loop) in enumerate(zip(scores.names, scores.settings, strict=True)):
        cost = layer_passes(loop, layers) / layers - 1
        row = [name, f"+{cost:.0%}", _share(scores.values[i])]
        if i:
            result, p = found[i - 1], adjusted[i - 1]
            row += [
                _change(result),
                f"{p:.2g}",
                "" if result.needed is None else str(result.needed),
                verdict(result.difference, p),
            ]
        rows.append(row + [""] * (7 - len(row)))
    return rows


HEADER = ["setting", "cost", "score", "difference", "p", "to see", "verdict"]


def _overall(scores: Scores, layers: int, seconds: Mapping[str, float]) -> Table:
    rows = overall_rows(scores, layers)
    keys = [json.dumps(loop and loop.to_dict()) for loop in scores.settings]
    if not all(key in seconds for key in keys):
        return Table(HEADER, rows)
    timed = [[*row, f"{seconds[key]:.2g}"] for row, key in zip(rows, keys, strict=True)]
    return Table([*HEADER, "s / problem"], timed)


def _share(values: NDArray[np.float64]) -> str:
    low, high = mean_interval(values)
    return f"{100 * values.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _change(result: Paired) -> str:
    low, high = 100 * result.low, 100 * result.high
    return f"{100 * result.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def _by(scores: Scores, parts: Mapping[str, Scores]) -> Table:
    header = ["setting", *(f"{name} (n = {len(p.problems)})" for name, p in parts.items())]
    rows = [
        [name, *(_share(part.values[i]) for part in parts.values())]
        for i, name in enumerate(scores.names)
    ]
    return Table(header, rows)


def split(problems: Sequence[Problem], share: float) -> list[bool]:
    """Whether each problem is held out: this share of every task and length.

    It depends on the problem alone, so that a study that goes on keeps its split. Problems are
    independent of their numbers, so multiples of the golden ratio are as good as chance, and they
    divide every few neighbours as evenly as can be.
    """
    golden = (5**0.5 - 1) / 2
    return [(index + 1) * golden % 1 < share for _, _, index in problems]


def _held_out(scores: Scores, share: float) -> list[Block]:
    held = dict(zip(scores.problems, split(scores.problems, share), strict=True))
    choosing, reporting = scores.of(lambda p: not held[p]), scores.of(lambda p: held[p])
    blocks: list[Block] = [Text("Chosen on one part, reported on the other", 2)]
    if not choosing.problems or not reporting.problems:
        return [*blocks, Text("There are too few problems to split.")]
    best = 1 + int(choosing.values[1:].mean(axis=1).argmax())
    result = paired(reporting.values[best], reporting.values[0])
    return [
        *blocks,
        Text(
            f"Best of {len(scores.settings) - 1} settings on {len(choosing.problems)} problems: "
            f"{scores.names[best]}. On the other {len(reporting.problems)} problems it scores "
            f"{_share(reporting.values[best])} and no looping {_share(reporting.values[0])}: "
            f"{_change(result)} points, p = {result.p:.2g}, "
            f"{verdict(result.difference, result.p)}."
        ),
    ]


def _drift(scores: Scores, path: Path) -> list[Block]:
    if not path.exists():
        return []
    _, rows = _lines(path)
    by_setting: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_setting[json.dumps(row["loop"])].append(row)
    table, known, changes = [], [], []
    for i, (name, loop) in enumerate(zip(scores.names, scores.settings, strict=True)):
        found = by_setting.get(json.dumps(loop and loop.to_dict()))
        if not found:
            continue
        means = [float(np.mean([row[m] for row in found])) for m in MEASURES]
        worst = max((row["verdict"] for row in found), key=_VERDICTS.index)
        table.append([name, *(f"{x:.3g}" for x in means), worst])
        known.append(means)
        changes.append(float((scores.values[i] - scores.values[0]).mean()))
    if not table:
        return []
    blocks: list[Block] = [
        Text("Drift", 2),
        Table(["setting", *MEASURES.values(), "verdict"], table),
    ]
    if len(known) >= 5:
        measures = zip(MEASURES, zip(*known, strict=True), strict=True)
        said = ", ".join(f"{name} {spearman(x, changes):+.2f}" for name, x in measures)
        blocks.append(
            Text(
                f"Spearman's rank correlation with the change in score, over {len(known)} "
                f"settings: {said}. Negative: the more drift, the lower the score."
            )
        )
    return blocks


_VERDICTS = ("no verdict", "converging", "drifting", "diverging")


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
        Text("Published", 2),
        Table(["model", "task", "no loop", "looped", "difference"], rows),
        Text(f"Source: {SOURCE}. It gives no intervals for these."),
    ]


# --- Pictures ---


def groups(scores: Scores) -> dict[str, list[tuple[int, int]]]:
    """Settings that differ in K alone, by name: (K, number of the setting), K ascending."""
    kinds = [loop and replace(loop, loops=None) for loop in scores.settings]
    unique = list(dict.fromkeys(kinds[1:]))
    names = labels(unique)
    found: dict[str, list[tuple[int, int]]] = {}
    for i, (kind, loop) in enumerate(zip(kinds, scores.settings, strict=True)):
        if loop is not None:
            found.setdefault(names[unique.index(kind)], []).append((loop.loops, i))
    return {name: sorted(members) for name, members in found.items()}


def _pictures(scores: Scores, folder: Path) -> list[Block]:
    pictures: list[Block] = []
    drawn = [("accuracy", "score over loops K", draw_accuracy)]
    if scores.lengths():
        drawn.append(("lengths", "change by context length and loops K", draw_lengths))
    for name, title, draw in drawn:
        light, dark = save(folder / f"{name}.png", partial(draw, scores))
        pictures.append(Picture(light, dark, title))
    return pictures


def draw_accuracy(scores: Scores, pyplot: Any) -> Any:
    """Score over K with 95 % intervals, a line for each kind of setting."""
    figure, axes = pyplot.subplots(figsize=(6.5, 3.8), layout="constrained")
    members = groups(scores)
    for offset, (name, line) in enumerate(members.items()):
        # Side by side, so that intervals do not hide each other.
        shift = 0.06 * (offset - (len(members) - 1) / 2)
        values = [scores.values[i] for _, i in line]
        means = [100 * v.mean() for v in values]
        intervals = [mean_interval(v) for v in values]
        below = [m - 100 * low for m, (low, _) in zip(means, intervals, strict=True)]
        above = [100 * high - m for m, (_, high) in zip(means, intervals, strict=True)]
        axes.errorbar(
            [k + shift for k, _ in line],
            means,
            (below, above),
            marker="o",
            markersize=4,
            capsize=3,
            label=name,
        )
    plain = 100 * scores.values[0].mean()
    low, high = mean_interval(scores.values[0])
    colour = pyplot.rcParams["text.color"]
    axes.axhline(plain, linestyle="--", linewidth=1, color=colour, label="no loop")
    axes.axhspan(100 * low, 100 * high, color=colour, alpha=0.08, linewidth=0)
    loops = sorted({k for line in members.values() for k, _ in line})
    axes.set_xticks(loops)
    axes.set(xlabel="loops K", ylabel="score, %, 95 % interval", ylim=(-2, 102))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{scores.header['model']}, {len(scores.problems)} problems")
    return figure


def draw_lengths(scores: Scores, pyplot: Any) -> Any:
    """Change against no looping in points, a map of context length x K for each kind."""
    members, lengths = groups(scores), scores.lengths()
    widths = [max(len(line), 1.6) for line in members.values()]
    figure, axes = pyplot.subplots(
        1,
        len(members),
        figsize=(max(1.5 + 0.5 * sum(widths) + 0.3 * len(members), 5), 1.5 + 0.5 * len(lengths)),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    parts = [scores.of(lambda p, n=n: p[1] == n).values for n in lengths]  # type: ignore[misc]
    for axis, (name, line) in zip(axes[0], members.items(), strict=True):
        grid = [[100 * float((part[i] - part[0]).mean()) for _, i in line] for part in parts]
        image = axis.imshow(grid, cmap="RdBu", vmin=-100, vmax=100, aspect="auto")
        for y, row in enumerate(grid):
            for x, change in enumerate(row):
                colour = "white" if abs(change) > 60 else "black"
                axis.text(x, y, f"{change:+.0f}", ha="center", va="center", color=colour)
        axis.grid(False)
        axis.set_xticks(range(len(line)), [k for k, _ in line])
        axis.set_yticks(range(len(lengths)), lengths)
        axis.set(xlabel="loops K")
        axis.set_title(name.replace(", ", "\n"), fontsize=8)
    axes[0][0].set_ylabel("context, tokens")
    figure.colorbar(image, ax=axes[0].tolist(), label="change, points")
    return figure


# --- Files ---


def _lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        header, *rows = map(json.loads, path.read_text().splitlines())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return header, rows


def _seconds(path: Path) -> dict[str, float]:
    """Seconds per answer of each setting, as far as they were measured."""
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            total = spent[json.dumps(row["loop"])]
            total[0] += row["seconds"]
            total[1] += row["answers"]
    return {key: seconds / answers for key, (seconds, answers) in spent.items()}
