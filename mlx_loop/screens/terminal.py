"""What the commands share of the screen: consoles, progress, Ctrl-C and the line of numbers."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import termios
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import GenerationResponse
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from .. import several
from ..checkpoints.memory import trained_length
from ..foreign import visible
from ..generation.conversation import Interrupted
from ..method.loop import layer_passes
from ..models.looped import Looped
from ..settings import LoopConfig

PIPE_WIDTH = 10_000
SECONDS_BETWEEN_PICTURES = 0.1


class Screen(Console):
    """A console that takes no text for markup, and shows controls instead of obeying them."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        # Here already, because rich drops some controls silently.
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.control or segment.text.isprintable()
            yield segment if shown else segment._replace(text=visible(segment.text))

    @property
    def can_redraw(self) -> bool:
        """Whether what was shown can be replaced."""
        return self.is_terminal and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        raise  # What rich has caught; `main` knows what to do.


def _console(stderr: bool = False) -> Screen:
    """As wide as the terminal; a file or pipe has no width, so nothing is wrapped there.

    Of several machines the first one speaks.
    """
    console = Screen(stderr=stderr, quiet=not several.is_first())
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


out, err = _console(), _console(stderr=True)


@contextmanager
def busy(what: str, name: str = "") -> Iterator[Status]:
    """What is being done, and to what, while it takes time."""
    with unechoed(), err.status(Text(f"{what} {visible(name)}")) as status:
        yield status


def command_line() -> str:
    """What was typed to start the program."""
    return shlex.join(["mlx_loop", *sys.argv[1:]])


def is_interactive() -> bool:
    """Whether a person sits in front of both standard input and output."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class NowAndThen:
    """Draws at most so often that most of the time is the answers', on huge terminals too."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, draw: Callable[[], None]) -> None:
        start = time.perf_counter()
        if start > self._next:
            draw()
            drawn = time.perf_counter()
            self._next = drawn + max(SECONDS_BETWEEN_PICTURES, 5 * (drawn - start))


def plain_table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    """A table without lines; columns are of numbers, at the right, but the first and `left`."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        is_left = name in (columns[0], *left)
        table.add_column(name, justify="left" if is_left else "right", overflow="fold")
    return table


class Stop:
    """Whether Ctrl-C was pressed; of several machines on any, and all hear of it together."""

    pressed = False

    def is_set(self) -> bool:
        return several.any_of(self.pressed)


@contextmanager
def unechoed() -> Iterator[None]:
    """What is typed meanwhile is not seen among what is drawn: it waits for the next prompt."""
    if not _is_in_front():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        if _is_in_front():
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _is_in_front() -> bool:
    """Whether the keyboard is ours; a program in the background is stopped if it touches it."""
    return is_interactive() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()


@contextmanager
def interruptible() -> Iterator[Stop]:
    """What Ctrl-C sets, so that nothing stops in the middle of a pass over the model.

    A second Ctrl-C raises KeyboardInterrupt.
    """
    stop = Stop()

    def handle(signum: int, frame: Any) -> None:
        if stop.pressed:
            raise KeyboardInterrupt
        stop.pressed = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        with unechoed():
            yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bar(unit: str = "", count: ProgressColumn | None = None) -> Progress:
    """A bar that leaves nothing behind, and is not drawn where nobody sees it.

    Args:
        unit: what is counted.
        count: how it is counted, else `3/10`.
    """
    return Progress(
        SpinnerColumn(),  # Alive before the first of what is counted.
        TextColumn("{task.description}"),
        BarColumn(),
        count or MofNCompleteColumn(),
        *([TextColumn(unit)] if unit else []),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextmanager
def prompt_progress(step: int, stop: Stop) -> Iterator[Callable[[int, int], None]]:
    """mlx-lm's progress callback: a bar for prompts of several chunks, and the place to stop.

    Args:
        step: tokens in a chunk.
    """
    bar = progress_bar("tokens,")
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


@dataclass
class Streamed:
    """An answer that has been shown as it came.

    Args:
        last: the last response, if there was one.
        drafted: tokens that came from drafts.
    """

    text: str = ""
    last: GenerationResponse | None = None
    drafted: int = 0
    stopped: bool = False


def stream(
    start: Callable[[Callable[[int, int], None]], Generator[GenerationResponse, None, None]],
    step: int,
    show: Callable[[str], None],
) -> Streamed:
    """Run an answer to its end, or until Ctrl-C.

    Args:
        start: makes the stream of responses, given mlx-lm's progress callback.
        step: prompt tokens processed at a time.
        show: called with each piece of text.
    """
    answer = Streamed()
    with interruptible() as stop, prompt_progress(step, stop) as progress:
        responses = start(progress)
        try:
            for response in responses:
                answer.last = response
                answer.text += response.text
                answer.drafted += response.from_draft
                show(response.text)
                out.file.flush()
                if stop.is_set():
                    responses.close()
        except Interrupted:
            pass
        answer.stopped = stop.is_set()
    return answer


def describe(loop: LoopConfig | None) -> str:
    """Loop settings in a few words."""
    return "off" if loop is None else str(loop)


def extra_cost(model: Looped) -> str:
    """What looping adds, in layer passes per looped token."""
    layers = model.depth
    extra = layer_passes(model.loop, layers) / layers - 1
    loop = model.loop
    decode = "full" if loop is None else str(loop.decode)
    where = {"full": "", "bypass": ", prompt only"}.get(decode, f", first {decode} tokens")
    if loop is not None and loop.prompt == "plain":
        only = ", the prompt's last token only"
        where = only if decode == "bypass" else where + ", not the prompt"
    most = ""
    if loop is not None and loop.gate is not None:
        most, where = "at most ", where + ", where unsure"
    return f"{most}+{extra:.0%} layer passes{where}"


def context(model: Looped, tokens: int) -> str:
    """How much of the context that a model was trained on is used."""
    trained = trained_length(model)
    longer = ", longer than it was trained on" if 0 < trained < tokens else ""
    return f"context {tokens}{f' of {trained}' if trained else ''}{longer}"


def tell_of_length(model: Looped, tokens: int) -> bool:
    """Say so where a prompt is longer than what a model was trained on; True: it is."""
    trained = trained_length(model)
    too_long = 0 < trained < tokens
    if too_long:
        err.print(
            f"a prompt has {tokens} tokens, and the model was trained on {trained} at most: what "
            "it says then may mean little",
            style="yellow",
        )
    return too_long


def numbers(answer: Streamed, model: Looped) -> str:
    """The line under an answer that has at least one token."""
    last = answer.last
    assert last is not None
    parts = [
        f"{last.generation_tokens} tokens",
        f"{last.generation_tps:.1f} tokens/s",
        f"prompt {last.prompt_tokens} tokens, {last.prompt_tps:.0f}/s",
        "no loop" if model.is_unlooped else describe(model.loop),
    ]
    if not model.is_unlooped:
        parts.append(extra_cost(model))
    if model.loop is not None and model.loop.guard is not None:
        parts.append("guard fired {} of {} times".format(*model.take_firings()))
    looped, tokens = model.take_share()
    if tokens:
        parts.append(f"{looped / tokens:.0%} of tokens looped")
    if answer.drafted:
        parts.append(f"{answer.drafted / last.generation_tokens:.0%} of tokens drafted")
    return " · ".join([*parts, f"peak {last.peak_memory:.2f} GB"])
