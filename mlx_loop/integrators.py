"""The integrators, as data: how K evaluations of the window make one step.

`g` is one pass over the window and `f(x) = g(x) - x`: the un-looped model is one forward-Euler
step of size 1 on `x' = f(x)`. An integrator whose update is a linear combination of states at
hand is an explicit Butcher tableau: a table entry and a function of a line or two. The three
that are not linear are functions in `method.integrate`.

Sources: [TFL] Training-Free Looped Transformers, arXiv 2605.23872, with the authors' published
code; [HNW] Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, chapter II.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

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


def _classical(step: Tableau) -> Callable[..., Tableau]:
    return lambda loops, horizon: repeat(step, loops, Fraction(horizon) / loops)


def _naive(loops: int) -> Tableau:
    return repeat(EULER, loops, Fraction(1))


def _anchored(loops: int, beta: float, horizon: float) -> Tableau:
    return replace(_classical(EULER)(loops, horizon), anchor=Fraction(beta))


def _residual_scaled(loops: int) -> Tableau:
    naive = _naive(loops)
    return replace(naive, b=tuple(b / loops for b in naive.b))


def _poly_blend(loops: int, weights: Sequence[float]) -> Tableau:
    exact = [Fraction(w) for w in weights]
    # Rounded decimals: what they miss of 1 goes to the last power.
    exact[-1] += 1 - sum(exact, Fraction(0))
    tails = tuple(sum(exact[j:], Fraction(0)) for j in range(1, len(exact)))
    return replace(_naive(loops), b=tails)


def _ema(loops: int, alpha: float | tuple[float, ...]) -> Tableau:
    steps = alpha if isinstance(alpha, tuple) else (alpha,) * loops

    def mix(step: Fraction) -> Update:
        return lambda x, before: (x, step)

    return _iteration([mix(Fraction(step)) for step in steps])


def _heavy_ball(loops: int, alpha: float, momentum: float) -> Tableau:
    a, m = Fraction(alpha), Fraction(momentum)

    def update(x: Row, before: Row) -> tuple[Row, Fraction]:
        return tuple(xi + m * (xi - bi) for xi, bi in zip(x, before, strict=True)), a

    return _iteration([update] * loops)


def _input_anchor(loops: int, alpha: float) -> Tableau:
    a = Fraction(alpha)
    return _iteration([lambda x, before: (tuple(a * xi for xi in x), a)] * loops)


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


@dataclass(frozen=True)
class Integrator:
    """One of the ways to make a step.

    Args:
        words: what it does, for those who choose one.
        update: the same as a formula or in the words of the field.
        source: who describes it.
        tableau: (K, the settings in `reads`) -> its tableau; None: it is not linear.
        order: of convergence to the flow at t = T as K grows; None: it does not aim there.
        passes_per_loop: evaluations of g for each of the K loops.
        reads: the fields of `LoopConfig` that are its own, with their defaults; a function: of K.
        even: whether K must be.
        is_steady: whether each loop does what the one before did, but for the size of its step.
        sets_norm: whether it brings every iterate to a norm of its own choice.
    """

    words: str
    update: str
    source: str
    tableau: Callable[..., Tableau] | None
    order: int | None = None
    passes_per_loop: int = 1
    reads: Mapping[str, Any] = field(default_factory=dict)
    even: bool = False
    is_steady: bool = True
    sets_norm: bool = False


_HNW = "Hairer, Norsett, Wanner, Solving ODEs I, II.1"
_TFL = "Training-Free Looped Transformers, arXiv 2605.23872"
_ALPHA, _HORIZON = {"alpha": 0.5}, {"horizon": 1.0}


def _runge_kutta(words: str, name: str, step: Tableau, order: int) -> Integrator:
    words = f"{words}: {len(step.b)} passes a loop"
    update = f"{name} of size T/K"
    return Integrator(words, update, _HNW, _classical(step), order, len(step.b), _HORIZON)


def _means(loops: int) -> tuple[float, ...]:
    return (0.0,) + (1 / loops,) * loops


INTEGRATORS: dict[str, Integrator] = {
    "naive": Integrator(
        "the window K times over: too far, it degrades (the control)",
        "x <- g(x)",
        _TFL,
        _naive,
    ),
    "euler": Integrator(
        "K small steps in the place of one",
        "x <- x + f(x) T/K",
        _TFL,
        _classical(EULER),
        1,
        reads=_HORIZON,
    ),
    "anchored": Integrator(
        "euler, mixed with the plain pass by beta (the default)",
        "beta g(x0) + (1 - beta) euler",
        _TFL,
        _anchored,
        reads={"beta": 0.5, **_HORIZON},
    ),
    "midpoint": _runge_kutta(
        "K steps along the slope half way", "Runge's midpoint step", MIDPOINT, 2
    ),
    "heun": _runge_kutta(
        "K steps along the mean slope of both ends", "Heun's trapezoidal step", HEUN, 2
    ),
    "kutta3": _runge_kutta("K steps, more exact", "Kutta's third-order step", KUTTA3, 3),
    "rk4": _runge_kutta("K steps, the most exact", "the classical Runge-Kutta step", RK4, 4),
    "residual_scaled": Integrator(
        "the change that K naive passes make, divided by K",
        "x0 + (g^K(x0) - x0) / K",
        _TFL,
        _residual_scaled,
        is_steady=False,
    ),
    "ema": Integrator(
        "K steps of size alpha, however many there are",
        "x <- (1 - alpha) x + alpha g(x)",
        _TFL,
        _ema,
        reads=_ALPHA,
    ),
    "heavy_ball": Integrator(
        "ema, with momentum",
        "x <- x + alpha f(x) + momentum (x - x_prev)",
        "Polyak 1964; " + _TFL,
        _heavy_ball,
        reads={**_ALPHA, "momentum": 0.3},
    ),
    "anderson": Integrator(
        "mixes the latest states so that they change least",
        "Anderson mixing of f over `memory`",
        "Walker, Ni 2011",
        None,
        reads={"memory": 2, "damping": 1.0},
    ),
    "aitken": Integrator(
        "guesses where pairs of passes lead; K is even",
        "Aitken's delta-squared per coordinate, K even",
        _TFL,
        None,
        even=True,
    ),
    "norm_stab": Integrator(
        "ema, with each token brought back to its length at the start",
        "ema, then each token at its norm in x0",
        _TFL,
        _ema,
        reads=_ALPHA,
        sets_norm=True,
    ),
    "input_anchor": Integrator(
        "each pass is mixed with what entered the window",
        "x <- alpha g(x) + (1 - alpha) x0",
        _TFL,
        _input_anchor,
        reads=_ALPHA,
    ),
    "poly_blend": Integrator(
        "a weighted mean of the states after 0, 1, ... K passes",
        "sum_k weights_k g^k(x0)",
        _TFL,
        _poly_blend,
        reads={"weights": _means},
        is_steady=False,
    ),
    "uniform": Integrator(
        "after each layer, the mean of its outputs over the passes",
        "each layer's mean output over passes",
        _TFL,
        None,
    ),
}
