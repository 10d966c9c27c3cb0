"""Which tokens loop: where the prompt ends in a cache, and what the settings make of that.

mlx-lm feeds the last prompt token alone, and that token decides the answer, so a single token may
still be prompt. Whoever knows says so: `Looped.begin_decode`, `Looped.for_prompt`. Until then
`decode` takes whatever is fed for a prompt. `prompt` and `gate` tell the answer's tokens, the last
one of the prompt and the generated ones, by being fed alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ..settings import ResolvedLoop
from ..upstream import mark, marked
from .cache import tokens_seen

How = Literal["plain", "looped", "gated"]


@dataclass
class _Phase:
    """What is known of a cache.

    Args:
        prompt_end: the position from which on tokens are generated; None: nobody said.
        singles: single tokens in a row of which nobody said anything.
        fed: tokens that a cache was fed which does not count them.
    """

    prompt_end: int | None = None
    singles: int = 0
    fed: int = 0


def _phase(cache: Sequence[Any]) -> _Phase:
    return marked(cache) or _Phase()


def seen(cache: Sequence[Any], length: int = 0) -> int:
    """How many tokens came before the next `length`, which recurrent state alone does not tell:
    for that they are counted here.
    """
    found = tokens_seen(cache)
    if found is not None:
        return found
    phase = _phase(cache)
    phase.fed += length
    mark(cache, phase)
    return phase.fed - length


def announce(cache: list[Any], prompt_end: int) -> None:
    """Record that the tokens from position `prompt_end` on are generated."""
    mark(cache, _Phase(prompt_end, fed=_phase(cache).fed))


def prompt_end(cache: list[Any], length: int, warns: bool) -> int | None:
    """The position from which on tokens are generated, if the next `length` may be among them.

    A second single token of which nobody said anything is most likely a generated one, so that
    is warned of where it matters.
    """
    phase = _phase(cache)
    if length > 1:
        phase = _Phase(fed=phase.fed)
    mark(cache, phase)
    if phase.prompt_end is None and length == 1:
        phase.singles += 1
        if phase.singles == 2 and warns:
            warnings.warn(
                "every token loops, whatever decode is set to, until model.begin_decode(cache) "
                "says that the prompt is complete; mlx_loop.generate says it itself",
                stacklevel=4,
            )
    return phase.prompt_end


def spans(loop: ResolvedLoop, seen: int, length: int, end: int | None) -> list[tuple[slice, How]]:
    """How the next tokens pass, in parts of the next call; gated ones pass one by one.

    Args:
        seen, length: how many tokens came before, and come now.
        end: the position from which on tokens are generated; None: nobody knows.
    """
    answer: float = seen
    if loop.prompt == "plain" or loop.gate is not None:
        answer = end - 1 if end is not None else seen if length == 1 else math.inf
    stop = math.inf
    if loop.decode != "full" and end is not None:
        stop = end + (0 if loop.decode == "bypass" else int(loop.decode))
    cuts = {seen, seen + length, *(int(x) for x in (answer, stop) if seen < x < seen + length)}
    found: list[tuple[slice, How]] = []
    for start, to in pairwise(sorted(cuts)):
        how: How = "looped" if loop.gate is None else "gated"
        if start < answer:
            how = "plain" if loop.prompt == "plain" else "looped"
        how = "plain" if start >= stop else how
        size = 1 if how == "gated" else to - start
        found += [(slice(i - seen, i - seen + size), how) for i in range(start, to, size)]
    return found
