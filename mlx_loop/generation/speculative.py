"""Speculative decoding of a looped model: cheap drafts, checked several at a time.

Where reading weights takes the time, as in decoding on any Mac, a looped pass over n + 1 tokens
costs what it costs for one. The tokens are those of plain looped decoding; sampling keeps its
distribution (`Sampler.verify`). The cheapest draft is the model's own un-looped pass: the loop
needs its prelude and natural pass anyway, with the same keys and values.

Every token is checked as if it were fed alone (`halves.looped`): a plain call with several
tokens is something else under policy `first`, where the later passes of a prompt see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import common_prefix_len

from ..errors import UserError
from ..method.cache import rewind, tokens_seen
from ..method.loop import Natural, layer_passes
from ..method.policies import POLICIES
from ..models import halves
from ..models.looped import Looped
from .prefill import PREFILL_STEP, prefill
from .sampling import Sampler

# The most tokens to draft at a time, and the lengths of the n-grams that `LookupDraft` looks up.
NUM_DRAFT_TOKENS = 8
NGRAMS = (3, 2)


@dataclass
class Draft:
    """Proposed tokens.

    Args:
        tokens: (n,), int.
        logits: (n, vocab), what they were drawn from (`Sampler.logits`); None: not drawn.
        natural: what the model did on the way, for the last token of the text and the drafts.
    """

    tokens: mx.array
    logits: mx.array | None = None
    natural: Natural | None = None


class Drafter(Protocol):
    """Something that proposes how a text goes on."""

    def cost(self, model: Looped) -> float:
        """Of a drafted token, in layers of `model`."""
        ...

    def draft(
        self, model: Looped, cache: list[Any], text: list[int], count: int, sampler: Sampler
    ) -> Draft:
        """What may follow `text`: at most `count` tokens, which is at least 1.

        Args:
            model, cache: what checks the drafts. The cache holds all of `text` but the last token.
        """
        ...


class SelfDraft:
    """The un-looped model: the same weights and, up to the window's end, the same cache."""

    def cost(self, model: Looped) -> float:
        return len(model.layers)

    def draft(
        self, model: Looped, cache: list[Any], text: list[int], count: int, sampler: Sampler
    ) -> Draft:
        token = mx.array(text[-1:])
        parts, tokens, logits = [], [], []
        for _ in range(count):
            found, natural = halves.plain(model, token[None], cache)
            parts.append(natural)
            logits.append(sampler.logits(_logprobs(found[0])))
            token = sampler.draw(logits[-1])
            mx.async_eval(token)
            tokens.append(token)
        parts.append(halves.enter(model, token[None], cache))
        return Draft(mx.concatenate(tokens), mx.concatenate(logits), Natural.join(parts))


@dataclass
class LookupDraft:
    """What followed when the last few tokens occurred before: prompt lookup.

    Good where answers repeat the prompt: summaries, edits, code. Saxena, Prompt Lookup Decoding
    (2023). An object is for one text, which grows.
    """

    _follows: dict[tuple[int, ...], int] = field(default_factory=dict)
    _indexed: int = 0

    def cost(self, model: Looped) -> float:
        return 0

    def draft(
        self, model: Looped, cache: list[Any], text: list[int], count: int, sampler: Sampler
    ) -> Draft:
        for end in range(self._indexed, len(text)):
            for size in NGRAMS:
                if end >= size:
                    self._follows[tuple(text[end - size : end])] = end
        self._indexed = len(text)
        starts = (self._follows.get(tuple(text[-size:])) for size in NGRAMS)
        start = next((start for start in starts if start), len(text))
        return Draft(mx.array(text[start : start + count], mx.uint32))


