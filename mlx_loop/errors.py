"""The one exception that stands for a mistake of the user, not of the program."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, with a message of one line that says what to do about it.

    The command line prints the message and exits with status 2; in Python it is a `ValueError`.
    """
