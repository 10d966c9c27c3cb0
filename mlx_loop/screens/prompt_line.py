"""The line that a person types at, with its keys and history, and its stand-in for a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ..foreign import stdin_lines

HISTORY = Path.home() / ".cache" / "mlx_loop"


def typed_lines(name: str, commands: Iterable[str], start: Callable[[], str]) -> Iterator[str]:
    """What a person types, message by message, until Ctrl-D.

    Args:
        name: of the program, whose history is kept.
        commands: words that Tab completes after a slash.
        start: what stands on the next line already.
    """
    session: PromptSession[str] = PromptSession(
        history=_history(HISTORY / f"{name}_history"),
        auto_suggest=AutoSuggestFromHistory(),
        completer=WordCompleter([f"/{word}" for word in (*commands, "bye")], sentence=True),
        complete_while_typing=False,
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="  ",
    )
    while True:
        try:
            sign = HTML("<ansigreen><b>&gt; </b></ansigreen>")
            text = session.prompt(sign, default=start()).strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text:
            yield text


def piped_lines() -> Iterator[str]:
    """The lines of standard input that are not empty."""
    for line in stdin_lines():
        if line.strip():
            yield line.strip()


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return keys


def _history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
