"""Several loop settings at once on one set of weights: what they share is computed once.

Settings are views of one model (`with_loop`). Below its window a looped model is the plain one, so
a pass for all views walks the plain layers once (`together`). Decoding takes turns, one token each,
with the next token of every view in flight meanwhile.

Nothing here knows of screens: `compare` is a generator of the answers so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation.generate import stream_generate
from ..generation.prefill import PREFILL_STEP, prefill
from ..generation.prompt import check_prompt
from ..generation.speculative import NUM_DRAFT_TOKENS, Drafter, check_drafts, is_its_own_draft
from ..method.cache import Bookmark
from ..method.loop import layer_passes
from ..models.looped import Looped
from ..models.together import states
from ..settings import LoopLike, ResolvedLoop

# Tokens of which the logits of two settings are compared at a time: it bounds the memory.
CHUNK = 64
# Fewer timed tokens than these make no average.
ENOUGH_TIMES = 16


@dataclass
class Measures:
    """A setting against the un-looped model, along the un-looped model's answer.

    Args:
        first_kl: KL(un-looped || setting) of the first token, in nats.
        mean_kl: its mean over all tokens of the answer, each given the answer before it.
        agreement: share of those tokens where both rank the same token first.
    """

    first_kl: float
    mean_kl: float
    agreement: float


@dataclass
class Answer:
    """What one setting has said so far.

    Args:
        view: the model with this setting.
        tokens: generated; the last one may end the answer and stand for no text.
        starts: for each token, how long the text was before it.
        departs: number of the first token that is not the un-looped answer's; None: none yet.
        drafted: tokens that came from drafts.
        firings: as `Looped.take_firings`.
        share: as `Looped.take_share`.
    """

    view: Looped
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    departs: int | None = None
    drafted: int = 0
    measures: Measures | None = None
    firings: tuple[int, int] = (0, 0)
    share: tuple[int, int] = (0, 0)
    _seconds: float = 0.0
    _timed: int = 0
    _same: int = 0

    @property
    def loop(self) -> ResolvedLoop | None:
        """Complete settings; None: the un-looped model."""
        return self.view.loop

    @property
    def tokens_per_second(self) -> float | None:
        """Of this setting by itself; None before a token was timed."""
        return self._timed / self._seconds if self._seconds else None

    def extra_time(self, base: Answer) -> float | None:
        """Time of a token over `base`'s, less 1; None where too few tokens were timed."""
        speed, plain = self.tokens_per_second, base.tokens_per_second
        if not speed or not plain or min(self._timed, base._timed) < ENOUGH_TIMES:
            return None
        return plain / speed - 1

    def say(self, response: GenerationResponse) -> None:
        """Take the next token in."""
        self.starts.append(len(self.text))
        self.tokens.append(response.token)
        self.text += response.text
        self.drafted += response.from_draft
        self.finish_reason = response.finish_reason

    def compare_to(self, base: Answer) -> None:
        """Find where this answer departs from `base`, as far as both have come."""
        if self.departs is not None:
            return
        for mine, theirs in zip(self.tokens[self._same :], base.tokens[self._same :], strict=False):
            if mine != theirs:
                self.departs = self._same
                return
            self._same += 1
        if len(self.tokens) > self._same and base.finish_reason is not None:
            self.departs = self._same

    def to_dict(self, base: Answer) -> dict[str, Any]:
        """All that is known of it, ready for JSON; `base` is the un-looped answer."""
        loop, layers = self.loop, len(self.view.layers)
        return {
            "loop": None if loop is None else loop.to_dict(),
            "text": self.text,
            "finish_reason": self.finish_reason or "interrupted",
            "generation_tokens": len(self.tokens),
            "draft_tokens": self.drafted,
            "generation_tps": self.tokens_per_second,
            "layers": layers,
            "layer_passes": layer_passes(loop, layers),
            "extra_time": self.extra_time(base),
            "departs_at_token": self.departs,
            **(asdict(self.measures) if self.measures else {}),
            "guard": {"fired": self.firings[0], "loops": self.firings[1]}
            if loop is not None and loop.guard is not None
            else None,
            "gate": {"looped": self.share[0], "tokens": self.share[1]}
            if loop is not None and loop.gate is not None
            else None,
        }

    def took(self, seconds: float) -> None:
        """Count the time of the last token."""
        self._seconds += seconds
        self._timed += 1


def distinct(model: Looped, settings: Sequence[LoopLike]) -> list[Looped]:
    """Views of `model`: the un-looped one first, then each setting that is not one before it.

    Raises:
        UserError: settings that do not fit the model.
    """
    views: dict[ResolvedLoop | None, Looped] = {None: model.with_loop(None)}
    for loop in settings:
        view = model.with_loop(loop)
        if not view.is_unlooped:
            views.setdefault(view.loop, view)
    return list(views.values())


