"""What `sweep` and `evaluate` share: the settings, the bar while they are measured, the table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.progress import Progress
from rich.table import Table

from ..errors import UserError
from ..measure.comparison import distinct
from ..measure.results import Results
from ..measure.study import extent, run
from ..measure.tasks import Task
from ..models.looped import Looped
from .fields import combinations
from .options import axes_from, load_with_start
from .terminal import busy, plain_table, progress_bar, tell_of_length, unechoed

# Measures a task under views, as far as the results lack it; says whether it came to the end.
Measure = Callable[..., bool]


def load_views(
    args: argparse.Namespace, axes: Mapping[str, Sequence[Any]]
) -> tuple[list[Looped], TokenizerWrapper]:
    """The un-looped model, the settings that the options ask for, else `axes`, and the tokenizer.

    Raises:
        UserError: no setting loops, or as `load`.
    """
    axes = axes_from(args) or axes
    with busy("loading", args.model):
        model, tokenizer, start = load_with_start(args)
    views = distinct(model, combinations(start, axes))
    if len(views) < 2:
        raise UserError("there is no looped setting to compare: give --loops 2 or more")
    return views, tokenizer


@contextmanager
def measuring() -> Iterator[tuple[Progress, Measure]]:
    """A bar on the screen, and `study.run` that moves it and stops at Ctrl-C.

    What was answered is kept line by line, so Ctrl-C may drop the batch at hand.
    """
    told = False
    with unechoed(), progress_bar() as bars:

        def measure(
            title: str,
            views: Sequence[Looped],
            tokenizer: TokenizerWrapper,
            task: Task,
            results: Results,
            seconds: Path | None = None,
        ) -> bool:
            nonlocal told
            if not told and task.items:
                # The longest in letters: to count the tokens of all would take its time.
                longest = max(task.items, key=lambda item: len(str(item)))
                told = tell_of_length(views[0], task.length(tokenizer, longest))
            total, done = extent(views, task, results)
            bar = bars.add_task(title, total=total, completed=done)
            try:
                run(views, tokenizer, task, results, lambda n: bars.advance(bar, n), seconds)
            except KeyboardInterrupt:
                return False
            return True

        yield bars, measure


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Numbers at the right, words at the left."""
    made = plain_table(*header, left=("verdict",))
    for row in rows:
        made.add_row(*row)
    return made
