"""Loop settings as text: on the command line, in a session, in `loops=6 beta=0.3`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError, suggestion
from ..integrators import INTEGRATORS
from ..presets import resolve
from ..settings import CHOICES, INTEGRATOR_FIELDS, Guard, LoopConfig, shown

if TYPE_CHECKING:
    from ..models.looped import Looped

DEFAULT_INTEGRATOR = resolve(LoopConfig(), model_type="", num_layers=12).integrator


@dataclass(frozen=True)
class Setting:
    """A field of `LoopConfig` as text.

    `parse` makes the value of a text that has the `form`, else raises ValueError; `metavar` and
    `help` explain it on the command line.
    """

    parse: Callable[[str], Any]
    form: str
    metavar: str
    help: str


def parse_setting(name: str, text: str) -> Any:
    """The value of the `LoopConfig` field `name` that `text` means.

    Raises:
        UserError: `text` is not of the field's form, or no such field.
    """
    setting = _setting(name)
    try:
        return setting.parse(text)
    except ValueError as error:
        meant = suggestion(text, CHOICES.get(name, ())) or ":"
        raise UserError(f"{name} {shown(text)} is not valid{meant} write {setting.form}") from error


def explained(name: str) -> list[tuple[str, str]]:
    """What a setting does and how its values are written, in rows of words.

    Raises:
        UserError: no such field.
    """
    setting = _setting(name)
    rows = [(name, setting.help), ("", f"write {setting.form}")]
    if name == "integrator":
        rows = [(name, "how the loops make one step"), *_integrators()]
    return rows


def integrators_explained() -> str:
    """A line for each integrator, for a page of help."""
    return "\n".join(f"{name:<16} {words}" for name, words in _integrators())


def _integrators() -> list[tuple[str, str]]:
    return [(name, integrator.words) for name, integrator in INTEGRATORS.items()]


def _setting(name: str) -> Setting:
    if name not in SETTINGS:
        meant = suggestion(name, SETTINGS) or ";"
        known = ", ".join(SETTINGS)
        raise UserError(f"unknown loop setting {name!r}{meant} known are {known}")
    return SETTINGS[name]


# Their values have commas in them, so several values have semicolons between.
_WITH_COMMAS = ("alpha", "weights", "guard")


def parse_settings(name: str, text: str) -> list[Any]:
    """Several values of the `LoopConfig` field `name`, with commas between.

    Raises:
        UserError: as `parse_setting`.
    """
    values = text.split(";" if name in _WITH_COMMAS else ",")
    return [parse_setting(name, value.strip()) for value in values]


def parse_config(text: str) -> dict[str, Any]:
    """Fields of one setting, `loops=6 beta=0.3`.

    Raises:
        UserError: something that is not FIELD=VALUE, or as `parse_setting`.
    """
    fields = {}
    for pair in text.split():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f'{pair!r} is not FIELD=VALUE: write for example "loops=6 beta=0.3"')
        fields[name] = parse_setting(name, value)
    return fields


def combinations(start: LoopConfig, axes: Mapping[str, Sequence[Any]]) -> list[LoopConfig]:
    """`start` with every combination of the fields' values.

    Raises:
        UserError: values that do not fit each other, or a field that no combination reads.
    """
    loops = []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        name = fields.get("integrator") or start.integrator or DEFAULT_INTEGRATOR
        if len(axes.get("integrator", ())) > 1 and "horizon" not in INTEGRATORS[name].reads:
            fields.pop("horizon", None)
        loops.append(replace(start, **fields))
    check_read(axes, loops)
    if all(loop.horizon == 1 for loop in loops) and {*axes.get("horizon", ())} - {1}:
        raise UserError("horizon does nothing with integrators that have none: leave it out")
    return loops


def check_read(names: Iterable[str], loops: Sequence[LoopConfig]) -> None:
    """Refuse fields that no integrator of `loops` reads, rather than ignore them.

    Raises:
        UserError: there is such a field among `names`.
    """
    integrators = {loop.integrator or DEFAULT_INTEGRATOR for loop in loops}
    for name in names:
        readers = INTEGRATOR_FIELDS.get(name)
        if readers and integrators.isdisjoint(readers):
            raise UserError(
                f"{name} does nothing with integrator {' or '.join(sorted(integrators))}: give it "
                f"with integrator {' or '.join(readers)}, or leave it out"
            )


def check_model(names: Iterable[str], model: Looped) -> None:
    """Refuse fields that mean nothing to a model.

    Raises:
        UserError: there is such a field among `names`.
    """
    if "routing" in names and not model.whole.mixes_experts:
        raise UserError("routing does nothing: this model has no experts. Leave it out")


def _window(text: str) -> tuple:
    kind = float if "." in text else int
    found = []
    for pair in text.split("+"):
        start, stop = pair.split(":")
        found.append((kind(start), kind(stop)))
    return found[0] if len(found) == 1 else tuple(found)


def _decode(text: str) -> str | int:
    return text if text in ("full", "bypass") else int(text)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(","))


def _alpha(text: str) -> float | tuple[float, ...]:
    return _floats(text) if "," in text else float(text)


def _guard(text: str) -> Guard | None:
    if text in ("on", "off"):
        return Guard() if text == "on" else None
    growth, _, band = text.partition(",")
    if not band:
        return Guard(float(growth))
    low, high = band.split(":")
    return Guard(float(growth), (float(low), float(high)))


def _gate(text: str) -> str | None:
    return None if text == "off" else text


def _choice(field: str, help_text: str, metavar: str = "") -> Setting:
    values = CHOICES[field]

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(text)
        return text

    shown = metavar or "{" + ",".join(values) + "}"
    return Setting(parse, "one of " + ", ".join(values), shown, help_text)


SETTINGS: dict[str, Setting] = {
    "loops": Setting(
        int,
        "a whole number from 1 up",
        "K",
        "how often the window is applied; 1 is the plain model",
    ),
    "window": Setting(
        _window,
        "start:stop, as layers (15:19) or fractions of the depth (0.4:0.5); several as 12:16+20:24",
        "START:STOP",
        "the layers that loop, half open: 15:19 is layers 15 to 18; or fractions, 0.4:0.5; or "
        "several windows, each in its turn, 12:16+20:24",
    ),
    "integrator": _choice(
        "integrator", "how the loops make one step, one of the integrators below", "NAME"
    ),
    "beta": Setting(
        float, "a number from -1 to 2", "B", "anchored: weight of the plain pass, mostly 0 to 1"
    ),
    "horizon": Setting(
        float,
        "a number above 0, at most 16",
        "T",
        "euler, anchored, Runge-Kutta: the time that the K steps take together; 1 is a plain pass",
    ),
    "scope": _choice("scope", "iterate the whole window, or each layer before the next"),
    "routing": _choice("routing", "choose experts in each pass, or as the plain pass chose them"),
    "norm": _choice("norm", "interpolated: iterates follow the norm of the plain pass"),
    "cache": _choice(
        "cache",
        "keys and values to keep: of the first pass, a last one (an answer then depends on whether "
        "its prompt was processed at once or turn by turn), or own for each pass",
    ),
    "decode": Setting(
        _decode,
        "full, bypass or a number of tokens",
        "{full,bypass,N}",
        "which generated tokens loop: all, none, or the first N",
    ),
    "prompt": _choice(
        "prompt", "plain: of the prompt only the last token loops, so it costs nothing extra"
    ),
    "gate": Setting(
        _gate,
        "entropy:NATS, as entropy:1.0, or off",
        "entropy:NATS",
        "of the answer's tokens loop those whose plain prediction has at least this entropy; the "
        "others cost a plain pass (off: all loop)",
    ),
    "alpha": Setting(
        _alpha,
        "a number, or one per loop with commas between",
        "A",
        "ema, heavy_ball, norm_stab, input_anchor: step size; ema also one per loop (0.5,0.3)",
    ),
    "momentum": Setting(float, "a number from 0 to below 1", "M", "heavy_ball: momentum"),
    "memory": Setting(
        int, "a whole number from 1 up", "N", "anderson: how many earlier iterates are mixed"
    ),
    "damping": Setting(float, "a number above 0, at most 1", "D", "anderson: damping"),
    "weights": Setting(
        _floats,
        "loops + 1 numbers with commas between",
        "W,W,...",
        "poly_blend: weights of x, g(x), g(g(x)), ...",
    ),
    "guard": Setting(
        _guard,
        "on, off, a growth (1.5), or growth,low:high (1.5,0.8:1.2)",
        "{on,off,GROWTH,LOW:HIGH}",
        "take the plain pass where a token's loop goes astray: its residual grows by more than "
        "GROWTH, or its norm leaves LOW to HIGH times the plain pass's (on: 1.5,0.8:1.2)",
    ),
}
