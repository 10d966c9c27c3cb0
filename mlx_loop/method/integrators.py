"""Integrators: how K evaluations of the window make one step, as pure functions of g and x0.

`g` is one pass over the window and `f(x) = g(x) - x`: the un-looped model is one forward-Euler
step of size 1 on `x' = f(x)`. An integrator whose update is a linear combination of states at
hand is data, an explicit Butcher tableau, and one driver, `_run`, serves them all. The three
that are not linear, `anderson`, `aitken` and `uniform`, are functions beside it.

Sources: [TFL] Training-Free Looped Transformers, arXiv 2605.23872, with the authors' published
code; [HNW] Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, chapter II.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx

from ..settings import LoopConfig
from .kernels import Anderson, Form, Rescale, combine, update

Between = Callable[[int, mx.array], mx.array]


class Window(Protocol):
    """g: one pass over the window, (batch, length, hidden) -> the same shape and dtype.

    `between(i, h)`, where given, replaces the output h of the window's i-th layer before it goes
    on to the next.
    """

    def __call__(self, x: mx.array, between: Between | None = None) -> mx.array: ...


def integrate(g: Window, x0: mx.array, config: LoopConfig) -> mx.array:
    """The state that leaves the loop.

    Args:
        g: one pass over the window. Its first call is the natural pass, g(x0).
        x0: (batch, length, hidden), the residual stream that enters the window.
        config: complete settings (`presets.resolve`).
    """
    integrator = INTEGRATORS[config.integrator]
    loop = _Loop(g, x0, config)
    if isinstance(integrator, Nonlinear):
        return integrator.run(loop, x0, config)
    return _run(_plan(config), loop, x0)


def passes(config: LoopConfig) -> int:
    """How often `integrate` calls g: passes over the window, in layer scope over each layer."""
    integrator = INTEGRATORS[config.integrator]
    return config.loops if isinstance(integrator, Nonlinear) else _plan(config).passes


def is_natural(config: LoopConfig) -> bool:
    """Whether `integrate` returns the natural pass g(x0) itself: K = 1, or `anchored` at beta 1."""
    if isinstance(INTEGRATORS[config.integrator], Nonlinear):
        return config.loops == 1 and config.damping in (None, 1)
    return config.integrator != "norm_stab" and _plan(config).out == NATURAL


# --- Linear integrators: tableaux -----------------------------------------------------------

Row = tuple[Fraction, ...]
Update = Callable[[Row, Row], tuple[Row, Fraction]]


@dataclass(frozen=True)
class Tableau:
    """Butcher's a and b with the step size in them: stage i is `x0 + sum_{j<i} a_ij f(stage j)`.

    Stages 0, n, 2n, ... with n = `stages_per_loop` are iterates, the states after whole loops;
    the stages between are intermediate. The result is blended with `anchor` parts of the natural
    pass g(x0), so the weights of the whole step are `weights`.
    """

    a: tuple[Row, ...]
    b: Row
    stages_per_loop: int = 1
    anchor: Fraction = Fraction(0)

    @property
    def weights(self) -> Row:
        """Butcher's b of the step with its anchor."""
        return tuple((1 - self.anchor) * b + self.anchor * (i == 0) for i, b in enumerate(self.b))


def _tableau(a: Sequence[Sequence[str]], b: Sequence[str]) -> Tableau:
    rows = tuple(tuple(map(Fraction, row)) for row in a)
    return Tableau(rows, tuple(map(Fraction, b)), len(b))


EULER = _tableau([[]], ["1"])
MIDPOINT = _tableau([[], ["1/2"]], ["0", "1"])
HEUN = _tableau([[], ["1"]], ["1/2", "1/2"])
KUTTA3 = _tableau([[], ["1/2"], ["-1", "2"]], ["1/6", "2/3", "1/6"])
RK4 = _tableau([[], ["1/2"], ["0", "1/2"], ["0", "0", "1"]], ["1/6", "1/3", "1/3", "1/6"])


