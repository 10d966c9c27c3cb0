"""How far each setting drifts on a study's problems, by the measures of `mlx_loop trace`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..models.looped import Looped
from .study import Study, item_name
from .sweep import Results
from .tasks import ruler
from .trace import mean, trace

DRIFT = "drift.jsonl"
# A trace keeps every state of the whole prompt, without chunks.
LONGEST = 4096
MEASURES = {
    "growth": "residual, last pass over first, median",
    "kl": "KL of the model's head to the plain pass, nats",
    "norm": "norm over the plain pass's, mean distance from 1",
}


def traced(problems: Sequence[ruler.Example], count: int) -> list[ruler.Example]:
    """The first `count` problems of each length that is not too long, from all tasks in turn."""
    chosen: list[ruler.Example] = []
    for length in dict.fromkeys(e.length for e in problems if e.length <= LONGEST):
        of_length = [e for e in problems if e.length == length]
        chosen += sorted(of_length, key=lambda e: e.index)[:count]
    return chosen


def measure(
    views: Sequence[Looped],
    tokenizer: TokenizerWrapper,
    study: Study,
    problems: Sequence[ruler.Example],
    results: Results,
    advance: Callable[[int], bool],
) -> bool:
    """Trace the problems under every looped setting, as far as `results` lacks them.

    A row has the measures of `MEASURES` over the tokens of the prompt, the worst loop's where
    layers loop one by one, and the trace's verdict.
    """
    for example in problems:
        key = {"item": item_name(example.task, example.length, example.index)}
        tokens = study.prompt(tokenizer, example.prompt, example.answer_prefix)
        for view in views:
            if view.is_unlooped or results.has(view.loop, key):
                continue
            found = trace(view, tokens)
            row = {
                **key,
                "length": example.length,
                "growth": max(_median(loop.growth) for loop in found.loops),
                "kl": max(mean(loop.result.lens_kl) for loop in found.loops),
                "norm": max(mean([abs(n - 1) for n in loop.result.norm]) for loop in found.loops),
                "verdict": found.verdict,
            }
            results.add(view.loop, row)
            if not advance(1):
                return False
    return True


def _median(values: Sequence[float]) -> float:
    return statistics.median(math.inf if math.isnan(value) else value for value in values)
