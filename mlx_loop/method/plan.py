"""From a tableau to the fewest states: what a step computes, and what it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from ..integrators import INTEGRATORS, Row, Tableau
from ..settings import ResolvedLoop

ZERO = Fraction(0)
# Loops from which on a steady integrator repeats itself, with none that looks back to the first.
ENOUGH = 6


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


def tableau(loop: ResolvedLoop, loops: int | None = None) -> Tableau:
    """The whole step of a linear integrator, or its first `loops` loops alone."""
    integrator = INTEGRATORS[loop.integrator]
    assert integrator.tableau is not None
    own = {name: getattr(loop, name) for name in integrator.reads}
    if loops is not None and "horizon" in own:
        own["horizon"] = Fraction(own["horizon"]) * loops / loop.loops
    return integrator.tableau(loops or loop.loops, **own)


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
    is_steady = INTEGRATORS[loop.integrator].is_steady and not isinstance(loop.alpha, tuple)
    if loop.loops <= ENOUGH or not is_steady:
        return compiled(tableau(loop))
    return _longer(compiled(tableau(loop, ENOUGH)), loop.loops - ENOUGH)


def _longer(plan: Plan, loops: int) -> Plan:
    """The plan with more loops at its end that do what its last one does."""
    period = plan.stages_per_loop
    last = plan.stages[-period:]
    more = tuple(
        stage and _later(stage, number * period) for number in range(1, loops + 1) for stage in last
    )
    return replace(plan, stages=plan.stages + more, out=_later(plan.out, loops * period))


def _later(combination: Combination, stages: int) -> Combination:
    """The same of states that many stages later, but for the first one and its natural pass."""
    first = input_of(0), output_of(0)
    return replace(
        combination,
        states=tuple(s if s in first else s + input_of(stages) for s in combination.states),
    )


def compiled(step: Tableau) -> Plan:
    """The plan of a tableau that is written out."""
    count = len(step.b)
    # By their last f, so that an elimination looks at the few that can help.
    at_hand: dict[int, list[tuple[int, Row]]] = defaultdict(list)
    stages: list[Combination | None] = []
    for i, row in enumerate(step.a):
        padded = row + (ZERO,) * (count - len(row))
        stages.append(_combination(_express(padded, at_hand, step) if i else {input_of(0): 1}))
        last = max((column for column, x in enumerate(padded) if x), default=-1)
        at_hand[last].append((input_of(i), padded))
        # A stage is made of the f's before its own.
        at_hand[i].append((output_of(i), (*padded[:i], padded[i] + 1, *padded[i + 1 :])))
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


def _express(
    target: Row, at_hand: Mapping[int, Sequence[tuple[int, Row]]], step: Tableau
) -> dict[int, Fraction]:
    """`target` in few of the states at hand: greedy elimination of f's, the last one first."""
    terms: dict[int, Fraction] = {}
    rest, x0_weight = target, Fraction(1)
    for column in reversed(range(len(target))):
        if not rest[column]:
            continue
        choices = []
        for state, row in at_hand[column]:
            c = rest[column] / row[column]
            # Most are the same object in both rows.
            left = tuple(
                ZERO if x is y and c == 1 else x - c * y for x, y in zip(rest, row, strict=True)
            )
            missing = sum(map(bool, (*left, x0_weight - c)))
            # An iterate comes before its equals, because it may be rescaled once formed.
            is_iterate = state % 2 == 0 and state // 2 % step.stages_per_loop == 0
            choices.append((missing, not is_iterate, abs(c), state, c, left))
        *_, state, c, rest = min(choices)
        terms[state] = c
        x0_weight -= c
    terms[input_of(0)] = x0_weight
    return terms
