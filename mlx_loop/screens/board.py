"""Answers of several settings side by side: columns where the terminal is wide, else rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..foreign import visible
from ..measure.comparison import Answer
from ..measure.names import names
from .terminal import extra_cost

# Stands before the first token that is not the un-looped answer's.
MARK = "▶"
NARROWEST_COLUMN = 24


def notes(answer: Answer, base: Answer) -> list[str]:
    """The numbers under an answer, in a few short lines; `base` is the un-looped one."""
    speed, extra_time = answer.tokens_per_second, answer.extra_time(base)
    lines = [] if speed is None else [f"{speed:.1f} tokens/s"]
    if answer.drafted:
        lines.append(f"{answer.drafted / len(answer.tokens):.0%} of tokens drafted")
    if answer.loop is not None:
        lines.append(extra_cost(answer.view))
        if extra_time is not None:
            lines.append(f"{extra_time:+.0%} time per token")
        if answer.measures is not None:
            measures = answer.measures
            lines.append(f"KL {measures.first_kl:.2g} first, {measures.mean_kl:.2g} mean")
            lines.append(f"agreement {measures.agreement:.0%}")
        if answer.loop.guard is not None and answer.firings[1]:
            lines.append("guard fired {} of {} times".format(*answer.firings))
        if answer.share[1]:
            lines.append(f"{answer.share[0] / answer.share[1]:.0%} of tokens looped")
    return lines


def answer_report(answer: Answer, base: Answer) -> dict[str, Any]:
    """An answer and its numbers, ready for JSON; `base` is the un-looped one."""
    return {**answer.to_dict(base), "notes": notes(answer, base)}


def marked(answer: Answer) -> Text:
    """The text, with the place marked where it departs from the un-looped answer."""
    at = answer.departs
    if at is None:
        return Text(visible(answer.text))
    start, *rest = answer.starts[at:]
    end = rest[0] if rest else len(answer.text)
    return Text.assemble(
        visible(answer.text[:start]),
        (MARK + visible(answer.text[start:end]), "bold yellow"),
        visible(answer.text[end:]),
    )


class Board:
    """All answers, as a rich renderable. In a space of fixed height only the ends are shown."""

    def __init__(self, answers: Sequence[Answer]):
        self._answers = answers
        self._titles = names([answer.loop for answer in answers], brief=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = len(self._answers)
        width = (options.max_width - 3 * count - 1) // count
        if width >= NARROWEST_COLUMN:
            yield self._columns(console, width, options.height)
        else:
            yield from self._rows(console, options.max_width, options.height)

    def _columns(self, console: Console, width: int, height: int | None) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
        for title in self._titles:
            table.add_column(Text(title), width=width)
        numbers = [Text("\n".join(self._notes(answer)), "dim") for answer in self._answers]
        taken = 6 + max(len(text.wrap(console, width)) for text in numbers)
        room = None if height is None else max(height - taken, 1)
        table.add_row(*(_end(marked(a), console, width, room) for a in self._answers))
        table.add_row()
        table.add_row(*numbers)
        return table

    def _rows(self, console: Console, width: int, height: int | None) -> RenderResult:
        room = None if height is None else max(height // len(self._answers) - 3, 1)
        for title, answer in zip(self._titles, self._answers, strict=True):
            yield Text.assemble(
                (title, "bold"), ("  " + " · ".join(self._notes(answer)), "dim"), overflow="fold"
            )
            yield _end(marked(answer), console, width, room)
            yield ""

    def plain(self) -> str:
        """For a pipe: no line is wrapped."""
        parts = []
        for title, answer in zip(self._titles, self._answers, strict=True):
            parts.append(f"{title}: {' · '.join(self._notes(answer))}\n{marked(answer).plain}\n")
        return "\n".join(parts)

    def _notes(self, answer: Answer) -> list[str]:
        return notes(answer, self._answers[0])


def _end(text: Text, console: Console, width: int, room: int | None) -> Text:
    lines = text.wrap(console, width, overflow="fold")
    return Text("\n").join(lines if room is None else lines[-room:])
