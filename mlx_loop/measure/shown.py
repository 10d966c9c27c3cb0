"""What the functions of the library return shows itself: as text, in a notebook, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from .document import Block, body, text
from .plots import figure


class Shown:
    """A result as a few small tables. Printed it is text; in a notebook, HTML."""

    def blocks(self) -> Sequence[Block]:
        """What people read of it."""
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """All of its numbers as rows of one table."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; what is not a number is None."""
        raise NotImplementedError

    def draw(self, pyplot: Any) -> Any:
        """A figure, made with `pyplot.subplots`."""
        raise NotImplementedError

    def __str__(self) -> str:
        return text(self.blocks())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return body(self.blocks())

    def plot(self) -> Any:
        """A matplotlib figure: a notebook shows it, `savefig` writes it.

        Raises:
            UserError: matplotlib is missing.
        """
        return figure(self.draw)

    def to_pandas(self) -> Any:
        """A pandas DataFrame of `records`.

        Raises:
            UserError: pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("tables need pandas: pip install pandas") from error
        return pandas.DataFrame(self.records())


def jsonable(value: Any) -> Any:
    """None for what is not a number, which JSON does not have."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
