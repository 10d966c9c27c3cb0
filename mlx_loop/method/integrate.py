"""Making a step: g is evaluated, and states are formed from what it gave."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..integrators import INTEGRATORS
from ..settings import ResolvedLoop
from .kernels import Anderson, Form, Rescale, combine, update
from .plan import Combination, input_of, is_linear, output_of, plan

Between = Callable[[int, mx.array], mx.array]

Steps = Generator[tuple[mx.array, Between | None], mx.array, Any]
"""A loop under way: it asks for evaluations (x, between) of g, is sent g(x), and returns."""


class Pass(Protocol):
    """g: one pass over the window, (batch, length, hidden) -> the same shape and dtype.

    `between(i, h)`, where given, replaces the output h of the window's i-th layer before it goes
    on to the next.
    """

    def __call__(self, x: mx.array, between: Between | None = None) -> mx.array: ...


def integrate(g: Pass, x0: mx.array, loop: ResolvedLoop) -> mx.array:
    """The state that leaves the loop.

    Args:
        g: one pass over the window. Its first call is the natural pass, g(x0).
        x0: (batch, length, hidden), the residual stream that enters the window.
    """
    out: mx.array = follow(g, steps(x0, loop))
    return out


def steps(x0: mx.array, loop: ResolvedLoop) -> Steps:
    """`integrate`, of which somebody else makes the evaluations; returns the state."""
    run = linear if is_linear(loop) else NONLINEAR[loop.integrator]
    return run(Step(x0, loop), x0, loop)


def follow(g: Pass, steps: Steps) -> Any:
    """Make the evaluations that a loop asks for; what it returns."""
    try:
        x, between = next(steps)
        while True:
            x, between = steps.send(g(x) if between is None else g(x, between))
    except StopIteration as end:
        return end.value


class Step:
    """The two things that an integrator does: ask for g, and form states by one update each.

    Where an iterate's norm is set, it lies between |x0| and |g(x0)|, token by token. The first
    update that needs these two measures them in its own pass over the states.
    """

    def __init__(self, x0: mx.array, loop: ResolvedLoop):
        self._x0, self._loop = x0, loop
        self._natural: mx.array | None = None
        self._ends: mx.array | None = None

    def g(self, x: mx.array, between: Between | None = None) -> Steps:
        """One pass."""
        out = yield x, between
        if self._natural is None:
            self._natural = out
        return out

    def form(self, k: int | None, form: Form, states: Sequence[mx.array]) -> mx.array:
        """Iterate k, or for None an intermediate stage, in `form` (`kernels.update`)."""
        at = None if k is None else self._norm_at(k)
        rescale = None if at is None else Rescale(at, self._ends)
        measure: list[list[float]] = []
        if rescale is not None and self._ends is None:
            assert self._natural is not None
            ends = (self._x0, self._natural)
            states = [*states, *(end for end in ends if all(end is not y for y in states))]
            measure = [[float(y is end) for y in states] for end in ends]
        found = update(form, states, measure=measure, rescale=rescale)
        self._ends = self._ends if found.norms is None else found.norms
        return found.out

    def _norm_at(self, k: int) -> float | None:
        """Where iterate k's norm lies: 0 is |x0|, 1 is |g(x0)|; None: it stays as it is."""
        if INTEGRATORS[self._loop.integrator].sets_norm:
            return 0.0
        if self._loop.norm == "free" or k == self._loop.loops:
            return None
        return k / self._loop.loops


def linear(step: Step, x0: mx.array, loop: ResolvedLoop) -> Steps:
    """The step of any tableau."""
    todo = plan(loop)
    states: dict[int, mx.array] = {input_of(0): x0}

    def formed(combination: Combination, k: int | None) -> mx.array:
        return step.form(k, combination.coefficients, [states[i] for i in combination.states])

    for i, stage in enumerate(todo.stages):
        if stage is None:
            continue
        if i:
            k, intermediate = divmod(i, todo.stages_per_loop)
            states[input_of(i)] = formed(stage, None if intermediate else k)
        states[output_of(i)] = yield from step.g(states[input_of(i)])
    return formed(todo.out, len(todo.stages) // todo.stages_per_loop)


def anderson(step: Step, x0: mx.array, loop: ResolvedLoop) -> Steps:
    """Anderson acceleration of x <- g(x) over the last `memory` differences (`kernels.Anderson`).

    Each token on its own: no token sees a later one. Walker, Ni 2011.
    """
    memory, damping = loop.memory, loop.damping
    assert memory is not None
    assert damping is not None
    pairs = [x0, (yield from step.g(x0))]
    x = step.form(1, (1 - damping, damping), pairs)
    for k in range(2, loop.loops + 1):
        pairs = [x, (yield from step.g(x)), *pairs][: 2 * (memory + 1)]
        x = step.form(k, Anderson(damping), pairs)
    return x


def aitken(step: Step, x0: mx.array, loop: ResolvedLoop) -> Steps:
    """Aitken's delta-squared in each coordinate, `x <- x - d1^2 / d2`, K / 2 times.

    d1 = g(x) - x and d2 = g(g(x)) - 2 g(x) + x. No coordinate moves further than the naive step
    |d1|, and one whose d2 is lost in rounding takes the naive step. [TFL].
    """
    x = x0
    for k in range(2, loop.loops + 1, 2):
        g1 = yield from step.g(x)
        g2 = yield from step.g(g1)
        x = step.form(k, "aitken", (x, g1, g2))
    return x


def uniform(step: Step, x0: mx.array, loop: ResolvedLoop) -> Steps:
    """At each layer the mean of its outputs over the passes so far goes on to the next. [TFL]."""
    means: dict[int, mx.array] = {}
    x = x0
    for k in range(1, loop.loops + 1):

        def mean(layer: int, h: mx.array, k: int = k) -> mx.array:
            before = means.get(layer, h)
            means[layer] = combine((1 - 1 / k, 1 / k), (before, h))
            return means[layer]

        gx = yield from step.g(x, mean)
        x = step.form(k, (1.0,), (gx,))
    return x


NONLINEAR = {"anderson": anderson, "aitken": aitken, "uniform": uniform}
