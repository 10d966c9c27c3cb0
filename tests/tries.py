"""Tries of commands, or `-c` of statements, each in a fork of a program that has imported all.

A fork of a process in which MLX has computed hangs, so the one that forks is a program of its own.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

LIMIT = 20.0  # seconds that a try may take
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]")


@dataclass(frozen=True)
class Try:
    """What came of one; `status` is negative for a signal and None for one that had no end."""

    argv: list[str]
    status: int | None
    out: str
    err: str

    def check(self) -> Try:
        """A right run, or one line and status 2; and nothing that a terminal obeys."""
        assert self.status in (0, 2), self
        assert "Traceback" not in self.err, self
        assert not CONTROLS.search(self.out + self.err), self
        if self.status == 2:
            assert self.err.count("\n") == 1, self
            assert len(self.err) < 1200, self
        return self


class Tries:
    """Starts the program that forks; `with` ends it.

    Args:
        environment: of the program, beside what there is.
    """

    def __init__(self, **environment: str):
        self._environment = environment

    def __enter__(self) -> Tries:
        self._program = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[1]),
                "HF_HUB_OFFLINE": "1",
                **self._environment,
            },
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._program.stdin.close()
        self._program.wait()

    def __call__(self, *argv: object, stdin: bytes = b"", cwd: Path, limit: float = LIMIT) -> Try:
        words = list(map(str, argv))
        asked = [words, base64.b64encode(stdin).decode(), str(cwd), limit]
        return Try(words, *self._ask("run", *asked))

    def start(self, *argv: object, cwd: Path, environment: dict[str, str]) -> Running:
        """One that runs beside the test."""
        with tempfile.TemporaryDirectory() as folder:
            pipes = [f"{folder}/{name}" for name in ("stdin", "stdout", "stderr")]
            for pipe in pipes:
                os.mkfifo(pipe)
            number = self._ask("start", list(map(str, argv)), pipes, str(cwd), environment)
            modes = zip(pipes, "wrr", strict=True)  # The other ends are opened in this order too.
            return Running(self, number, *(open(pipe, mode) for pipe, mode in modes))

    def _ask(self, *asked: object) -> Any:
        print(json.dumps(asked), file=self._program.stdin, flush=True)
        return json.loads(self._program.stdout.readline())


@cache
def shared() -> Tries:
    """The one of this test process, because importing all takes seconds."""
    running = Tries().__enter__()
    atexit.register(running.__exit__)
    return running


class Running:
    """What `subprocess.Popen` is, of one that was forked."""

    def __init__(self, tries: Tries, number: int, *pipes: TextIO):
        self._tries, self.pid = tries, number
        self.stdin, self.stdout, self.stderr = pipes
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._tries._ask("poll", self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, text: str | None = None, timeout: float = LIMIT) -> tuple[str, str]:
        end = time.monotonic() + timeout
        with ThreadPoolExecutor(2) as readers:
            said = [readers.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
            with suppress(BrokenPipeError), self.stdin:
                self.stdin.write(text or "")
            while self.poll() is None:
                if time.monotonic() > end:
                    self.send_signal(signal.SIGKILL)
                    raise TimeoutError(f"{self.pid} does not end")
                time.sleep(0.02)
        for pipe in (self.stdout, self.stderr):
            pipe.close()
        return said[0].result(), said[1].result()


def serve() -> None:
    import matplotlib.pyplot  # noqa: F401
    import mlx_lm.generate  # noqa: F401
    import transformers

    import mlx_loop.checkpoints.loading  # noqa: F401
    from mlx_loop.screens import cli

    assert transformers.PreTrainedTokenizerFast  # It is imported when it is asked for.
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        what, *asked = json.loads(line)
        reply = {"run": _run, "start": _start, "poll": _poll}[what](cli.main, *asked)
        print(json.dumps(reply), file=replies, flush=True)


def _run(main, argv, stdin, cwd, limit):
    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
    files[0].write(base64.b64decode(stdin))
    files[0].seek(0)
    child = os.fork()
    if child == 0:
        _be_the_command(main, argv, files, cwd)
    status = _wait(child, time.monotonic() + limit)
    said = []
    for file in files[1:]:
        file.seek(0)
        said.append(file.read().decode("utf-8", "surrogateescape"))
    return [status, *said]


def _start(main, argv, pipes, cwd, environment):
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        files = [open(pipe, mode) for pipe, mode in zip(pipes, "rww", strict=True)]  # noqa: SIM115
        _be_the_command(main, argv, files, cwd)
    return child


def _poll(main, child):
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _be_the_command(main, argv, files, cwd):
    status = 1
    try:
        os.setsid()
        os.chdir(cwd)
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            for number in range(3)
        )
        # Where the one that forks was started by a shell with `&`, it ignores this.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = argv[:1] + argv[2:]
        status = exec(argv[1], {}) if argv[:1] == ["-c"] else main(argv)
        sys.stdout.flush()
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status or 0)


def _wait(child: int, end: float) -> int | None:
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # It has no group of its own yet.
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    serve()
