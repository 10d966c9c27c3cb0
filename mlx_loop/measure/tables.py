"""Results of the library's functions: several answers to prompts, and scores on a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..method.loop import layer_passes
from .comparison import Answer
from .document import Block, Paragraph, Table
from .names import names
from .outcome import HEADER, Outcome, Scores, conclusion, outcomes, rows
from .plots import draw_accuracy, draw_comparison, draw_windows
from .shown import Shown, jsonable
from .trace import short

# Letters of a prompt or an answer that a table shows.
SHOWN = 60


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """What several settings make of prompts.

    Args:
        prompts: as text.
        answers: to each prompt, of each setting; the un-looped one first.
    """

    prompts: Sequence[str]
    answers: Sequence[Sequence[Answer]]

    @property
    def names(self) -> list[str]:
        """Of the settings."""
        return names([answer.loop for answer in self.answers[0]])

    def blocks(self) -> list[Block]:
        header = ["setting", "cost", "KL first", "KL mean", "agreement", "departs at", "answer"]
        out: list[Block] = []
        for prompt, answers in zip(self.prompts, self.answers, strict=True):
            cells = []
            for name, answer in zip(self.names, answers, strict=True):
                numbers = [""] * 4
                if answer.loop is not None and answer.measures is not None:
                    found = answer.measures
                    numbers = [short(found.first_kl), short(found.mean_kl)]
                    numbers += [f"{found.agreement:.0%}", str(_of(answer.departs))]
                cells.append([name, _cost(answer), *numbers, _line(answer.text)])
            out += [Paragraph(_line(prompt)), Table(header, cells, left=["answer"])]
        return out

    def records(self) -> list[dict[str, Any]]:
        """A row for each prompt and setting."""
        return [
            {"prompt": prompt, "setting": name, **answer.to_dict(answers[0])}
            for prompt, answers in zip(self.prompts, self.answers, strict=True)
            for name, answer in zip(self.names, answers, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As `mlx_loop compare --json`, for each prompt."""
        return {
            "prompts": [
                {"prompt": prompt, "answers": [answer.to_dict(answers[0]) for answer in answers]}
                for prompt, answers in zip(self.prompts, self.answers, strict=True)
            ]
        }

    def draw(self, pyplot: Any) -> Any:
        of_settings = list(zip(*self.answers, strict=True))[1:]
        measures = [[a.measures for a in answers if a.measures] for answers in of_settings]
        return draw_comparison(self.names[1:], measures, pyplot)


@dataclass(frozen=True, repr=False)
class Measured(Shown):
    """Scores of several settings on the same problems, each against the un-looped model.

    Args:
        scores: by which settings are compared.
        beside: other scores of the same problems, by title.
        layers: of the model.
        report: the page of the whole report, if one was written.
    """

    scores: Scores
    beside: Mapping[str, Scores] = field(default_factory=dict)
    layers: int = 0
    report: Path | None = None

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """Each setting with its interval and test, the un-looped one first."""
        return outcomes(self.scores)

    @property
    def conclusion(self) -> str:
        """What may be said, in a sentence or two."""
        return conclusion(self.outcomes, len(self.scores.problems))

    def blocks(self) -> list[Block]:
        out: list[Block] = [self._table(self.outcomes), Paragraph(self.conclusion)]
        for title, of in self.beside.items():
            out += [Paragraph(f"{title}, {of.unit}"), self._table(outcomes(of))]
        return out

    def _table(self, found: Sequence[Outcome]) -> Table:
        return Table(HEADER, rows(found, self.layers), left=["verdict"])

    def records(self) -> list[dict[str, Any]]:
        """A row for each setting."""
        return [
            {"setting": one.name, **(one.loop.to_dict() if one.loop else {}), **self._numbers(one)}
            for one in self.outcomes
        ]

    def to_dict(self) -> dict[str, Any]:
        def told(found: Sequence[Outcome]) -> list[dict[str, Any]]:
            return [{"loop": o.loop and o.loop.to_dict(), **self._numbers(o)} for o in found]

        return jsonable(
            {
                **self.scores.header,
                "problems": len(self.scores.problems),
                "planned": self.scores.planned,
                "conclusion": self.conclusion,
                "settings": told(self.outcomes),
                "beside": {title: told(outcomes(of)) for title, of in self.beside.items()},
            }
        )

    def _numbers(self, one: Outcome) -> dict[str, Any]:
        low, high = one.interval
        change_low, change_high = one.change_interval
        return {
            "layer_passes": layer_passes(one.loop, self.layers),
            "score": one.mean,
            "score_low": low,
            "score_high": high,
            "change": one.change,
            "change_low": change_low,
            "change_high": change_high,
            "p": one.p,
            "needed": one.needed,
            "verdict": one.verdict if one.loop else None,
        }

    def draw(self, pyplot: Any) -> Any:
        windows = {loop.window for loop in self.scores.settings if loop}
        if len(windows) == 1 and self.scores.unit == "%":
            return draw_accuracy(self.scores, pyplot)
        return draw_windows(self.outcomes, str(self.scores.header["model"]), pyplot)


def _cost(answer: Answer) -> str:
    layers = len(answer.view.layers)
    return f"+{layer_passes(answer.loop, layers) / layers - 1:.0%}"


def _of(token: int | None) -> Any:
    return "" if token is None else token


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
