"""Loop settings: what is looped, how often, by which integrator, and what the cache keeps.

A field left `None` takes the preset of the model's family and size (`mlx_loop.presets`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError, suggestion
from .foreign import from_json
from .integrators import INTEGRATORS

# The fields that only some integrators read, and which those are.
INTEGRATOR_FIELDS: Mapping[str, tuple[str, ...]] = {
    field: tuple(name for name, integrator in INTEGRATORS.items() if field in integrator.reads)
    for field in ("beta", "alpha", "momentum", "memory", "damping", "weights")
}

# Of the window. More would take hours for an answer, and a typing error is likelier than a wish.
MOST_PASSES = 1000

CHOICES: Mapping[str, tuple[str, ...]] = {
    "integrator": tuple(INTEGRATORS),
    "scope": ("block", "layer"),
    "routing": ("live", "frozen"),
    "norm": ("free", "interpolated"),
    "cache": ("first", "last", "own"),
    "prompt": ("looped", "plain"),
}


@dataclass(frozen=True)
class Guard:
    """When a token's loop has gone astray, so that its natural pass is taken instead.

    The defaults let a damped loop alone: see docs/trace.md for what was measured.

    Args:
        growth: the most by which |g(x) - x| may grow from the first evaluation to the last.
        band: (low, high), the norm of the result over that of the natural pass.

    Raises:
        UserError: a `ValueError`, as for `LoopConfig`.
    """

    growth: float = 1.5
    band: tuple[float, float] = (0.8, 1.2)

    def __post_init__(self) -> None:
        if not (is_number(self.growth) and self.growth > 0):
            raise _wrong("growth", self.growth, "a number above 0")
        band = _as_tuple(self.band)
        if band is None or len(band) != 2 or not all(map(is_number, band)):
            raise _wrong("band", self.band, _BAND)
        if not 0 <= band[0] <= 1 <= band[1]:
            raise _wrong("band", self.band, _BAND)
        object.__setattr__(self, "band", band)

    def __str__(self) -> str:
        """As on the command line: `1.5,0.8:1.2`."""
        return f"{self.growth:g},{self.band[0]:g}:{self.band[1]:g}"


_BAND = "(low, high) with 0 <= low <= 1 <= high"

Pair = tuple[int, int] | tuple[float, float]
Window = Pair | tuple[Pair, ...]
Given = TypeVar("Given", bound="LoopConfig")


@dataclass(frozen=True)
class LoopConfig:
    """How a model loops. Immutable; `dataclasses.replace` makes a changed copy.

    Args:
        window: layers `[start, stop)`, half open and 0-based, as two integers; or two fractions
            of the depth as floats, `(0.4, 0.5)`; or several of these, from the bottom up, each of
            which loops in its turn, `((12, 16), (20, 24))`.
        loops: K, the number of loops; 1 is the un-looped model. A token passes the window at most
            `MOST_PASSES` times.
        integrator: one of `INTEGRATORS`.
        beta: weight of the natural pass in `anchored`; 0 to 1 is between the two results, and as
            far as -1 or 2 beyond them.
        horizon: T, above 0 up to 16: `euler`, `anchored` and the Runge-Kutta methods take K steps
            of T / K; a natural pass is 1.
        scope: `block` iterates the whole window, `layer` each layer before the next one.
        routing: MoE only. `live`, or `frozen`: later passes re-use the natural pass's experts.
        norm: `free`, or `interpolated`: iterates follow the norm of the straight path from the
            window's input to its natural output.
        cache: whose keys and values are kept: the `first` pass's, those of a `last` pass from the
            looped state, or each evaluation its `own` history.
        decode: `full` (every generated token loops), `bypass` (only the prompt loops) or n (the
            first n generated tokens loop).
        prompt: `looped`, or `plain`: the prompt takes the plain pass, all but its last token, which
            decides the answer.
        gate: None, or `entropy:` and nats: of the answer's tokens only those loop whose un-looped
            prediction has at least that entropy.
        alpha: step of `ema`, `heavy_ball`, `norm_stab`, `input_anchor`; for `ema` also one per
            loop.
        momentum: `heavy_ball`, 0 up to but not including 1.
        memory: `anderson`, how many earlier iterates are mixed.
        damping: `anderson`, above 0 up to 1.
        weights: `poly_blend`, the K + 1 weights of x0, g(x0), ..., g^K(x0); they sum to 1.
        guard: limits beyond which a token takes its natural pass; None: no guard.

    Raises:
        UserError: a `ValueError` that names the field, the value and what is allowed.
    """

    window: Window | None = None
    loops: int | None = None
    integrator: str | None = None
    beta: float | None = None
    horizon: float = 1.0
    scope: str | None = None
    routing: str | None = None
    norm: str | None = None
    cache: str | None = None
    decode: str | int | None = None
    prompt: str = "looped"
    gate: str | None = None
    alpha: float | tuple[float, ...] | None = None
    momentum: float | None = None
    memory: int | None = None
    damping: float | None = None
    weights: tuple[float, ...] | None = None
    guard: Guard | None = None

    @property
    def windows(self) -> tuple[range, ...]:
        """The layers of each window, in settings that are resolved (`model.loop` is)."""
        return tuple(range(int(start), int(stop)) for start, stop in pairs(self.window))

    @property
    def layers(self) -> list[int]:
        """The layers of all windows, from the bottom up."""
        return [i for window in self.windows for i in window]

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and (value is not None or name == "prompt"):
                raise _wrong(name, value, "one of " + ", ".join(choices))
        for name in ("loops", "memory"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and value >= 1):
                raise _wrong(name, value, "a whole number from 1 up")
        for name, low, high, allowed in (
            ("beta", -1, 2, "a number from -1 to 2"),
            ("horizon", math.nextafter(0, 1), 16, "a number above 0, at most 16"),
            ("momentum", 0, math.nextafter(1, 0), "a number from 0 to below 1"),
            ("damping", math.nextafter(0, 1), 1, "a number above 0, at most 1"),
        ):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and low <= value <= high):
                raise _wrong(name, value, allowed)
        self._check_passes()
        self._check_window()
        self._check_decode()
        self._check_gate()
        self._check_alpha()
        self._check_weights()
        self._check_guard()
        if self.integrator is not None:
            self._check_integrator(self.integrator)

    def _check_passes(self) -> None:
        integrator = INTEGRATORS.get(self.integrator or "")
        most = MOST_PASSES // (integrator.passes_per_loop if integrator else 1)
        if self.loops is not None and self.loops > most:
            raise _wrong("loops", self.loops, f"at most {most}: that is {MOST_PASSES} passes")

    def _check_integrator(self, name: str) -> None:
        integrator = INTEGRATORS[name]
        if integrator.even and self.loops is not None and self.loops % 2:
            raise _wrong("loops", self.loops, f"an even number with integrator {name!r}")
        if integrator.sets_norm and self.norm == "interpolated":
            raise _wrong("norm", self.norm, f"'free' with integrator {name!r}, which sets norms")
        if self.horizon != 1 and "horizon" not in integrator.reads:
            raise _wrong(
                "horizon", self.horizon, f"set to 1 with integrator {name!r}, which has none"
            )

    def _check_window(self) -> None:
        if self.window is None:
            return
        window = _as_tuple(self.window) or ()
        several = [_as_tuple(pair) for pair in window]
        found = [window] if None in several else several
        allowed = "(start, stop) with 0 <= start < stop, as layers or as fractions of the depth"
        for pair in found:
            if pair is None or len(pair) != 2:
                raise _wrong("window", self.window, allowed)
            layers = all(_is_int(x) for x in pair)
            fractions = all(isinstance(x, float) and 0 <= x <= 1 for x in pair)
            if not (layers or fractions) or not 0 <= pair[0] < pair[1]:
                raise _wrong("window", self.window, allowed)
        if not found:
            raise _wrong("window", self.window, allowed)
        check_order(self.window, found)
        object.__setattr__(self, "window", found[0] if len(found) == 1 else tuple(found))

    def _check_decode(self) -> None:
        if self.decode is None or self.decode in ("full", "bypass"):
            return
        if not (_is_int(self.decode) and int(self.decode) >= 0):
            raise _wrong("decode", self.decode, "'full', 'bypass' or a whole number from 0 up")

    @property
    def gate_nats(self) -> float:
        """The entropy of `gate`; infinite where there is none."""
        return math.inf if self.gate is None else float(self.gate.partition(":")[2])

    def _check_gate(self) -> None:
        if self.gate is None:
            return
        kind, _, nats = str(self.gate).partition(":")
        try:
            fits = kind == "entropy" and 0 < float(nats) < math.inf
        except ValueError:
            fits = False
        if fits:
            object.__setattr__(self, "gate", f"entropy:{float(nats)}")
        else:
            raise _wrong("gate", self.gate, "None, or 'entropy:' and nats above 0: 'entropy:1.0'")

    def _check_alpha(self) -> None:
        if self.alpha is None:
            return
        steps = _as_tuple(self.alpha)
        for step in (self.alpha,) if steps is None else steps:
            if not (is_number(step) and 0 < step <= 2):
                raise _wrong("alpha", self.alpha, "above 0, at most 2 (a number, or one per loop)")
        if steps is None:
            return
        if self.integrator not in (None, "ema"):
            raise _wrong(
                "alpha", self.alpha, f"a single number with integrator {self.integrator!r}"
            )
        if self.loops is not None and len(steps) != self.loops:
            raise _wrong("alpha", self.alpha, f"one number, or one per loop ({self.loops})")
        object.__setattr__(self, "alpha", steps)

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        weights = _as_tuple(self.weights)
        if not weights or not all(is_number(w) for w in weights):
            raise _wrong("weights", self.weights, "a list of numbers that sum to 1")
        total = sum(map(float, weights))
        if abs(total - 1) > 1e-6:
            raise _wrong("weights", self.weights, f"numbers that sum to 1, not {total:g}")
        if self.loops is not None and len(weights) != self.loops + 1:
            raise _wrong("weights", self.weights, f"loops + 1 = {self.loops + 1} numbers")
        object.__setattr__(self, "weights", weights)

    def _check_guard(self) -> None:
        if isinstance(self.guard, Mapping):
            try:
                object.__setattr__(self, "guard", Guard(**self.guard))
            except TypeError as error:
                raise _wrong("guard", self.guard, "of the fields growth and band") from error
        if self.guard is not None and not isinstance(self.guard, Guard):
            raise _wrong("guard", self.guard, "a Guard, or None")

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, other than to their defaults, ready for JSON."""
        defaults = {field.name: field.default for field in fields(self)}
        return _jsonable({n: v for n, v in asdict(self).items() if v != defaults[n]})

    @classmethod
    def from_dict(cls: type[Given], values: Mapping[str, Any]) -> Given:
        """The inverse of `to_dict`. An unknown key is an error, never ignored."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise UserError(f"loop settings are a JSON object of fields, not {values!r}")
        for name in values:
            if name not in known:
                meant = suggestion(str(name), known) or ";"
                raise UserError(
                    f"unknown loop setting {name!r}{meant} known are {', '.join(known)}"
                )
        return cls(**values)

    def to_json(self) -> str:
        """One line of JSON with the fields that are set."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls: type[Given], text: str) -> Given:
        """The inverse of `to_json`."""
        return cls.from_dict(from_json(text, "a loop setting"))

    def __str__(self) -> str:
        """A short line for people, of what is not plain: `anchored, 3 loops of [4,8), beta 0.5`."""
        words = [self.integrator or "?", f"{self.loops or '?'} loops of {interval(self.window)}"]
        for name, plain in _PLAIN.items():
            value = getattr(self, name)
            if value not in (None, plain):
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                words.append(f"{name} {shown}")
        return ", ".join(words)


