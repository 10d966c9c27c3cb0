"""The command `mlx_loop`: sub-commands, their help, and how errors reach people."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile
from typing import NoReturn

from .. import __version__
from ..errors import INTERRUPTED, LOST, USER_ERROR, UserError
from .options import check_idle

# Modules of `commands`, each with a SUMMARY, EXAMPLES, `add_options` and `run`.
COMMANDS = (
    "chat",
    "generate",
    "compare",
    "serve",
    "trace",
    "sweep",
    "evaluate",
    "bench",
    "cache_prompt",
    "quantize",
    "plan",
    "models",
    "upload",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """A flag that is none is refused here, by the parser whose help page has the right one."""
        typed = list(sys.argv[1:] if args is None else args)
        flags = [flag for action in self._actions for flag in action.option_strings]
        # What comes after a command is for its own parser.
        mine = takewhile(lambda text: text.startswith("-"), typed) if self._subparsers else typed
        for text in takewhile(lambda text: text != "--", mine):
            name = text.partition("=")[0]
            if text.startswith("--") and not any(flag.startswith(name) for flag in flags):
                # Before argparse looks for what is missing: that may be what was misspelt.
                self.error(f"unknown {name}{suggestion(name, flags)}")
        found, unknown = super().parse_known_args(typed, namespace)
        if unknown:
            self.error(f"unexpected {unknown[0]}")
        return found, unknown


def suggestion(typed: str, known: Iterable[str]) -> str:
    """`, did you mean ...?`, where something known is near."""
    near = get_close_matches(typed, known, 1)
    return f", did you mean {near[0]}?" if near else ""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="mlx_loop",
        description="Loop the middle layers of a language model: more compute, no more memory.",
        epilog="`mlx_loop COMMAND --help` shows the options and examples of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mlx_loop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name in COMMANDS:
        module = import_module(f".commands.{name}", __package__)
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.set_defaults(command=name, run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 2 for a mistake of the user, 130 for Ctrl-C."""
    parser, typed = build_parser(), list(sys.argv[1:] if argv is None else argv)
    if typed and not typed[0].startswith("-") and typed[0] not in COMMANDS:
        parser.error(f"unknown command {typed[0]}{suggestion(typed[0], COMMANDS)}")
    args = parser.parse_args(typed)
    try:
        check_idle(args)
        return args.run(args)
    except UserError as error:
        _complain(args.command, str(error))
        return USER_ERROR
    except RuntimeError as error:
        # What MLX says where one of several machines has gone.
        if "peer was lost" not in str(error):
            raise
        _complain(args.command, "another machine has gone, so this one ends too")
        return LOST
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(command: str, message: str) -> None:
    # All of several machines find the same mistake, and the first one says so.
    if os.environ.get("MLX_RANK", "0") == "0":
        print(f"mlx_loop {command}: error: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
