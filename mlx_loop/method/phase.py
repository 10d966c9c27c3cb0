"""Where the prompt ends in a cache: what `LoopConfig.decode` needs to know.

mlx-lm feeds the last prompt token alone, and that token decides the answer, so a single token may
still be prompt. Whoever knows says so: `Looped.begin_decode`, `Looped.for_prompt`. Until then
whatever is fed belongs to the prompt.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from ..upstream import mark, marked


@dataclass
class _Phase:
    """What is known of a cache.

    Args:
        prompt_end: the position from which on tokens are generated; None: nobody said.
        singles: single tokens in a row of which nobody said anything.
    """

    prompt_end: int | None = None
    singles: int = 0


def announce(cache: list[Any], prompt_end: int) -> None:
    """Record that the tokens from position `prompt_end` on are generated."""
    mark(cache, _Phase(prompt_end))


def prompt_end(cache: list[Any], length: int) -> int | None:
    """The position from which on tokens are generated, if the next `length` may be among them.

    A second single token of which nobody said anything is most likely a generated one, so that
    is warned of.
    """
    phase: _Phase | None = marked(cache)
    if phase is None or length > 1:
        mark(cache, phase := _Phase())
    if phase.prompt_end is None and length == 1:
        phase.singles += 1
        if phase.singles == 2:
            warnings.warn(
                "every token loops, whatever decode is set to, until model.begin_decode(cache) "
                "says that the prompt is complete; mlx_loop.generate says it itself",
                stacklevel=4,
            )
    return phase.prompt_end