# What is understood wherever a loop setting is taken.
LoopLike = LoopConfig | Mapping[str, Any] | int | None


def as_loop(value: LoopLike) -> LoopConfig | None:
    """Loop settings as people write them: whole ones, a number of loops, or a dict of fields.

    Raises:
        UserError: anything else, or values that are not valid.
    """
    if value is None or isinstance(value, LoopConfig):
        return value
    if isinstance(value, Mapping):
        return LoopConfig.from_dict(value)
    if _is_int(value):
        return LoopConfig(loops=value)
    raise UserError(
        f"{value!r} is no loop setting: give a LoopConfig, a number of loops, a dict of "
        "LoopConfig's fields, or None for no looping"
    )


# What goes without saying; of an integrator's own fields, nothing.
_PLAIN = dict.fromkeys([*INTEGRATOR_FIELDS, "gate", "guard"]) | {
    "horizon": 1,
    "scope": "block",
    "routing": "live",
    "norm": "free",
    "cache": "first",
    "decode": "full",
    "prompt": "looped",
}


if TYPE_CHECKING:

    @dataclass(frozen=True, kw_only=True)
    class ResolvedLoop(LoopConfig):
        """Settings with every field set that their integrator reads, and the window as layers.

        `presets.resolve` makes them, and `model.loop` is of this kind.
        """

        window: tuple[int, int] | tuple[tuple[int, int], ...]
        loops: int
        integrator: str
        scope: str
        routing: str
        norm: str
        cache: str
        decode: str | int

