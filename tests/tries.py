"""Tries of commands, or `-c` of statements, each in a fork of a program that has imported all.

A fork of a process in which MLX has computed hangs, so the one that forks is a program of its own.
"""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path

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
        print(json.dumps(asked), file=self._program.stdin, flush=True)
        return Try(words, *json.loads(self._program.stdout.readline()))


def serve() -> None:
    import matplotlib.pyplot  # noqa: F401
    import mlx_lm.generate  # noqa: F401
    import transformers

    import mlx_loop.checkpoints.loading  # noqa: F401
    from mlx_loop.screens import cli

    assert transformers.PreTrainedTokenizerFast  # It is imported when it is asked for.
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        argv, stdin, cwd, limit = json.loads(line)
        files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        files[0].write(base64.b64decode(stdin))
        files[0].seek(0)
        child = os.fork()
        if child == 0:
            _be_the_command(cli.main, argv, files, cwd)
        status = _wait(child, time.monotonic() + limit)
        said = []
        for file in files[1:]:
            file.seek(0)
            said.append(file.read().decode("utf-8", "surrogateescape"))
        print(json.dumps([status, *said]), file=replies, flush=True)


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
        status = exec(argv[1], {}) if argv[0] == "-c" else main(argv)
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