def repeat(step: Tableau, times: int, size: Fraction) -> Tableau:
    """`times` steps of `size` as the one tableau that they amount to."""
    a: list[Row] = []
    done: Row = ()
    for _ in range(times):
        a += [done + tuple(size * x for x in row) for row in step.a]
        done += tuple(size * x for x in step.b)
    return Tableau(tuple(a), done, step.stages_per_loop)


def _classical(step: Tableau) -> Callable[[LoopConfig], Tableau]:
    return lambda config: repeat(step, config.loops, Fraction(1, config.loops))


def _naive(config: LoopConfig) -> Tableau:
    return repeat(EULER, config.loops, Fraction(1))


def _anchored(config: LoopConfig) -> Tableau:
    return replace(_classical(EULER)(config), anchor=Fraction(config.beta))


def _residual_scaled(config: LoopConfig) -> Tableau:
    naive = _naive(config)
    return replace(naive, b=tuple(b / config.loops for b in naive.b))


def _poly_blend(config: LoopConfig) -> Tableau:
    weights = [Fraction(w) for w in config.weights]
    # Rounded decimals: what they miss of 1 goes to the last power.
    weights[-1] += 1 - sum(weights, Fraction(0))
    tails = tuple(sum(weights[j:], Fraction(0)) for j in range(1, len(weights)))
    return replace(_naive(config), b=tails)


def _ema(config: LoopConfig) -> Tableau:
    return _iteration([_mix(alpha) for alpha in _alphas(config)])


def _mix(alpha: Fraction) -> Update:
    return lambda x, before: (x, alpha)


def _alphas(config: LoopConfig) -> list[Fraction]:
    alpha: Any = config.alpha
    return [Fraction(a) for a in (alpha if isinstance(alpha, tuple) else (alpha,) * config.loops)]


def _heavy_ball(config: LoopConfig) -> Tableau:
    a, m = _alphas(config)[0], Fraction(config.momentum)

    def update(x: Row, before: Row) -> tuple[Row, Fraction]:
        return tuple(xi + m * (xi - bi) for xi, bi in zip(x, before, strict=True)), a

    return _iteration([update] * config.loops)


def _input_anchor(config: LoopConfig) -> Tableau:
    a = _alphas(config)[0]
    return _iteration([lambda x, before: (tuple(a * xi for xi in x), a)] * config.loops)


def _iteration(updates: Sequence[Update]) -> Tableau:
    """The tableau of `x_{k+1} = (a combination of x_k, x_{k-1} and x0) + c f(x_k)`.

    Each update takes the rows of x_k and x_{k-1} and gives that combination's row, and c. A row
    holds the weights of f(x_0), f(x_1), ...; x0's own weight is what is missing to 1.
    """
    rows: list[Row] = [(Fraction(0),) * len(updates)] * 2
    for k, next_row in enumerate(updates):
        row, weight = next_row(rows[-1], rows[-2])
        rows.append(tuple(x + weight * (j == k) for j, x in enumerate(row)))
    stages, last = rows[1:-1], rows[-1]
    return Tableau(tuple(row[:k] for k, row in enumerate(stages)), last)


# --- The driver of every tableau ------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """A state as `sum_j coefficients_j * states_j`, by number: `_input(i)` or `_output(i)`."""

    coefficients: tuple[float, ...]
    states: tuple[int, ...]


def _input(stage: int) -> int:
    return 2 * stage


def _output(stage: int) -> int:
    return 2 * stage + 1


