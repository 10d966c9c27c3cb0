"""Where the prompt ends in a cache: what `LoopConfig.decode` needs to know.

mlx-lm feeds the last prompt token alone, and that token decides the answer, so "one token with a
past" may still be prompt. Whoever knows says so: `Looped.begin_decode`, `Looped.for_prompt`. If
nobody does, the first single token after a prompt is its last one, and a second is refused: it
may be either, and a guess would silently loop, or not loop, the wrong tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cache import position
from .errors import UserError


@dataclass
class _Phase:
    """What is known of a cache. It rides on the first layer's entry, so it dies with it."""

    prompt_end: int | None = None
    single_seen: bool = False


def announce(cache: Sequence[Any], prompt_end: int) -> None:
    """Record that the tokens from position `prompt_end` on are generated."""
    cache[0].loop_phase = _Phase(prompt_end)


def prompt_end(cache: Sequence[Any], length: int) -> int:
    """The position from which on tokens are generated, as far as the next `length` tell.

    Raises:
        UserError: a single token that may be prompt or generated.
    """
    start = position(cache[0])
    phase = getattr(cache[0], "loop_phase", None)
    if phase is None or length > 1:
        phase = cache[0].loop_phase = _Phase()
    if phase.prompt_end is not None:
        return phase.prompt_end
    if length == 1 and start:
        if phase.single_seen:
            raise UserError(
                "cannot tell whether this token belongs to the prompt or was generated, and "
                "decode='bypass' or a number needs to know: call model.begin_decode(cache) after "
                "the prompt, generate with mlx_loop.generate, or set decode='full'"
            )
        phase.single_seen = True
    return start + length
