"""What a loop does inside, pass by pass and token by token: does it converge, drift or diverge?

A trace is one forward pass of a view of the model that is observed, so tracing costs nothing where
nobody traces.
The numbers, and the thresholds of the verdict, are explained in docs/trace.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..generation.prompt import check_tokens
from ..method.routing import expert_changes
from ..models.looped import Looped
from ..models.together import FEW, logits
from ..settings import Guard, LoopConfig
from .comparison import kl
from .document import Block, Paragraph, Table
from .plots import draw_trace
from .shown import Shown, jsonable

VERDICTS = ("no verdict", "converging", "drifting", "diverging")
# Of the verdict. A residual within 5 % of where it began has neither shrunk nor grown.
SHRUNK, GROWN = 0.95, 1.05
# Converging is said of nine tokens in ten, or not at all.
MOST = 0.9
BAND = Guard().band
# Differences below this many units of rounding of the state say nothing of the map.
ROUNDING = 16


@dataclass(frozen=True)
class State:
    """A state of the loop against the natural pass g(x0), a number for each token.

    Args:
        norm: |state| / |g(x0)|.
        cosine: to g(x0).
        lens_kl: KL(g(x0) || state) in nats, of what the model's head makes of either.
    """

    norm: list[float]
    cosine: list[float]
    lens_kl: list[float]

    def medians(self) -> list[float]:
        """Of each, over the tokens."""
        return [middle(values) for values in (self.norm, self.cosine, self.lens_kl)]


@dataclass(frozen=True)
class Pass:
    """One evaluation g(x), a number for each token.

    Args:
        before: the state x.
        residual: |g(x) - x| / |g(x0)|.
        contraction: |g(x) - g(x')| / |x - x'|, x' the state of the evaluation before: below 1
            the map contracts along this step. Not a number in the first pass, and where
            |x - x'| is lost in rounding.
        experts_changed: share of tokens whose set of experts is not that of the first pass,
            under live routing, averaged over layers with experts; None: there are none.
    """

    before: State
    residual: list[float]
    contraction: list[float]
    experts_changed: float | None


@dataclass(frozen=True)
class Loop:
    """What is iterated as one: the window, or in layer scope one of its layers.

    Args:
        layers: their numbers.
        passes: in order of evaluation.
        result: the state that leaves the loop.
        growth: |g(x) - x| of the last pass over that of the first, for each token.
    """

    layers: list[int]
    passes: list[Pass]
    result: State
    growth: list[float]

    @property
    def verdict(self) -> str:
        """`converging`, `drifting` or `diverging`, or `no verdict` from a single pass."""
        if len(self.passes) < 2:
            return "no verdict"
        growth = median(self.growth)
        if not growth <= GROWN:
            return "diverging"
        steady = sum(g <= 1 for g in self.growth) / len(self.growth)
        if growth < SHRUNK and steady >= MOST and self.contracts and self.outside <= 1 - MOST:
            return "converging"
        return "drifting"

    @property
    def where(self) -> str:
        """Its layers, in words."""
        first, last = self.layers[0], self.layers[-1]
        return f"layer {first}" if first == last else f"layers {first}-{last}"

    def table(self) -> Table:
        """The medians over tokens, pass by pass."""
        header = ["pass", "residual", "contraction", "norm", "cosine", "lens KL"]
        experts = self.passes[0].experts_changed is not None
        rows = []
        for n, one in enumerate(self.passes, 1):
            found = middle(one.residual), middle(one.contraction), *one.before.medians()
            changed = [f"{one.experts_changed:.0%}"] if one.experts_changed is not None else []
            rows.append([str(n), *map(short, found), *changed])
        rows.append(["result", "", "", *map(short, self.result.medians()), *[""] * experts])
        return Table(header + ["experts changed"] * experts, rows)

    @property
    def contraction(self) -> float:
        """Of the last pass, the median."""
        return middle(self.passes[-1].contraction)

    @property
    def contracts(self) -> bool:
        """Whether nothing says that the map drives states apart."""
        return not self.contraction > 1

    @property
    def outside(self) -> float:
        """Share of tokens whose result's norm is outside `BAND`."""
        low, high = BAND
        return sum(not low <= n <= high for n in self.result.norm) / len(self.result.norm)

    @property
    def reason(self) -> str:
        """The numbers behind the verdict."""
        last = self.contraction
        contraction = "lost in rounding" if math.isnan(last) else f"{last:.2f}"
        grew = sum(not g <= 1 for g in self.growth) / len(self.growth)
        low, high = BAND
        return (
            f"residual x{median(self.growth):.2f} from first to last pass, grows for {grew:.0%} of "
            f"tokens; contraction {contraction} in the last pass; norm outside {low}-"
            f"{high} of the natural pass's for {self.outside:.0%}"
        )


@dataclass(frozen=True, repr=False)
class Trace(Shown):
    """A prompt under one setting.

    Args:
        loop: complete settings.
        tokens: of the prompt.
        loops: in order of the layers.
        texts: of the tokens, where a tokenizer was at hand.
    """

    loop: LoopConfig
    tokens: list[int]
    loops: list[Loop]
    texts: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """The worst of its loops'."""
        return worst(loop.verdict for loop in self.loops)

    def blocks(self) -> list[Block]:
        out: list[Block] = [Paragraph(f"loop {self.loop}, {len(self.tokens)} tokens")]
        for loop in self.loops:
            out += [Paragraph(f"{loop.where}, medians over tokens"), loop.table()]
            out.append(Paragraph(f"{loop.verdict}: {loop.reason}"))
        if len(self.loops) > 1:
            out.append(Paragraph(f"in all {self.verdict}"))
        return out

    def records(self) -> list[dict[str, Any]]:
        """A row for each loop, pass and token; the last one of a loop is its result."""
        unknown = [math.nan] * len(self.tokens)
        rows = []
        for loop in self.loops:
            found = [(n, p.before, p.residual, p.contraction) for n, p in enumerate(loop.passes, 1)]
            for n, state, residual, contraction in [*found, (None, loop.result, unknown, unknown)]:
                rows += [
                    {
                        "layers": loop.where,
                        "pass": "result" if n is None else n,
                        "token": token,
                        "text": self.texts[i] if self.texts else None,
                        "residual": residual[i],
                        "contraction": contraction[i],
                        **{name: values[i] for name, values in vars(state).items()},
                    }
                    for i, token in enumerate(self.tokens)
                ]
        return rows

    def to_dict(self) -> dict[str, Any]:
        loops = [
            {"layers": loop.layers, "verdict": loop.verdict, "reason": loop.reason, **asdict(loop)}
            for loop in self.loops
        ]
        return {
            "loop": self.loop.to_dict(),
            "tokens": list(self.texts or self.tokens),
            "verdict": self.verdict,
            "loops": jsonable(loops),
        }

    def draw(self, pyplot: Any) -> Any:
        return draw_trace(self, pyplot)


def worst(verdicts: Iterable[str]) -> str:
    """The verdict on all of several."""
    return max(verdicts, key=VERDICTS.index)


def trace(model: Looped, tokens: Sequence[int]) -> Trace:
    """Run `model` over a prompt, in one piece and without a cache, and measure its loops.

    Raises:
        UserError: looping is off, or there is no token.
    """
    if model.is_unlooped:
        raise UserError("looping is off, so there is nothing to trace: set loops to 2 or more")
    if not tokens:
        raise UserError("the prompt is empty: give at least one token")
    check_tokens(model, tokens)
    seen: list[tuple[Sequence[int], Sequence[tuple[mx.array, mx.array]], mx.array]] = []
    view = model.with_loop(model.loop)
    view.observer = lambda *loop: seen.append(loop)
    text = mx.array(list(tokens))[None]
    loop = model.loop
    assert loop is not None
    view.in_turn(text, end=loop.layers[-1] + 1)
    changes = expert_changes(model, text) if model.anatomy.mixes_experts else {}
    loops = [
        _loop(model, list(layers), evaluations, out, [changes[i] for i in layers if i in changes])
        for layers, evaluations, out in seen
    ]
    return Trace(loop, list(tokens), loops)


def _loop(
    model: Looped,
    layers: list[int],
    evaluations: Sequence[tuple[mx.array, mx.array]],
    out: mx.array,
    changes: Sequence[list[float]],
) -> Loop:
    """Arrays are (1, length, hidden); `changes`: for each layer with experts, of later passes."""
    natural = evaluations[0][1]
    passes = []
    for i, (x, gx) in enumerate(evaluations):
        changed = [0.0 if i == 0 else layer[i - 1] for layer in changes]
        before = evaluations[i - 1] if i else None
        passes.append(
            Pass(
                _state(model, x, natural),
                _floats(_norm(gx, x) / _norm(natural)),
                _contraction(x, gx, before),
                statistics.fmean(changed) if changed else None,
            )
        )
    (x0, first), (x, last) = evaluations[0], evaluations[-1]
    growth = _floats(_norm(last, x) / _norm(first, x0))
    return Loop(layers, passes, _state(model, out, natural), growth)


def _contraction(
    x: mx.array, gx: mx.array, before: tuple[mx.array, mx.array] | None
) -> list[float]:
    if before is None:
        return [math.nan] * x.shape[1]
    step = _norm(x, before[0])
    clear = step > ROUNDING * mx.finfo(x.dtype).eps * _norm(x)
    ratio = _norm(gx, before[1]) / mx.where(clear, step, 1)
    return _floats(mx.where(clear, ratio, math.nan))


def _state(model: Looped, x: mx.array, natural: mx.array) -> State:
    wide, plain = x.astype(mx.float32), natural.astype(mx.float32)
    norm, norm_plain = _norm(x), _norm(natural)
    cosine = mx.sum(wide * plain, axis=-1) / (norm * norm_plain)
    lens = []
    for start in range(0, x.shape[1], FEW):
        chunk = [y[..., start : start + FEW, :] for y in (natural, x)]
        lens += _floats(kl(*(logits(model, y) for y in chunk)))
    return State(_floats(norm / norm_plain), _floats(cosine), lens)


def _norm(x: mx.array, minus: mx.array | None = None) -> mx.array:
    """(1, length, hidden) -> (1, length), float32."""
    wide = x.astype(mx.float32)
    return mx.linalg.norm(wide if minus is None else wide - minus.astype(mx.float32), axis=-1)


def _floats(x: mx.array) -> list[float]:
    return x[0].tolist()  # type: ignore[return-value]


def short(value: float) -> str:
    """Three digits; nothing for what is not a number."""
    return "" if math.isnan(value) else f"{value:.3g}"


def mean(values: Sequence[float]) -> float:
    """Of those that are numbers; not a number if none is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def middle(values: Sequence[float]) -> float:
    """The median of those that are numbers; not a number if none is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def median(values: Sequence[float]) -> float:
    """NaN counts as beyond all numbers."""
    return statistics.median(math.inf if math.isnan(value) else value for value in values)