def compare(
    views: Sequence[Looped],
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    seed: int | None = None,
    prefill_step_size: int = PREFILL_STEP,
    draft: str | nn.Module | Drafter | None = None,
    num_draft_tokens: int = NUM_DRAFT_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[list[Answer], None, None]:
    """Answer `prompt` under all settings at once; yields the answers, updated, after each token.

    With a greedy sampler each text is what `generate` gives for that setting alone. The last
    thing yielded has the measures too. Closing the generator stops all answers.

    Args:
        views: as `distinct` makes them, the un-looped one first.
        prompt: token ids.
        sampler: (1, vocab) log-probabilities -> (1,) token; None: greedy.
        seed: all settings draw the same random numbers at the same token, unless something drafts;
            None: whatever comes.
        draft, num_draft_tokens: as in `stream_generate`.
        progress: called with the prompt tokens done and to do.

    Raises:
        UserError: the prompt is empty, or drafts cannot be checked under a setting.
    """
    caches = [view.new_cache() for view in views]
    check_prompt(views[0], prompt, caches[0])
    if draft is not None:
        for view, cache in zip(views, caches, strict=True):
            if not is_its_own_draft(view, draft):
                check_drafts(view, cache)
    answers = [Answer(view) for view in views]
    with wired_limit(views[0], [generation_stream]):  # type: ignore[list-item]
        _prefill(views, caches, prompt, prefill_step_size, progress)
        bookmarks = [Bookmark(cache) for cache in caches]
        streams = [
            stream_generate(
                view,
                tokenizer,
                prompt[-1:],
                max_tokens,
                prompt_cache=cache,
                sampler=sampler,
                draft=draft,
                num_draft_tokens=num_draft_tokens,
                context=prompt[:-1],
            )
            for view, cache in zip(views, caches, strict=True)
        ]
        try:
            yield from _take_turns(streams, answers, seed, draft is not None)
        finally:
            for stream, view, answer in zip(streams, views, answers, strict=True):
                stream.close()
                answer.firings, answer.share = view.take_firings(), view.take_share()
        for bookmark, cache in zip(bookmarks, caches, strict=True):
            bookmark.go_back(cache)
        _measure(views, caches, [prompt[-1], *answers[0].tokens[:-1]], answers)
        yield answers


def _prefill(
    views: Sequence[Looped],
    caches: Sequence[list[Any]],
    prompt: Sequence[int],
    step: int,
    progress: Callable[[int, int], None],
) -> None:
    def feed(tokens: mx.array) -> None:
        with mx.stream(generation_stream):
            states(views, tokens, caches)
            mx.eval([entry.state for cache in caches for entry in cache])

    prefill(feed, mx.array([list(prompt[:-1])], mx.int32), step, progress)
    progress(len(prompt), len(prompt))


def _take_turns(
    streams: Sequence[Iterator[GenerationResponse]],
    answers: list[Answer],
    seed: int | None,
    drafts: bool,
) -> Generator[list[Answer], None, None]:
    """One token of each stream after the other, until all have ended.

    The device works through a queue, so what passes between two tokens that come out of it is the
    time of the second one; unless the caller, between them, took most of that time. A round of
    drafts brings several tokens at once, so there the queue is emptied after every token.
    """
    running = list(zip(streams, answers, strict=True))
    turn = 0
    before = asked = time.perf_counter()
    while running:
        for stream, answer in list(running):
            if seed is not None:
                # Two settings that agree so far draw the same next token.
                mx.random.seed((seed * 2**32 + turn) % 2**64)
            response = next(stream)
            if drafts:
                mx.synchronize(generation_stream)
                before = asked
            now = time.perf_counter()
            answer.say(response)
            if (turn or drafts) and asked - before < 0.5 * (now - before):
                answer.took(now - before)
            if response.finish_reason is not None:
                running.remove((stream, answer))
            for other in answers[1:]:
                other.compare_to(answers[0])
            before = now
            yield answers
            asked = time.perf_counter()
        turn += 1


def _measure(
    views: Sequence[Looped],
    caches: Sequence[list[Any]],
    tokens: Sequence[int],
    answers: Sequence[Answer],
) -> None:
    """Read the un-looped answer under every setting, in a few chunks."""
    rows: list[list[tuple[mx.array, mx.array]]] = [[] for _ in views]
    # Views of their own: what their guards do is not part of an answer.
    views = [
        view.with_loop(view.loop).for_prompt(cache, 1)
        for view, cache in zip(views, caches, strict=True)
    ]
    for start in range(0, len(tokens), CHUNK):
        chunk = mx.array(list(tokens[start : start + CHUNK]))[None]
        base = views[0](chunk, cache=caches[0])
        for row, view, cache in zip(rows, views, caches, strict=True):
            logits = base if view.is_unlooped else view(chunk, cache=cache)
            agrees = mx.argmax(logits, axis=-1) == mx.argmax(base, axis=-1)
            row.append((kl(base, logits)[0], agrees[0]))
            mx.eval(row)
    for row, answer in zip(rows, answers, strict=True):
        kls, agreements = (mx.concatenate(list(parts)) for parts in zip(*row, strict=True))
        answer.measures = Measures(
            float(kls[0]), float(mx.mean(kls)), float(mx.mean(agreements.astype(mx.float32)))
        )


def kl(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) in nats of two sets of logits, (..., vocab) each -> (...), float32."""
    log_p, log_q = (nn.log_softmax(x.astype(mx.float32)) for x in (p, q))
    return mx.maximum(mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1), 0)
