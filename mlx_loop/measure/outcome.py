"""What scores say: every setting by itself, and against the un-looped model problem by problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method.loop import layer_passes
from ..settings import ResolvedLoop
from .names import names
from .significance import LEVEL, holm, mean_interval, paired, verdict

Problem = tuple[str, int | None, Any]  # task, length, index
HEADER = ["setting", "cost", "score", "difference", "p", "to see", "verdict"]
# Its multiples, without their whole parts, are spread as evenly as can be, however many there are.
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Outcome:
    """One setting over all problems, and against the un-looped model.

    Args:
        loop: complete settings; None: the un-looped model.
        mean, interval: of the score.
        change, change_interval: against the un-looped model, over problems.
        p: of the paired test, corrected by Holm for the number of settings.
        needed: problems that would show this change; None: there is none.
        better: 1 where more is better, -1 where less is.
        unit: of the score: `%` for 0 to 1, or another one.
    """

    loop: ResolvedLoop | None
    name: str
    mean: float
    interval: tuple[float, float]
    change: float = 0.0
    change_interval: tuple[float, float] = (0.0, 0.0)
    p: float = 1.0
    needed: int | None = None
    better: int = 1
    unit: str = "%"

    @property
    def is_distinguishable(self) -> bool:
        return self.p < LEVEL

    @property
    def verdict(self) -> str:
        return verdict(self.better * self.change, self.p)

    def said(self) -> str:
        """The score with its interval."""
        return self._said("", self.mean, *self.interval)

    def said_change(self) -> str:
        """The change with its interval."""
        return self._said("+", self.change, *self.change_interval)

    def _said(self, sign: str, *numbers: float) -> str:
        form, scale = (".1f", 100) if self.unit == "%" else (".4f", 1)
        middle, low, high = (f"{scale * number:{sign}{form}}" for number in numbers)
        return f"{middle} [{low}, {high}]"


@dataclass(frozen=True)
class Scores:
    """The same problems under every setting.

    Args:
        settings: complete settings, None (the un-looped model) first.
        problems: those that every setting has answered.
        values: (settings, problems).
        planned: problems that there are.
        header: the configuration of the study.
        better, unit: as in `Outcome`.
    """

    settings: Sequence[ResolvedLoop | None]
    problems: list[Problem]
    values: NDArray[np.float64]
    planned: int
    header: Mapping[str, Any] = field(default_factory=dict)
    better: int = 1
    unit: str = "%"

    @property
    def names(self) -> list[str]:
        return names(self.settings)

    def of(self, wanted: Callable[[Problem], bool]) -> Scores:
        """The part with some of the problems."""
        chosen = [i for i, problem in enumerate(self.problems) if wanted(problem)]
        problems = [self.problems[i] for i in chosen]
        return replace(self, problems=problems, values=self.values[:, chosen])

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _, _ in self.problems))

    def lengths(self) -> list[int]:
        return sorted({length for _, length, _ in self.problems if length is not None})


def outcomes(scores: Scores, chosen: int | None = None) -> list[Outcome]:
    """Every setting, the un-looped one first; there is at least one problem.

    Args:
        chosen: number of the one setting that is tested; None: all are.
    """
    bounded = scores.unit == "%"
    tested = range(len(scores.settings)) if chosen is None else (0, chosen)
    found = []
    for i in tested:
        pair = paired(scores.values[i], scores.values[0], bounded=bounded)
        found.append(
            Outcome(
                scores.settings[i],
                scores.names[i],
                float(scores.values[i].mean()),
                mean_interval(scores.values[i], bounded=bounded),
                pair.difference,
                (pair.low, pair.high),
                pair.p,
                pair.needed,
                scores.better,
                scores.unit,
            )
        )
    adjusted = [1.0, *holm([outcome.p for outcome in found[1:]])]
    return [replace(outcome, p=p) for outcome, p in zip(found, adjusted, strict=True)]


def split(problems: Sequence[Problem], share: float) -> list[bool]:
    """Whether each problem is held out: this share of every task and length.

    It depends on the problem alone, so that a study that goes on keeps its split. Problems are
    independent of their numbers, so multiples of the golden ratio are as good as chance, and they
    divide every few neighbours as evenly as can be.
    """
    return [(index + 1) * GOLDEN % 1 < share for _, _, index in problems]


@dataclass(frozen=True)
class HeldOut:
    """A setting that was chosen on one part of the problems, on the other part.

    Args:
        plain, winner: no looping and the chosen setting, on the problems held out. It is one test:
            these problems had no part in the choice.
        chosen_on, reported_on: numbers of problems.
        tried: settings that there was a choice of.
    """

    plain: Outcome
    winner: Outcome
    chosen_on: int
    reported_on: int
    tried: int

    def __str__(self) -> str:
        return (
            f"Best of {self.tried} settings on {self.chosen_on} problems: {self.winner.name}. On "
            f"the other {self.reported_on} problems it scores {self.compared}."
        )

    @property
    def compared(self) -> str:
        """Both scores, their difference and what it says."""
        points = "points" if self.winner.unit == "%" else self.winner.unit
        return (
            f"{self.winner.said()} and no looping {self.plain.said()}: "
            f"{self.winner.said_change()} {points}, p = {self.winner.p:.2g}, {self.winner.verdict}"
        )


def held_out(scores: Scores, share: float, loop: ResolvedLoop | None = None) -> HeldOut | None:
    """The best setting on some problems, and what it does on this share of them.

    Args:
        loop: the setting, where another score has chosen it.

    Returns:
        None: there are too few problems to split.
    """
    held = dict(zip(scores.problems, split(scores.problems, share), strict=True))
    choosing, reporting = scores.of(lambda p: not held[p]), scores.of(lambda p: held[p])
    if not choosing.problems or not reporting.problems:
        return None
    means = scores.better * choosing.values[1:].mean(axis=1)
    chosen = 1 + int(means.argmax()) if loop is None else scores.settings.index(loop)
    plain, winner = outcomes(reporting, chosen)
    sizes = len(choosing.problems), len(reporting.problems)
    return HeldOut(plain, winner, *sizes, len(scores.settings) - 1)


def said_held_out(held: HeldOut | None, others: Mapping[str, Scores], share: float) -> list[str]:
    """`held` in sentences, and the same setting by other scores of the same problems."""
    if held is None:
        return ["There are too few problems to split."]
    same = {title: held_out(scores, share, held.winner.loop) for title, scores in others.items()}
    return [str(held), *(f"By {title}: {of.compared}." for title, of in same.items() if of)]


def best(found: Sequence[Outcome]) -> Outcome | None:
    """The setting with the best mean of those distinguishably better than no looping, if any."""
    won = [outcome for outcome in found if outcome.verdict == "better"]
    return max(won, key=lambda outcome: outcome.better * outcome.mean, default=None)


def conclusion(found: Sequence[Outcome], problems: int) -> str:
    """What may be said, in a sentence or two."""
    tried = len(found) - 1
    corrected = f", corrected for {tried} settings" if tried > 1 else ""
    how = f"{problems} problems, exact paired test{corrected}, 5 %"
    parts, rest = [], tried
    for word in ("better", "worse"):
        which = [outcome.name for outcome in found if outcome.verdict == word]
        if which:
            parts.append(f"{word.capitalize()} than no looping: {'; '.join(which)}.")
            rest -= len(which)
    if not parts:
        # The smallest p that n problems can have is 2^(1 - n), where all differ in one direction.
        fewest = math.floor(1 + math.log2(max(tried, 1) / LEVEL)) + 1
        few = f" So few can show nothing: it takes {fewest}." if problems < fewest else ""
        return f"No detectable difference between any setting and no looping ({how}).{few}"
    if rest:
        parts.append(f"No detectable difference: the other {rest}.")
    return f"{' '.join(parts)} ({how[0].upper()}{how[1:]}.)"


def rows(found: Sequence[Outcome], layers: int) -> list[list[str]]:
    """The cells of `HEADER` for each setting.

    Args:
        layers: of the model; costs are layer passes of a looped token beyond the plain model's.
    """
    out = []
    for outcome in found:
        cost = layer_passes(outcome.loop, layers) / layers - 1
        gated = outcome.loop is not None and outcome.loop.gate is not None
        row = [outcome.name, f"{'<= ' if gated else ''}+{cost:.0%}", outcome.said(), "", "", "", ""]
        if outcome.loop is not None:
            needed = "" if outcome.needed is None else str(outcome.needed)
            row[3:] = [outcome.said_change(), f"{outcome.p:.2g}", needed, outcome.verdict]
        out.append(row)
    return out
