"""How far each setting drifts on a study's problems, by the measures of `mlx_loop trace`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..models.looped import Looped
from .results import Row
from .tasks.ruler import Example, Ruler
from .tasks.task import Found, Task
from .trace import Trace, mean, median, trace

# A trace keeps every state of the whole prompt, without chunks.
LONGEST = 4096
MEASURES = {
    "growth": "residual, last pass over first, median",
    "kl": "KL of the model's head to the plain pass, nats",
    "norm": "norm over the plain pass's, mean distance from 1",
}


def traced(problems: Sequence[Example], count: int) -> list[Example]:
    """The first `count` problems of each length that is not too long, from all tasks in turn."""
    chosen: list[Example] = []
    for length in dict.fromkeys(e.length for e in problems if e.length <= LONGEST):
        of_length = [e for e in problems if e.length == length]
        chosen += sorted(of_length, key=lambda e: e.index)[:count]
    return chosen


def measures(found: Trace) -> dict[str, float]:
    """Those of `MEASURES`; the worst loop's where layers loop one by one."""
    return {
        "growth": max(median(loop.growth) for loop in found.loops),
        "kl": max(mean(loop.result.lens_kl) for loop in found.loops),
        "norm": max(mean([abs(n - 1) for n in loop.result.norm]) for loop in found.loops),
    }


class Drift(Task):
    """Traces of problems under looped settings.

    A row has the measures of `MEASURES` over the tokens of the prompt, and the trace's verdict.
    """

    numbers = ()  # What diverges may have none.

    def __init__(self, problems: Ruler):
        """The problems of which there are to be traces; `Ruler` knows their prompts."""
        self.items, self._prompt = problems.items, problems.prompt

    def measure(
        self, views: Sequence[Looped], tokenizer: TokenizerWrapper, items: Sequence[Row]
    ) -> Iterator[list[Found]]:
        (item,) = items
        tokens = self._prompt(tokenizer, item)
        for number, view in enumerate(views):
            found = trace(view, tokens)
            row = {"item": item["item"], "length": item["length"], **measures(found)}
            row["verdict"] = found.verdict
            yield [Found(number, [row])]
