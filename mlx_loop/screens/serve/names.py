"""Loop settings in a model's name: `NAME:loops=6,beta=0.3`.

Semicolons stand between the numbers of a list: `NAME:integrator=ema,alpha=0.5;0.3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...models.looped import Looped
from ...presets import RECIPES
from ...settings import Guard, LoopConfig, pairs
from ..fields import SETTINGS, check_read, parse_config

# A pass costs time on everyone's device, whoever asks for it.
MOST_LOOPS = 64


class Names:
    """The names under which one model answers.

    Args:
        model: with the settings that the bare name stands for.
        given: as the command line names the model.
        start: settings to which a name adds.
    """

    def __init__(self, model: Looped, given: str, start: LoopConfig):
        self._model, self._start = model, start
        folder = Path(given).expanduser()
        # What a folder is called is enough; where it lies is nobody's business.
        self.name = folder.resolve().name if folder.is_dir() else given
        self._known = (self.name, given, "default_model")

    def view(self, name: object, loop: object = None) -> Looped:
        """The model with the settings of a request.

        Args:
            name: its `model`.
            loop: its `loop`, an object of fields; they count where both say something.

        Raises:
            UserError: another model, or settings that the command line would refuse.
        """
        if not isinstance(name, str):
            raise UserError("model must be a text")
        start, fields = self._fields(name)
        if loop is not None:
            if not isinstance(loop, Mapping):
                raise UserError('loop must be an object of fields: {"loops": 6, "beta": 0.3}')
            given = dict(loop)
            if "recipe" in given:
                start = _recipe(given.pop("recipe"))
            # Reads the values, and says which fields there are.
            read = LoopConfig.from_dict(given)
            fields |= {field: getattr(read, field) for field in given}
        if start is None and not fields:
            return self._model.with_loop(self._model.loop)
        config = replace(start or self._start, **fields)
        check_read(fields, [config])
        if (config.loops or 0) > MOST_LOOPS:
            raise UserError(f"loops={config.loops} is too many: {MOST_LOOPS} are the most here")
        return self._model.with_loop(config)

    def canonical(self, view: Looped) -> str:
        """The one name of a view's settings, complete; `view` reads it back."""
        loop = view.loop
        if loop is None or view.is_unlooped:
            return f"{self.name}:loops=1"
        values = {field: getattr(loop, field) for field in SETTINGS}
        return f"{self.name}:" + ",".join(
            f"{field}={_text(field, value)}" for field, value in values.items() if value is not None
        )

    def _fields(self, name: str) -> tuple[LoopConfig | None, dict[str, Any]]:
        known = next((n for n in self._known if name == n or name.startswith(f"{n}:")), None)
        if known is None:
            raise UserError(
                f"there is no model {name!r} here: it is {self.name}, or with loop settings "
                f"{self.name}:loops=6,beta=0.3"
            )
        start, settings = None, []
        for pair in name[len(known) + 1 :].split(","):
            field, _, value = pair.partition("=")
            if field == "recipe":
                start = _recipe(value)
            else:
                settings.append(pair)
        return start, parse_config(" ".join(settings).replace(";", ","))


def _recipe(name: object) -> LoopConfig:
    if not isinstance(name, str) or name not in RECIPES:
        raise UserError(f"recipe {name!r} is not valid: write one of {', '.join(RECIPES)}")
    return RECIPES[name]


def _text(field: str, value: Any) -> str:
    if field == "window":
        return "+".join(f"{start}:{stop}" for start, stop in pairs(value))
    if isinstance(value, tuple):
        return ";".join(map(repr, value))
    if isinstance(value, Guard):
        return f"{value.growth!r};{value.band[0]!r}:{value.band[1]!r}"
    return str(value)
