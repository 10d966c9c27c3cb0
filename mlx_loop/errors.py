"""The exception that stands for a mistake of the user, and the exit statuses of the commands."""

from __future__ import annotations

# Those of a signal are 128 and its number: SIGINT, and SIGPIPE where nobody reads the output.
USER_ERROR, INTERRUPTED, UNREAD = 2, 130, 141
# Another one of several machines has gone.
LOST = 3


class UserError(ValueError):
    """Bad input, with a message of one line that says what to do about it.

    The command line prints the message and exits with status 2; in Python it is a `ValueError`.
    """
