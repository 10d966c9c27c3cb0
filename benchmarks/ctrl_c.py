"""How long a command goes on after Ctrl-C, at random moments of its life.

    python benchmarks/ctrl_c.py --model demo >> table.md
    python benchmarks/ctrl_c.py --model smollm2 --moments 10 trace sweep

Each command runs in a folder and a process of its own, and hears SIGINT at a moment that is drawn
between its first half second, in which Python itself starts, and its end, or `--longest` seconds
where it takes longer. Timed is from there to the end of the process: `chat` and `compare on a
terminal` go on, so of them it is to the line that says that the answer was stopped. `status` counts
the exit statuses, 130 being that of Ctrl-C, and 0 that of a command that had said all and whose
memory was just taken back. A trace of Python's on the screen is an error, and is shown. Needs the
`test` extra.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pexpect
from rich.console import Console
from rich.progress import track

# 7630 tokens of the demo's.
BOOK = " ".join(f"The {n}th day was long and the sea was grey." for n in range(430))
STORY = ["--prompt", "Tell me a story.", "--max-tokens", "3000"]
COMMANDS = {
    "generate": ["generate", "--loops", "6", *STORY],
    "generate, long prompt": ["generate", "--loops", "2", "--prompt", "-"],
    "cache_prompt": ["cache_prompt", "--prompt", "-", "--prompt-cache-file", "kept.safetensors"],
    "trace": ["trace", "--prompt", BOOK[:3000]],
    "sweep": ["sweep", "--task", "demo", "--limit", "200", "--loops", "2,3,4,6"],
    "evaluate": [
        *("evaluate", "--tasks", "niah_single_1,niah_single_2,vt", "--lengths", "512,1024"),
        *("--limit", "40", "--loops", "2,4"),
    ],
    "compare": ["compare", "--loops", "2,4,6", *STORY],
    "bench": ["bench", "--loops", "2,3", "-p", "512", "-g", "400", "-n", "8"],
    "quantize": ["quantize", "--mlx-path", "fewer", "--bits-per-weight", "4.5"],
    "plan": ["plan", "--verbose"],
}
ON_A_TERMINAL = {"chat": "chat", "compare on a terminal": "compare"}
START = 0.5
ENOUGH = 60.0  # seconds after which nobody waits
PROMPT = "\x1b[?2004h"  # What prompt_toolkit writes before it reads a line.


def words(command: list[str], model: str) -> list[str]:
    """What starts it."""
    place = [model] if command[0] == "plan" else ["--model", model]
    return [sys.executable, "-m", "mlx_loop", *command, *place]


class Process:
    """A command in a folder of its own, whose standard input is the book."""

    def __init__(self, command: list[str], model: str):
        self._folder = tempfile.TemporaryDirectory()
        place = Path(self._folder.name)
        (place / "book.txt").write_text(BOOK)
        self._said = place / "said.txt"
        with (place / "book.txt").open() as book, self._said.open("w") as said:
            self._process = subprocess.Popen(
                words(command, model), cwd=place, stdin=book, stdout=subprocess.DEVNULL, stderr=said
            )

    def lives(self, seconds: float) -> bool:
        """Whether it goes on for so long."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def stop(self) -> tuple[float, int]:
        """Press Ctrl-C: the seconds to its end, and its exit status."""
        start = time.perf_counter()
        self._process.send_signal(signal.SIGINT)
        if self.lives(ENOUGH):
            self._process.kill()
            self._process.wait()
        took = time.perf_counter() - start
        said = self._said.read_text(errors="replace")
        if "Traceback" in said:
            raise SystemExit(f"Ctrl-C shows a trace:\n{said}")
        self._folder.cleanup()
        status = self._process.returncode
        # Killed by SIGINT, as Python ends where it was in the text of an `exec`: 130 to a shell.
        return took, 128 - status if status < 0 else status


def at_moments(
    command: list[str], model: str, moments: int, longest: float, draw: random.Random, title: str
) -> Iterator[tuple[float, int]]:
    """Of each moment, the seconds to the end and the exit status."""
    start, whole = time.perf_counter(), Process(command, model)
    whole.lives(longest)
    length = time.perf_counter() - start
    whole.stop()
    console = Console(stderr=True)
    for _ in track(range(moments), title, console=console, transient=True):
        process = Process(command, model)
        while not process.lives(draw.uniform(START, length)):
            # It was quicker this time.
            process.stop()
            process = Process(command, model)
        yield process.stop()


def on_a_terminal(command: str, model: str, moments: int, draw: random.Random) -> Iterator[float]:
    """Of each moment of an answer, the seconds to the line that says that it was stopped."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note.txt"
        note.write_text(BOOK[:8000])
        options = ["--loops", "4", "--max-tokens", "3000"]
        program, *rest = words([command, *options], model)
        # It would wait for a terminal that answers, and hear no signal meanwhile.
        os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"
        screen = pexpect.spawn(
            program, rest, timeout=ENOUGH, dimensions=(40, 100), encoding="utf-8"
        )
        screen.expect("Ctrl-D leaves")
        while moments:
            said(screen, 0.5)
            if command == "chat" and moments % 2:
                # The next prompt is long.
                screen.sendline(f"/file {note}")
                said(screen, 0.5)
            screen.sendline("Tell me a long story about the sea and the days.")
            if PROMPT not in said(screen, draw.uniform(0.1, 2)):  # Else the answer is complete.
                start = time.perf_counter()
                screen.sendintr()
                screen.expect("stopped")
                yield time.perf_counter() - start
                moments -= 1
            if command == "chat":
                said(screen, 0.5)
                screen.sendline("/clear")
        screen.close(force=True)


def said(screen: pexpect.spawn, seconds: float) -> str:
    """What it writes in so many seconds."""
    text, end = "", time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        with suppress(pexpect.TIMEOUT):
            text += screen.read_nonblocking(100_000, left)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*COMMANDS, *ON_A_TERMINAL]
    parser.add_argument("commands", nargs="*", default=every, help=f"of {', '.join(every)}")
    parser.add_argument("--model", default="demo", help="default: demo")
    parser.add_argument("--moments", type=int, default=40, help="of each command; default: 40")
    parser.add_argument("--longest", type=float, default=8, help="seconds; default: 8")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What a shell starts with `&` ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(args.seed)
    print("| command | moments | median, s | longest, s | above 1 s | status |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.commands:
        if name in ON_A_TERMINAL:
            times = [*on_a_terminal(ON_A_TERMINAL[name], args.model, args.moments, draw)]
            status = ""
        else:
            asked = args.model, args.moments, args.longest, draw, name
            found = [*at_moments(COMMANDS[name], *asked)]
            times = [took for took, _ in found]
            counts = Counter(status for _, status in found)
            status = ", ".join(f"{status}: {n}" for status, n in sorted(counts.items()))
        slow = sum(took > 1 for took in times)
        shown = f"{statistics.median(times):.2f} | {max(times):.2f} | {slow} | {status}"
        print(f"| {name} | {len(times)} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