NATURAL = Combination((1.0,), (_output(0),))


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
def _plan(config: LoopConfig) -> Plan:
    integrator = INTEGRATORS[config.integrator]
    assert isinstance(integrator, Linear)
    tableau = integrator.tableau(config)
    count = len(tableau.b)
    at_hand: dict[int, Row] = {}
    stages: list[Combination | None] = []
    for i, row in enumerate(tableau.a):
        padded = row + (Fraction(0),) * (count - len(row))
        stages.append(_combination(_express(padded, at_hand, tableau) if i else {_input(0): 1}))
        at_hand[_input(i)] = padded
        at_hand[_output(i)] = tuple(x + (j == i) for j, x in enumerate(padded))
    looped = _express(tableau.b, at_hand, tableau)
    blend = {state: (1 - tableau.anchor) * c for state, c in looped.items()}
    blend[_output(0)] = blend.get(_output(0), 0) + tableau.anchor
    out = _combination(blend)
    needed = {0, *(state // 2 for state in out.states)}
    for i, stage in reversed(list(enumerate(stages))):
        if stage is not None and i in needed:
            needed |= {state // 2 for state in stage.states}
        else:
            stages[i] = None
    return Plan(tuple(stages), out, tableau.stages_per_loop)


def _combination(terms: Mapping[int, Fraction | int]) -> Combination:
    states = tuple(sorted(state for state, c in terms.items() if c))
    return Combination(tuple(float(terms[state]) for state in states), states)


def _express(target: Row, at_hand: Mapping[int, Row], tableau: Tableau) -> dict[int, Fraction]:
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
                is_iterate = state % 2 == 0 and state // 2 % tableau.stages_per_loop == 0
                choices.append((missing, not is_iterate, abs(c), state, c, left))
        *_, state, c, rest = min(choices)
        terms[state] = c
        x0_weight -= c
    terms[_input(0)] = x0_weight
    return terms


def _run(plan: Plan, loop: _Loop, x0: mx.array) -> mx.array:
    states: dict[int, mx.array] = {_input(0): x0}

    def formed(step: Combination, k: int | None) -> mx.array:
        return loop.form(k, step.coefficients, [states[i] for i in step.states])

    for i, stage in enumerate(plan.stages):
        if stage is None:
            continue
        if i:
            k, intermediate = divmod(i, plan.stages_per_loop)
            states[_input(i)] = formed(stage, None if intermediate else k)
        states[_output(i)] = loop.g(states[_input(i)])
    return formed(plan.out, len(plan.stages) // plan.stages_per_loop)


class _Loop:
    """The two things that an integrator does: evaluate g, and form states by one update each.

    Where an iterate's norm is set, it lies between |x0| and |g(x0)|, token by token. The first
    update that needs these two measures them in its own pass over the states.
    """

    def __init__(self, g: Window, x0: mx.array, config: LoopConfig):
        self._g, self._x0, self._config = g, x0, config
        self._natural: mx.array | None = None
        self._ends: mx.array | None = None

    def g(self, x: mx.array, between: Between | None = None) -> mx.array:
        """One pass."""
        out = self._g(x) if between is None else self._g(x, between)
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
        if self._config.integrator == "norm_stab":
            return 0.0
        if self._config.norm == "free" or k == self._config.loops:
            return None
        return k / self._config.loops


# --- Beside the tableaux --------------------------------------------------------------------


def anderson(loop: _Loop, x0: mx.array, config: LoopConfig) -> mx.array:
    """Anderson acceleration of x <- g(x) over the last `memory` differences (`kernels.Anderson`).

    Each token on its own: no token sees a later one. Walker, Ni 2011.
    """
    pairs = [x0, loop.g(x0)]
    x = loop.form(1, (1 - config.damping, config.damping), pairs)
    for k in range(2, config.loops + 1):
        pairs = [x, loop.g(x), *pairs][: 2 * (config.memory + 1)]
        x = loop.form(k, Anderson(config.damping), pairs)
    return x


def aitken(loop: _Loop, x0: mx.array, config: LoopConfig) -> mx.array:
    """Aitken's delta-squared in each coordinate, `x <- x - d1^2 / d2`, K / 2 times.

    d1 = g(x) - x and d2 = g(g(x)) - 2 g(x) + x. No coordinate moves further than the naive step
    |d1|, and one whose d2 is lost in rounding takes the naive step. [TFL].
    """
    x = x0
    for k in range(2, config.loops + 1, 2):
        g1 = loop.g(x)
        x = loop.form(k, "aitken", (x, g1, loop.g(g1)))
    return x


def uniform(loop: _Loop, x0: mx.array, config: LoopConfig) -> mx.array:
    """At each layer the mean of its outputs over the passes so far goes on to the next. [TFL]."""
    means: dict[int, mx.array] = {}
    x = x0
    for k in range(1, config.loops + 1):

        def mean(layer: int, h: mx.array, k: int = k) -> mx.array:
            before = means.get(layer, h)
            means[layer] = combine((1 - 1 / k, 1 / k), (before, h))
            return means[layer]

        x = loop.form(k, (1.0,), (loop.g(x, mean),))
    return x


# --- The table of integrators ---------------------------------------------------------------


@dataclass(frozen=True)
class _Integrator:
    """`order`: of convergence to the flow at t = 1 as K grows; None: it does not aim there.

    `passes_per_loop`: evaluations of g for each of the K loops. `source`: who describes it.
    """

    update: str
    order: int | None
    passes_per_loop: int
    source: str


@dataclass(frozen=True)
class Linear(_Integrator):
    """An integrator that is a tableau."""

    tableau: Callable[[LoopConfig], Tableau]


@dataclass(frozen=True)
class Nonlinear(_Integrator):
    """An integrator that is a function."""

    run: Callable[[_Loop, mx.array, LoopConfig], mx.array]


_HNW = "Hairer, Norsett, Wanner, Solving ODEs I, II.1"
_TFL = "Training-Free Looped Transformers, arXiv 2605.23872"

INTEGRATORS: dict[str, Linear | Nonlinear] = {
    "naive": Linear("x <- g(x)", None, 1, _TFL + ": the control, it degrades", _naive),
    "euler": Linear("x <- x + f(x) / K", 1, 1, _TFL, _classical(EULER)),
    "anchored": Linear("beta g(x0) + (1 - beta) euler", None, 1, _TFL, _anchored),
    "midpoint": Linear("Runge's midpoint step of size 1/K", 2, 2, _HNW, _classical(MIDPOINT)),
    "heun": Linear("Heun's trapezoidal step of size 1/K", 2, 2, _HNW, _classical(HEUN)),
    "kutta3": Linear("Kutta's third-order step of size 1/K", 3, 3, _HNW, _classical(KUTTA3)),
    "rk4": Linear("the classical Runge-Kutta step of size 1/K", 4, 4, _HNW, _classical(RK4)),
    "residual_scaled": Linear("x0 + (g^K(x0) - x0) / K", None, 1, _TFL, _residual_scaled),
    "ema": Linear("x <- (1 - alpha) x + alpha g(x)", None, 1, _TFL, _ema),
    "heavy_ball": Linear(
        "x <- x + alpha f(x) + momentum (x - x_prev)", None, 1, "Polyak 1964; " + _TFL, _heavy_ball
    ),
    "anderson": Nonlinear(
        "Anderson mixing of f over `memory`", None, 1, "Walker, Ni 2011", anderson
    ),
    "aitken": Nonlinear("Aitken's delta-squared per coordinate, K even", None, 1, _TFL, aitken),
    "norm_stab": Linear("ema, then each token at its norm in x0", None, 1, _TFL, _ema),
    "input_anchor": Linear("x <- alpha g(x) + (1 - alpha) x0", None, 1, _TFL, _input_anchor),
    "poly_blend": Linear("sum_k weights_k g^k(x0)", None, 1, _TFL, _poly_blend),
    "uniform": Nonlinear("each layer's mean output over passes", None, 1, _TFL, uniform),
}