else:
    ResolvedLoop = LoopConfig  # A type of its own to the checker alone: `replace` may change it.


def pairs(window: Window | None) -> tuple[Pair, ...]:
    """The (start, stop) of each window."""
    if not window:
        return ()
    return window if isinstance(window[0], tuple) else (window,)


def interval(window: Window | None) -> str:
    """A window for people: `[4,8)`, or `[4,8)+[10,12)`."""
    return "+".join(f"[{start},{stop})" for start, stop in pairs(window)) or "[?,?)"


def check_order(window: object, pairs: Sequence[Any]) -> None:
    """Refuse windows that overlap, or are not from the bottom up.

    Args:
        window: as given.
        pairs: the (start, stop) of each.
    """
    for (_, stop), (start, _) in pairwise(pairs):
        if type(stop) is not type(start) or start < stop:
            raise _wrong("window", window, "one that does not overlap the next, from the bottom up")


def _wrong(name: str, value: object, allowed: str) -> UserError:
    return UserError(f"{name}={shown(value)} is not valid: {name} must be {allowed}")


def shown(value: object) -> str:
    """A value as people wrote it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write down whole numbers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in values.items() if value is not None}
    for name, value in plain.items():
        if isinstance(value, tuple):
            plain[name] = list(value)
        elif isinstance(value, dict):
            plain[name] = _jsonable(value)
    return plain


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it can be counted with: no NaN, nor a whole number beyond the largest float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _as_tuple(value: object) -> tuple[Any, ...] | None:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(value) if is_list else None  # type: ignore[arg-type]