class ModelDraft:
    """A small model with the same tokens. It keeps its own cache, also from text to text."""

    def __init__(self, model: nn.Module):
        self._model, self._cache = model, make_prompt_cache(model)
        _refuse(halves.untrimmable(self._cache))
        self._seen: list[int] = []
        self._drafted = mx.array([], mx.uint32)

    def cost(self, model: Looped) -> float:
        return _bytes(self._model) / _bytes(model) * len(model.layers)

    def draft(
        self, model: Looped, cache: list[Any], text: list[int], count: int, sampler: Sampler
    ) -> Draft:
        seen = self._seen + _ids(self._drafted[:-1])
        common = min(common_prefix_len(seen, text), len(text) - 1)
        rewind(self._cache, common)
        # What holds if an exception ends this half-way.
        self._seen, self._drafted = text[:common], self._drafted[:0]
        new = text[common:]
        # After a round at most two tokens are new: they go with the first draft.
        _feed(self._model, self._cache, new[:-1])
        token, tokens, logits = mx.array(new[-2:]), [], []
        for _ in range(count):
            rows = self._model(token[None], cache=self._cache)[0, -1:]
            rows = _resized(rows, model.args.vocab_size)
            logits.append(sampler.logits(_logprobs(rows)))
            token = sampler.draw(logits[-1])
            mx.async_eval(token)
            tokens.append(token)
        self._seen, self._drafted = list(text), mx.concatenate(tokens)
        return Draft(self._drafted, mx.concatenate(logits))


class Pace:
    """How many tokens to draft: what makes the expected cost of a token least.

    With acceptance rate r a round of n drafts yields 1 + r + ... + r^n tokens (Leviathan et al.,
    section 3.1). The rate is a running one, of drafts whose predecessors were right: what was seen
    fades, so a text that turns easy or hard is noticed, and after a while without drafts one is
    tried again.

    Args:
        draft_cost, check_cost: of a drafted token and of a check, in the same unit.
        most: the most tokens to draft.
    """

    FADE = 0.95
    PRIOR = (1.9, 0.1)

    def __init__(self, draft_cost: float, check_cost: float, most: int):
        self._draft_cost, self._check_cost, self._most = draft_cost, check_cost, most
        self._kept, self._rejected = 0.0, 0.0

    @property
    def rate(self) -> float:
        """The running acceptance rate, 0 to 1."""
        kept, rejected = self._kept + self.PRIOR[0], self._rejected + self.PRIOR[1]
        return kept / (kept + rejected)

    def length(self, room: int) -> int:
        """Tokens to draft now, at most `room`."""

        def cost(n: int) -> float:
            return (n * self._draft_cost + self._check_cost) / expected_tokens(self.rate, n)

        return min(range(min(self._most, room) + 1), key=cost)

    def record(self, kept: int, drafted: int) -> None:
        """Of a round: of `drafted` tokens the first `kept` were right, and the next was not."""
        self._kept = self.FADE * self._kept + kept
        self._rejected = self.FADE * self._rejected + (kept < drafted)


def expected_tokens(rate: float, drafts: int) -> float:
    """Tokens of a round of some drafts, each of which is kept at `rate` if those before it are."""
    return sum(rate**i for i in range(drafts + 1))


def round_passes(model: Looped, drafts: int) -> int:
    """Layer evaluations of a round of self-drafting: n N for the drafts, and one looped pass."""
    layers = len(model.layers)
    return drafts * layers + layer_passes(model.loop, layers)


def check_drafts(model: Looped, cache: Sequence[Any]) -> None:
    """Refuse settings under which drafts cannot be checked exactly.

    Raises:
        UserError: says which setting, and why.
    """
    loop = model.loop
    if not model.is_unlooped and loop is not None:
        if reason := POLICIES[loop.cache].no_drafts:
            raise UserError(
                f"drafting does not work with cache={loop.cache!r}: {reason}; use cache='first' or "
                "'own', or no draft"
            )
        if loop.decode != "full":
            raise UserError(
                f"drafting does not work with decode={loop.decode!r}: it saves the cost of loops "
                "while generating; use decode='full', or no draft"
            )
        if loop.gate is not None:
            raise UserError(
                f"drafting does not work with gate={loop.gate!r}, whose un-looped pass is the "
                "draft: use --draft self, or no draft"
            )
    _refuse(halves.obstacle(model, cache))


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise UserError(f"drafting does not work with {reason}: use no draft")


def is_its_own_draft(model: Looped, draft: Any) -> bool:
    """Whether nothing is gained by drafting with the un-looped model: that is what runs anyway."""
    gate = None if model.loop is None else model.loop.gate
    return draft == "self" and (model.is_unlooped or gate is not None)


