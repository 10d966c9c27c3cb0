"""A session at a prompt: messages that are answered, and commands that start with a slash."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .. import several
from ..errors import INTERRUPTED, USER_ERROR, UserError, suggestion
from ..foreign import foreseen, one_line
from .fields import SETTINGS, explained
from .prompt_line import piped_lines, typed_lines
from .terminal import err, is_interactive, out, unechoed

Row = tuple[str | Text, ...]
PASSES: Row = (
    Text("layer passes", "dim"),
    Text("layers that a token goes through; +33%: the loops add a third", "dim"),
)
LEAVE = ("quit", "exit", "bye", "q")


class Command(NamedTuple):
    """What a word after a slash does with the rest of its line. Without help it is not listed."""

    run: Callable[[Any, str], None]
    argument: str = ""
    help: str = ""


def command(argument: str, help_text: str) -> Callable[[Callable[[Any, str], None]], Any]:
    """Make a method of a session the command of its name."""
    return lambda run: Command(run, argument, help_text)


def grid(rows: Iterable[Row]) -> Table:
    """Rows of words, without lines."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    return table


class Session:
    """What chat and compare share; a subclass says what an answer is and has more commands."""

    name = ""
    # What stands at the prompt already when the next line is typed.
    next_line = ""
    hints: tuple[Row, ...] = ()

    def about(self) -> list[Row]:
        """What a person sees first."""
        raise NotImplementedError

    def answer(self, text: str) -> bool:
        """Show what comes of a message; False: it was stopped."""
        raise NotImplementedError

    def serve(self) -> int:
        """Answer all that is typed or piped; the exit status."""
        interactive = several.from_first(is_interactive)
        if interactive:
            keys = Text("/help for commands, Ctrl-C stops an answer, Ctrl-D leaves", "dim")
            title = f"mlx_loop {self.name}"
            rows = grid([*self.about(), ("", keys)])
            out.print(Panel(rows, title=title, title_align="left", expand=False))
        typed = interactive and typed_lines(self.name, self.commands(), self._take_line)
        for line in several.lines_from_first(typed or piped_lines()):
            try:
                if interactive and line in LEAVE:
                    break
                with unechoed():
                    if line.startswith("/"):
                        if not self.carry_out(line):
                            break
                    elif not self.answer(line) and not interactive:
                        return INTERRUPTED
            except KeyboardInterrupt:
                # The second one, in the middle of a pass, where machines may be out of step.
                if not interactive or several.count() > 1:
                    raise
                out.print("stopped", style="yellow")
            except UserError as error:
                err.print(one_line(error), style="red")
                if not interactive:
                    return USER_ERROR
        return 0

    def carry_out(self, line: str) -> bool:
        """Do what a line that starts with a slash says; False: leave."""
        word, _, argument = line[1:].strip().partition(" ")
        if word in LEAVE:
            return False
        word = "help" if word == "?" else word
        if word not in self.commands():
            meant = suggestion(word, (*self.commands(), *LEAVE)) or ";"
            raise UserError(f"unknown command /{word}{meant} /help lists the commands")
        with foreseen(f"/{word}"):
            self.commands()[word].run(self, argument.strip())
        return True

    def _take_line(self) -> str:
        line, self.next_line = self.next_line, ""
        return line

    def commands(self) -> Mapping[str, Command]:
        """By the word that is typed."""
        found = {**vars(type(self)), **vars(Session)}
        return {n.replace("_", "-"): c for n, c in found.items() if isinstance(c, Command)}

    @command("WORD", "what a loop setting or a command does; empty: this list")
    def help(self, argument: str) -> None:
        rows = {
            word: (Text.assemble((f"/{word}", "bold"), f" {command.argument}"), command.help)
            for word, command in self.commands().items()
            if command.help
        }
        if argument:
            word = argument.removeprefix("/")
            named = word in rows and word not in SETTINGS
            out.print(grid([rows[word]] if named else explained(word)))
            return
        leave = (Text("/bye", "bold"), "leave, as Ctrl-D does")
        keys = (Text("Alt-Enter", "dim"), Text("a new line; so does \\ at the end of one", "dim"))
        out.print(grid([*rows.values(), leave, *self.hints, keys]))


def needed(argument: str, example: str) -> str:
    """The argument of a command, unless it is missing.

    Raises:
        UserError: it is; the message shows the example.
    """
    if not argument:
        raise UserError(f"something is missing: {example}")
    return argument


def parsed(parse: Callable[[str], Any], argument: str, example: str) -> Any:
    """The argument of a command as one of `options` reads it.

    Raises:
        UserError: it is missing, or not of the form.
    """
    try:
        return parse(needed(argument, example))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{example.split()[0]}: {error}") from error
