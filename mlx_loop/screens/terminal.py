"""What the commands share of the screen: consoles, progress, Ctrl-C and the line of numbers."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_lm.generate import GenerationResponse
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..generation.conversation import Interrupted
from ..method.loop import layer_passes
from ..models.looped import Looped
from ..settings import LoopConfig

PIPE_WIDTH = 10_000


def _console(stderr: bool = False) -> Console:
    """As wide as the terminal; a file or pipe has no width, so nothing is wrapped there."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


out, err = _console(), _console(stderr=True)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that nothing stops in the middle of a pass over the model.

    A second Ctrl-C raises KeyboardInterrupt.
    """
    stop = threading.Event()

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def prompt_progress(step: int, stop: threading.Event) -> Iterator[Callable[[int, int], None]]:
    """mlx-lm's progress callback: a bar for prompts of several chunks, and the place to stop.

    Args:
        step: tokens in a chunk.
    """
    bar = Progress(
        TextColumn("prompt"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens,"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    task = bar.add_task("prompt", total=None)

    def show(done: int, total: int) -> None:
        if stop.is_set():
            raise Interrupted
        if total > step:
            bar.start()
            bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


def describe(loop: LoopConfig | None) -> str:
    """Loop settings in a few words."""
    return "off" if loop is None else str(loop)


def extra_cost(model: Looped) -> str:
    """What looping adds, in layer passes per looped token."""
    layers = len(model.layers)
    extra = layer_passes(model.loop, layers) / layers - 1
    decode = "full" if model.loop is None else str(model.loop.decode)
    where = {"full": "", "bypass": ", prompt only"}.get(decode, f", first {decode} tokens")
    return f"+{extra:.0%} layer passes{where}"


def numbers(response: GenerationResponse, model: Looped, drafted: int = 0) -> str:
    """The line under an answer.

    Args:
        response: the last one.
        drafted: tokens of the answer that came from drafts.
    """
    parts = [
        f"{response.generation_tokens} tokens",
        f"{response.generation_tps:.1f} tokens/s",
        f"prompt {response.prompt_tokens} tokens, {response.prompt_tps:.0f}/s",
        "no loop" if model.is_unlooped else describe(model.loop),
    ]
    if not model.is_unlooped:
        parts.append(extra_cost(model))
    if model.loop is not None and model.loop.guard is not None:
        parts.append("guard fired {} of {} times".format(*model.take_firings()))
    if drafted:
        parts.append(f"{drafted / response.generation_tokens:.0%} of tokens drafted")
    return " · ".join([*parts, f"peak {response.peak_memory:.2f} GB"])


def is_interactive() -> bool:
    """Whether a person sits in front of both standard input and output."""
    return sys.stdin.isatty() and sys.stdout.isatty()
