"""From a tableau to the fewest states: what a step computes, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from ..integrators import INTEGRATORS, Row, Tableau
from ..settings import ResolvedLoop


def passes(loop: ResolvedLoop) -> int:
    """How often g is called: passes over the window, in layer scope over each layer."""
    return plan(loop).passes if is_linear(loop) else loop.loops


def is_natural(loop: ResolvedLoop) -> bool:
    """Whether the step is the natural pass g(x0) itself: K = 1, or `anchored` at beta 1."""
    if not is_linear(loop):
        return loop.loops == 1 and loop.damping in (None, 1)
    return not INTEGRATORS[loop.integrator].sets_norm and plan(loop).out == NATURAL


def is_linear(loop: ResolvedLoop) -> bool:
    """Whether the integrator is a tableau."""
    return INTEGRATORS[loop.integrator].tableau is not None


def tableau(loop: ResolvedLoop) -> Tableau:
    """The whole step of a linear integrator."""
    integrator = INTEGRATORS[loop.integrator]
    assert integrator.tableau is not None
    return integrator.tableau(
        loop.loops, **{name: getattr(loop, name) for name in integrator.reads}
    )


@dataclass(frozen=True)
class Combination:
    """A state as `sum_j coefficients_j * states_j`, by number: `input_of(i)` or `output_of(i)`."""

    coefficients: tuple[float, ...]
    states: tuple[int, ...]


def input_of(stage: int) -> int:
    """The number of the state that a stage starts from."""
    return 2 * stage


def output_of(stage: int) -> int:
    """The number of g of that state."""
    return 2 * stage + 1


NATURAL = Combination((1.0,), (output_of(0),))


@dataclass(frozen=True)
class Plan:
    """A tableau in Shu-Osher form: each stage and the result from the fewest states at hand.

    For forward Euler that is `(1-s) x + s g(x)` however many loops there are, so memory and
    arithmetic do not grow with K. A stage that nothing needs is None.
    """

    stages: tuple[Combination | None, ...]
    out: Combination
    stages_per_loop: int

    @property
    def passes(self) -> int:
        return sum(stage is not None for stage in self.stages)


@lru_cache(maxsize=256)
def plan(loop: ResolvedLoop) -> Plan:
    """The plan of a linear integrator's step."""
    step = tableau(loop)
    count = len(step.b)
    at_hand: dict[int, Row] = {}
    stages: list[Combination | None] = []
    for i, row in enumerate(step.a):
        padded = row + (Fraction(0),) * (count - len(row))
        stages.append(_combination(_express(padded, at_hand, step) if i else {input_of(0): 1}))
        at_hand[input_of(i)] = padded
        at_hand[output_of(i)] = tuple(x + (j == i) for j, x in enumerate(padded))
    looped = _express(step.b, at_hand, step)
    blend = {state: (1 - step.anchor) * c for state, c in looped.items()}
    blend[output_of(0)] = blend.get(output_of(0), 0) + step.anchor
    out = _combination(blend)
    needed = {0, *(state // 2 for state in out.states)}
    for i, stage in reversed(list(enumerate(stages))):
        if stage is not None and i in needed:
            needed |= {state // 2 for state in stage.states}
        else:
            stages[i] = None
    return Plan(tuple(stages), out, step.stages_per_loop)


def _combination(terms: Mapping[int, Fraction | int]) -> Combination:
    states = tuple(sorted(state for state, c in terms.items() if c))
    return Combination(tuple(float(terms[state]) for state in states), states)


def _express(target: Row, at_hand: Mapping[int, Row], step: Tableau) -> dict[int, Fraction]:
    """`target` in few of the states at hand: greedy elimination of f's, the last one first."""
    terms: dict[int, Fraction] = {}
    rest, x0_weight = target, Fraction(1)
    for column in reversed(range(len(target))):
        if not rest[column]:
            continue
        choices = []
        for state, row in at_hand.items():
            if row[column] and not any(row[column + 1 :]):
                c = rest[column] / row[column]
                left = tuple(x - c * y for x, y in zip(rest, row, strict=True))
                missing = sum(map(bool, (*left, x0_weight - c)))
                # An iterate comes before its equals, because it may be rescaled once formed.
                is_iterate = state % 2 == 0 and state // 2 % step.stages_per_loop == 0
                choices.append((missing, not is_iterate, abs(c), state, c, left))
        *_, state, c, rest = min(choices)
        terms[state] = c
        x0_weight -= c
    terms[input_of(0)] = x0_weight
    return terms
