"""The guard: a token whose loop went astray leaves it with its natural pass instead.

Everything happens on the device, token by token, and the count of firings stays there until
somebody reads it, so decoding never waits.
"""

from __future__ import annotations

from functools import lru_cache, partial

import mlx.core as mx
import numpy as np

from ..settings import Guard, ResolvedLoop
from .integrate import Pass, Steps, follow, steps


def integrate_guarded(
    g: Pass, x0: mx.array, loop: ResolvedLoop, guard: Guard
) -> tuple[mx.array, mx.array]:
    """`integrate`, with the natural pass g(x0) for every token whose loop left the limits.

    They are that the residual |g(x) - x| of the last evaluation is at most `growth` times the
    first one's, and that the norm of the result is within `band` times that of g(x0). A value
    that is not a number is outside.

    Returns:
        The state that leaves the loop, as `integrate`; and where the guard fired,
        (batch, length, 1), bool.
    """
    guarded: tuple[mx.array, mx.array] = follow(g, guarded_steps(x0, loop, guard))
    return guarded


def guarded_steps(x0: mx.array, loop: ResolvedLoop, guard: Guard) -> Steps:
    """`integrate_guarded`, of which somebody else makes the evaluations; returns the same two."""
    loop_steps = steps(x0, loop)
    x, between = next(loop_steps)
    first: mx.array | None = None
    while True:
        gx = yield x, between
        first = gx if first is None else first
        last = x, gx
        try:
            x, between = loop_steps.send(gx)
        except StopIteration as end:
            return _guarded(_squares(guard), end.value, first, *last, x0)


class Count:
    """How often a guard fired, summed on the device."""

    _fired: mx.array
    _loops: int

    def __init__(self) -> None:
        self._start()

    def add(self, fired: mx.array, out: mx.array) -> mx.array:
        """`out`, which from now on brings the count up to date whenever it is evaluated.

        Without that tie the sum would be a graph that grows with every token.
        """
        self._fired = self._fired + mx.sum(fired)
        self._loops += fired.size
        tied: list[mx.array] = mx.depends([out], [self._fired])
        return tied[0]

    def take(self) -> tuple[int, int]:
        """(firings, tokens times loops), since the last call. It waits for the device."""
        counts = int(self._fired), self._loops
        self._start()
        return counts

    def _start(self) -> None:
        self._fired, self._loops = mx.array(0), 0


# Squares are compared: one reduction for each norm and no root.


@lru_cache(maxsize=64)
def _squares(guard: Guard) -> mx.array:
    # Not an operation: what is pending belongs to the thread that asked for it. No infinity,
    # which times a norm of zero would be no number.
    largest = float(np.finfo(np.float32).max)
    return mx.array([min(x * x, largest) for x in (guard.growth, *guard.band)], dtype=mx.float32)


@partial(mx.compile, shapeless=True)
def _guarded(
    limits: mx.array, out: mx.array, natural: mx.array, x: mx.array, gx: mx.array, x0: mx.array
) -> tuple[mx.array, mx.array]:
    growth, low, high = limits[0], limits[1], limits[2]
    first, last = _square(natural, x0), _square(gx, x)
    norm, plain = _square(out), _square(natural)
    steady = last <= growth * first
    fired = ~(steady & (norm >= low * plain) & (norm <= high * plain))
    return mx.where(fired, natural, out), fired


def _square(y: mx.array, minus: mx.array | None = None) -> mx.array:
    wide = y.astype(mx.float32)
    if minus is not None:
        wide = wide - minus.astype(mx.float32)
    return mx.sum(wide * wide, axis=-1, keepdims=True)