def speculative_generate_step(
    prompt: Sequence[int],
    model: Looped,
    drafter: Drafter,
    *,
    prompt_cache: list[Any],
    context: Sequence[int] = (),
    pace: Pace | None = None,
    num_draft_tokens: int = NUM_DRAFT_TOKENS,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    prefill_step_size: int = PREFILL_STEP,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """As mlx-lm's generator of that name: tokens, log-probabilities (vocab,), whether drafted.

    Closed at any token, or stopped by an exception, it leaves the cache with a text that it has
    given out (of which the last token may be missing), just as plain looped decoding does.

    Args:
        prompt_cache: what came before; it is updated.
        context: the tokens in the cache, for drafters that look at the whole text.
        pace: how many tokens to draft; None: as few or many as pay off, up to `num_draft_tokens`.
        max_tokens: -1: no limit.

    Raises:
        UserError: as `check_drafts`.
    """
    check_drafts(model, prompt_cache)
    sampler = sampler or Sampler()
    if pace is None:
        layers = len(model.layers)
        pace = Pace(drafter.cost(model), layer_passes(model.loop, layers), num_draft_tokens)

    def quantise() -> None:
        maybe_quantize_kv_cache(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)

    progress = prompt_progress_callback or (lambda done, total: None)
    text = [*context, *prompt]
    with mx.stream(generation_stream):
        _feed(model, prompt_cache, prompt, prefill_step_size, quantise, progress)
        progress(len(prompt), len(prompt))
        done, left = tokens_seen(prompt_cache) or 0, max_tokens
        try:
            while left:
                room = num_draft_tokens if left < 0 else left - 1
                if kv_bits is not None and done < quantized_kv_start:
                    # Plain decoding turns to quantised entries after a certain token.
                    room = min(room, quantized_kv_start - done - 1)
                count = pace.length(room)
                draft = Draft(mx.array([], mx.uint32))
                if count:
                    draft = drafter.draft(model, prompt_cache, text, count, sampler)
                logits = _checked(model, prompt_cache, text[-1], draft)
                logprobs = _logprobs(logits)
                kept, follower = sampler.verify(logprobs, draft.tokens, draft.logits)
                quantise()
                mx.eval(kept, follower, draft.tokens)
                accepted = int(kept)
                tokens = [*_ids(draft.tokens)[:accepted], int(follower)]
                pace.record(accepted, draft.tokens.size)
                start, done = done, done + len(tokens)
                rewind(prompt_cache, done)
                for i, token in enumerate(tokens):
                    text.append(token)
                    left -= 1
                    # The cache holds every token of the round but the last.
                    done = start + min(i + 2, len(tokens))
                    yield token, logprobs[i], i < accepted
        finally:
            rewind(prompt_cache, done)


def _checked(model: Looped, cache: list[Any], last: int, draft: Draft) -> mx.array:
    """The model's logits (n + 1, vocab) after the text and after each of n drafts."""
    tokens = mx.concatenate([mx.array([last], mx.uint32), draft.tokens])[None]
    if draft.natural is None and (model.is_unlooped or tokens.shape[1] == 1):
        return model(tokens, cache=cache)[0]
    natural = draft.natural or halves.enter(model, tokens, cache)
    return halves.looped(model, tokens, cache, natural)[0]


def _feed(
    model: Any,
    cache: list[Any],
    prompt: Sequence[int],
    step: int = PREFILL_STEP,
    after: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Feed all but the last token."""

    def feed(tokens: mx.array) -> None:
        model(tokens, cache=cache)
        after()
        mx.eval([entry.state for entry in cache])

    prefill(feed, mx.array([prompt[:-1]], mx.int32), step, progress)


def _logprobs(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _ids(tokens: mx.array) -> list[int]:
    return cast(list[int], tokens.tolist())


def _resized(logits: mx.array, vocab: int) -> mx.array:
    """Models of one family pad their vocabulary to different sizes."""
    missing = vocab - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab]
    return mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)


def _bytes(model: nn.Module) -> int:
    return tree_reduce(lambda total, array: total + array.nbytes, model.parameters(), 0)
