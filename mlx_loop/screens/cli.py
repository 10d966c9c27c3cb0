"""The command `mlx_loop`: sub-commands, their help, and how errors reach people."""

from __future__ import annotations

import _thread
import argparse
import io
import logging
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import takewhile
from types import FrameType
from typing import Any, NoReturn

from .. import __version__, several
from ..errors import INTERRUPTED, LOST, UNREAD, USER_ERROR, UserError, suggestion
from ..foreign import TEXT, one_line, visible
from .options import SEVERAL, check_idle

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
        line = f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)"
        self.exit(USER_ERROR, f"{_wrapped(line)}\n")

    # argparse does not mind that a page cannot be written.

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if status == 0:
            sys.stdout.flush()
        super().exit(status, message)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """A flag that is none is refused here, by the parser whose help page has the right one."""
        typed = list(sys.argv[1:] if args is None else args)
        flags = [flag for action in self._actions for flag in action.option_strings]
        words = {f"--{a.dest}": a.metavar for a in self._actions if not a.option_strings}
        # What comes after a command is for its own parser.
        mine = takewhile(lambda text: text.startswith("-"), typed) if self._subparsers else typed
        for text in takewhile(lambda text: text != "--", mine):
            name = text.partition("=")[0]
            if text.startswith("--") and not any(flag.startswith(name) for flag in flags):
                # Before argparse looks for what is missing: that may be what was misspelt.
                meant = f": give {words[name]} without it" if name in words else ""
                self.error(f"unknown {name}{meant or suggestion(name, flags)}")
        found, unknown = super().parse_known_args(typed, namespace)
        if unknown:
            word = unknown[0]
            before = [flag for flag in ("--model", "--prompt") if flag in flags]
            meant = f": put {' or '.join(before)} before it" if before and word[:1] != "-" else ""
            self.error(f"unexpected {word}{meant}")
        return found, unknown


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
        summary = module.SUMMARY[0].upper() + module.SUMMARY[1:]
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=summary if summary.endswith("?") else f"{summary}.",
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.set_defaults(command=name, run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    The exit status is 2 for a mistake of the user or a failing disk, 3 where another of several
    machines has gone, 130 for Ctrl-C, 141 where nobody reads the output; another signal that ends
    the program is a SystemExit of 128 and more.
    """
    name = "mlx_loop"
    try:
        with _ended_by_signals() as ended:
            _open_streams()
            logging.setLogRecordFactory(_Record)
            parser, typed = build_parser(), list(sys.argv[1:] if argv is None else argv)
            if typed and not typed[0].startswith("-") and typed[0] not in COMMANDS:
                parser.error(f"unknown command {typed[0]}{suggestion(typed[0], COMMANDS)}")
            args = parser.parse_args(typed)
            name = f"mlx_loop {args.command}"
            check_idle(args)
            if several.launched():
                several.watch(partial(_leave, name))
            if args.command not in SEVERAL and several.count() > 1:
                raise UserError(f"{args.command} runs on one machine: start it without mlx.launch")
            status = args.run(args)
            sys.stdout.flush()
            # A library may have swallowed the SystemExit.
            return 128 + ended[0] if ended else status
    except BrokenPipeError:
        _drop_output()
        return UNREAD
    except (UserError, OSError, MemoryError) as error:
        _complain(name, one_line(error))
        _drop_output()
        return USER_ERROR
    except RuntimeError as error:
        if not several.is_lost(error):
            raise
        _complain(name, several.GONE)
        return LOST
    except KeyboardInterrupt:
        _say("")
        return INTERRUPTED


def _leave(name: str) -> None:
    """End the program from another thread than the one that waits in vain."""
    _complain(name, several.GONE)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(LOST)


@contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """Whoever ends the program ends it as Ctrl-C does: screens are restored, files are whole.

    Yields the signals that have come.
    """
    ended: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        if _is_deaf(frame):
            # Without the locks of a Timer, which the main thread may have.
            _thread.start_new_thread(_send_again, (signum,))
            return
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        ended.append(signum)
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield ended
        return
    # What is ignored stays so: that is what `nohup` is for.
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield ended
    except Exception:
        if ended:  # It comes of a library that took the SystemExit for an error.
            raise SystemExit(128 + ended[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_deaf(frame: FrameType | None) -> bool:
    """Whether what is raised here is forgotten, with a trace: at the end of objects and imports."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or (code.co_name, code.co_filename) == _END_OF_IMPORT:
            return True
        frame = frame.f_back
    return False


def _send_again(signum: int) -> None:
    time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident or 0, signum)


_END_OF_IMPORT = ("cb", "<frozen importlib._bootstrap>")


def _open_streams() -> None:
    """What is closed is opened, or the next file would be taken for it; all of it is UTF-8."""
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        # The lowest number that is free, and so the one that was closed.
        handle = os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, open(handle, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, _SHOWN), (sys.stderr, _SHOWN)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=TEXT if stream is sys.stdin else None, errors=errors)
    if "stdout" in closed:
        raise UserError("standard output is closed: the answer has nowhere to go")


# What an encoding lacks does not stop an answer.
_SHOWN = "backslashreplace"


class _Record(logging.LogRecord):
    """What libraries say of foreign files does nothing to a terminal either."""

    def getMessage(self) -> str:
        return visible(super().getMessage())


def _drop_output() -> None:
    """Forget what could not be written; Python would complain once more at exit."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(name: str, message: str) -> None:
    # All of several machines find the same mistake, and the first one says so.
    if several.is_first():
        _say(_wrapped(f"{name}: error: {message}"))


def _say(line: str) -> None:
    with suppress(OSError):  # Nobody is told, but the status is what it should be.
        print(line, file=sys.stderr)


def _wrapped(line: str) -> str:
    """The line, broken between words where a terminal would break it anyhow."""
    if not sys.stderr.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
