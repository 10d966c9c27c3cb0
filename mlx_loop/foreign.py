"""Foreign words: what people, files, models and other libraries say, read and shown in one place.

Text is UTF-8; the byte order mark that some editors put before it is passed over. Lines end at
`\\n` alone: U+0085 and U+2028 are part of what a model may say.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

# Controls but tab and newline, what turns text around (Unicode's bidi marks), and half characters.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
LONGEST_LINE = 800
# A byte order mark at the beginning is no part of a text.
TEXT = "utf-8-sig"

# --- Shown ---


def visible(text: str) -> str:
    """Text that does nothing to a terminal: its controls are seen, not obeyed."""
    return _CONTROLS.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\\u{code:04x}"


def one_line(text: object) -> str:
    """What is said, on one line that a terminal can show, and no longer than people read."""
    line = visible(" ".join(str(text).split())) or repr(text)
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE - 200]} ... {line[-190:]}"
    return line


def in_markdown(text: str) -> str:
    """Text in a Markdown page, where it opens neither a tag nor a cell."""
    return visible(text).replace("<", "&lt;").replace("|", "\\|")


# --- Read ---


def check_text(text: str) -> None:
    """Refuse text that is no whole Unicode, as an argument of undecodable bytes is.

    Raises:
        UserError: it holds half characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not UTF-8 at character {error.start}") from None


def path_of(text: str | Path) -> Path:
    """The file or folder that a person names; `~` is the home folder.

    Raises:
        UserError: no name, or one that no file can have.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{one_line(text)} cannot be the name of a file: {error}") from error
    if not str(text) or "\0" in str(text):
        raise UserError("the name of a file is empty: give one")
    return path


def read_text(path: Path) -> str:
    """What a file says, its line ends as they are.

    Raises:
        UserError: it cannot be read, or is not UTF-8. A pipe or device is no file: it may have no
            end, and cannot be read again.
    """
    try:
        is_other = path.exists() and not path.is_file()
        text = "" if is_other else path.read_bytes().decode(TEXT)
    except (OSError, ValueError) as error:
        # Python names the file once more.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error
    if is_other:
        raise UserError(f"cannot read {path}: it is not a file")
    return text


def read_stdin() -> str:
    """All of standard input.

    Raises:
        UserError: it is not UTF-8.
    """
    return "".join(stdin_lines())


def stdin_lines() -> Iterator[str]:
    """The lines of standard input as they come. Errors as in `read_stdin`."""
    try:
        yield from sys.stdin
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read standard input: {error}") from error


def read_json(path: Path) -> Any:
    """The value in a file of JSON.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    return from_json(read_text(path), str(path))


def from_json(text: str, what: str) -> Any:
    """The value of a JSON text.

    Args:
        what: what people call it.

    Raises:
        UserError: it is not JSON, or too deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {error}") from error


def lines(text: str) -> list[str]:
    """The lines of a text; what comes after the last `\\n` is one too, unless it is empty."""
    found = text.split("\n")
    return found if found[-1] else found[:-1]


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that reads back the same and does nothing to a terminal or a reader of lines."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _CONTROLS.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}"


# --- Tried ---


@contextmanager
def foreseen(what: str, seconds: float | None = None) -> Iterator[None]:
    """Whatever foreign files or code raise in the block is one line: what could not be done, why.

    Args:
        what: what could not be done then.
        seconds: the longest that it may take, where that can be told (in the main thread).

    Raises:
        UserError: instead of any exception but itself.
    """
    try:
        with _limited(seconds):
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {one_line(error if str(error) else repr(error))}") from error


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
