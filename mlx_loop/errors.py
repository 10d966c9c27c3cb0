"""The exception that stands for a mistake of the user, what was meant instead, exit statuses."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Those of a signal are 128 and its number: SIGINT, and SIGPIPE where nobody reads the output.
USER_ERROR, INTERRUPTED, UNREAD = 2, 130, 141
# Another one of several machines has gone.
LOST = 3


class UserError(ValueError):
    """Bad input, with a message of one line that says what to do about it.

    The command line prints the message and exits with status 2; in Python it is a `ValueError`.
    """


def suggestion(typed: str, known: Iterable[str]) -> str:
    """`, did you mean ...?`, where something known is near."""
    near = get_close_matches(typed, known, 1)
    return f", did you mean {near[0]}?" if near else ""
