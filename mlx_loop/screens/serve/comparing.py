"""The page's comparisons: those of `measure.comparison`, as events."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ... import several
from ...checkpoints.memory import Footprint
from ...errors import UserError
from ...generation.prompt import render
from ...generation.sampling import Sampler
from ...measure.comparison import Answer, compare, distinct
from ...measure.trace import middle, trace
from ...models.looped import Looped
from ..board import answer_report
from .desk import Desk
from .turns import Turns

log = logging.getLogger("mlx_loop.serve")

MOST_COLUMNS, MOST_COMPARISONS = 6, 4
LONGEST_TRACE = 512
Event = dict[str, Any]
# The steps of a comparison, where its events go, and whether nobody reads them any more.
_Running = tuple[Generator[Event, None, None], "Queue[Event | None]", threading.Event]


@dataclass
class Comparison:
    """What a page asks.

    Args:
        views: the un-looped one first.
        prompt: token ids.
        columns: for each column of the page its view's number.
    """

    views: list[Looped]
    tokenizer: TokenizerWrapper
    prompt: list[int]
    columns: list[int]
    max_tokens: int
    sampler: Sampler
    seed: int

    def events(self, turns: Turns) -> Generator[Event, None, None]:
        """What happens, one step of the device after the other; called with a turn."""
        yield {
            "event": "start",
            "columns": [{"view": i, "loop": self._loop(self.views[i])} for i in self.columns],
            "prompt_tokens": len(self.prompt),
        }
        sent: list[tuple[int, int | None, str | None]] = [(0, None, None)] * len(self.views)
        answers: list[Answer] = []
        for answers in compare(
            self.views,
            self.tokenizer,
            self.prompt,
            max_tokens=self.max_tokens,
            sampler=self.sampler,
            seed=self.seed,
            progress=lambda done, total: turns.hand_on(),
        ):
            for i, answer in enumerate(answers):
                now = len(answer.text), answer.departs, answer.finish_reason
                if now != sent[i]:
                    yield self._news(i, answer, sent[i][0])
                    sent[i] = now
        for i, answer in enumerate(answers):
            yield {"event": "report", "view": i, **answer_report(answer, answers[0])}
        if len(self.prompt) <= LONGEST_TRACE:
            for i, view in enumerate(self.views):
                if not view.is_unlooped:
                    yield {"event": "trace", "view": i, **_drift(view, self.prompt)}
        yield {"event": "end"}

    @staticmethod
    def _loop(view: Looped) -> dict[str, Any] | None:
        return None if view.loop is None else view.loop.to_dict()

    @staticmethod
    def _news(view: int, answer: Answer, known: int) -> Event:
        at = answer.departs
        return {
            "event": "text",
            "view": view,
            "text": answer.text[known:],
            "tokens": len(answer.tokens),
            "departs": None if at is None or at >= len(answer.starts) else answer.starts[at],
            "tokens_per_second": answer.tokens_per_second,
            "finish_reason": answer.finish_reason,
        }


def _drift(view: Looped, prompt: list[int]) -> Event:
    """Medians over the prompt's tokens, pass by pass."""
    found = trace(view, prompt)
    return {
        "verdict": found.verdict,
        "loops": [
            {
                "layers": [loop.layers[0], loop.layers[-1] + 1],
                "verdict": loop.verdict,
                "reason": loop.reason,
                "residual": [middle(p.residual) for p in loop.passes],
            }
            for loop in found.loops
        ],
    }


def asked(desk: Desk, body: dict[str, Any]) -> Comparison:
    """The comparison that a page's request describes.

    Raises:
        UserError: it cannot be understood.
    """
    if several.count() > 1:
        raise UserError("settings are compared on one machine: ask for each in a model's name")
    prompt, settings = body.get("prompt"), body.get("settings")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("the prompt is empty: type one")
    if (
        not isinstance(settings, list)
        or not 0 < len(settings) <= MOST_COLUMNS
        or not all(isinstance(text, str) for text in settings)
    ):
        raise UserError(f'settings must be a list of up to {MOST_COLUMNS} texts as "loops=6"')
    max_tokens, seed = body.get("max_tokens", 256), body.get("seed", 0)
    heat = body.get("temperature", 0)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (max_tokens, seed))
    if not whole or max_tokens < 1 or not 0 <= seed < 2**31:
        raise UserError("max_tokens must be a whole number from 1 up, seed one from 0 to 2^31")
    if not isinstance(heat, int | float) or not 0 <= heat <= 10:
        raise UserError("temperature must be a number from 0 to 10")
    name = desk.names.name
    wanted = [desk.names.view(f"{name}:{text.strip().replace(' ', ',')}") for text in settings]
    loops = [None if view.is_unlooped else view.loop for view in wanted]
    views = distinct(desk.names.view(name), loops)
    columns = [[view.loop for view in views].index(loop) for loop in loops]
    tokens = render(desk.tokenizer, [{"role": "user", "content": prompt}])
    most = desk.cli_args.max_context
    if len(tokens) >= most:
        raise UserError(f"the prompt has {len(tokens)} tokens, and {most} is the most here")
    max_tokens = min(max_tokens, most - len(tokens))
    need = sum(Footprint(view).cache(len(tokens) + max_tokens) for view in views)
    if need > desk.cli_args.prompt_cache_bytes:
        raise UserError(
            f"these settings need caches of {need / 1e9:.2f} GB together, and "
            f"{desk.cli_args.prompt_cache_bytes / 1e9:.2f} GB is the most here: compare fewer"
        )
    return Comparison(views, desk.tokenizer, tokens, columns, max_tokens, Sampler(heat), seed)


class Comparisons:
    """A thread that takes all comparisons forward, a step of each in turn."""

    def __init__(self, turns: Turns):
        self._turns = turns
        self.running: list[_Running] = []
        self._new: Queue[tuple[Comparison, Queue[Event | None], threading.Event] | None] = Queue()
        self._thread = threading.Thread(target=self._work, name="comparisons", daemon=True)
        self._thread.start()

    def run(self, comparison: Comparison, is_gone: Callable[[], bool]) -> Iterator[Event]:
        """The events of a comparison, which ends when nobody reads them any more."""
        events: Queue[Event | None] = Queue()
        left = threading.Event()
        self._new.put((comparison, events, left))
        try:
            while True:
                try:
                    event = events.get(timeout=1)
                except Empty:
                    if is_gone():
                        return
                    continue
                if event is None or is_gone():
                    return
                yield event
        finally:
            left.set()

    def stop(self) -> None:
        """End the thread, after the comparisons that are under way."""
        self._new.put(None)
        self._thread.join()

    def _work(self) -> None:
        stops, running = False, self.running
        while running or not stops:
            while not running or not self._new.empty():
                if (new := self._new.get()) is None:
                    stops = True
                    break
                comparison, events, left = new
                running.append((comparison.events(self._turns), events, left))
            for entry in list(running):
                steps, events, left = entry
                with self._turns:
                    event = None if left.is_set() else _next(steps)
                    if event is None:
                        steps.close()
                if event is None:
                    running.remove(entry)
                events.put(event)
        # As in upstream_server.
        mx.clear_streams()


def _next(steps: Iterator[Event]) -> Event | None:
    try:
        return next(steps, None)
    except Exception as error:
        log.exception("a comparison has failed")
        return {"event": "error", "message": str(error)}
