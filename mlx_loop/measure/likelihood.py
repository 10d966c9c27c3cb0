"""Log-likelihoods of continuations under several loop settings at once.

Tokens are fed as by mlx-lm's adapter to lm-evaluation-harness: the prompt in pieces, its last token
among them, then a continuation in one piece, all but its last token. Under `first` the later passes
of a continuation therefore see what the prompt's natural pass left, and each other; they do not see
the prompt's later passes, as they would if prompt and continuation were fed in one.

A prompt is fed once for all of its continuations, and the layers below the windows are computed
once for all settings (`together`). Padding is on the right, where causal attention does not look.
Continuations are fed one by one where a cache cannot be merged or takes padding in, and where it
matters which tokens are the answer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import mlx.core as mx

from ..generation.batch import batched, merges, padded, step_of_rows
from ..generation.prefill import PREFILL_STEP, prefill
from ..generation.prompt import check_tokens
from ..generation.sampling import check_finite
from ..models.looped import Looped
from ..models.together import logits, states
from ..upstream import NOT_CAUSAL
from .comparison import CHUNK

Tokens = Sequence[int]


def log_likelihoods(
    views: Sequence[Looped],
    prompts: Sequence[Tokens],
    endings: Sequence[Sequence[Tokens]],
    step: int = PREFILL_STEP,
) -> list[list[list[float]]]:
    """log p(continuation | prompt) in nats, of each view, prompt and continuation of it.

    Args:
        views: of one model. A continuation is what a view generates, as far as that matters to it.
        prompts: token ids, at least one each.
        endings: the continuations of each prompt: token ids, at least one each.
        step: prompt tokens that are fed at a time, those of all prompts together.
    """
    check_tokens(views[0], *prompts, *chain(*endings))
    shared = [i for i, view in enumerate(views) if _can_share(view)]
    found = dict(
        zip(shared, _together([views[i] for i in shared], prompts, endings, step), strict=True)
    )
    for i, view in enumerate(views):
        if i not in found:
            found[i] = [_alone(view, *pair, step) for pair in zip(prompts, endings, strict=True)]
        check_finite(view.loop, mx.array([*chain(*found[i])]))
    return [found[i] for i in range(len(views))]


def _can_share(view: Looped) -> bool:
    """Whether it can be a batch with padding, and an answer passes as a prompt does."""
    takes_padding = merges(view.new_cache(), uneven=True) and view.model_type not in NOT_CAUSAL
    return takes_padding and not view.tells_tokens_apart


def _alone(view: Looped, prompt: Tokens, endings: Sequence[Tokens], step: int) -> list[float]:
    cache, found = view.new_cache(), []
    view = view.for_prompt(cache, len(prompt))
    last = mx.array([])

    def feed(tokens: mx.array) -> None:
        nonlocal last
        last = view(tokens, cache=cache)[:, -1:]
        mx.eval(last, [entry.state for entry in cache])

    prefill(feed, padded([prompt]), step)
    for ending in endings:
        rows = [last]
        if len(ending) > 1:
            rows.append(view(padded([ending[:-1]]), cache=copy.deepcopy(cache)))
        chances = log_probabilities(mx.concatenate(rows, axis=1)[0], padded([ending]).T)
        found.append(float(chances.sum()))
    return found


def _together(
    views: Sequence[Looped],
    prompts: Sequence[Tokens],
    endings: Sequence[Sequence[Tokens]],
    step: int,
) -> list[list[list[float]]]:
    if not views:
        return []
    lengths = [len(prompt) for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    caches = [batched(view, lengths, padding) for view in views]
    # States, and for each one the tokens that may follow it: first the prompts' last ones.
    found = [[state] for state in _feed_prompts(views, prompts, caches, step)]
    after: list[Tokens] = [[ending[0] for ending in of] for of in endings]
    longer = [(i, ending) for i, of in enumerate(endings) for ending in of if len(ending) > 1]
    if longer:
        for entry in chain.from_iterable(caches):
            if any(padding):
                entry.finalize()
            # The row of its prompt for each continuation.
            entry.filter([i for i, _ in longer])
        rows = [ending[:-1] for _, ending in longer]
        at = [(i, j) for i, row in enumerate(rows) for j in range(len(row))]
        row, column = (mx.array(of) for of in zip(*at, strict=True))
        for parts, state in zip(found, states(views, padded(rows), caches), strict=True):
            parts.append(state[..., row, column, :])
        after += [[token] for _, ending in longer for token in ending[1:]]
    results = []
    for parts in found:
        chances = _chances(views[0], mx.concatenate(parts, axis=-2), after)
        rest = iter(chances[len(prompts) :])
        results.append(
            [
                [chance + sum(next(rest)[0] for _ in ending[1:]) for chance, ending in pairs]
                for pairs in map(zip, chances, endings)
            ]
        )
    return results


def _feed_prompts(
    views: Sequence[Looped], prompts: Sequence[Tokens], caches: list[list[Any]], step: int
) -> list[mx.array]:
    """The state of each prompt's last token under each view, (..., prompts, hidden)."""
    last = mx.array([len(prompt) - 1 for prompt in prompts])
    found: list[mx.array] = []
    start = 0

    def feed(piece: mx.array) -> None:
        nonlocal found, start
        # Prompts that end in an earlier piece keep their state, the others' is replaced later.
        place = mx.clip(last - start, 0, piece.shape[1] - 1)
        ends = (last >= start)[:, None]
        of_piece = [
            state[..., mx.arange(len(prompts)), place, :] for state in states(views, piece, caches)
        ]
        found = [mx.where(ends, x, y) for x, y in zip(of_piece, found or of_piece, strict=True)]
        for state, cache in zip(found, caches, strict=True):
            mx.eval(state, [entry.state for entry in cache])
        start += piece.shape[1]

    prefill(feed, padded(prompts), step_of_rows(step, len(prompts)))
    return found


def _chances(model: Looped, state: mx.array, after: Sequence[Tokens]) -> list[list[float]]:
    """For each state log p of each of the tokens that may follow it.

    Args:
        state: (..., states, hidden).
    """
    targets, found = padded(after), []
    for start in range(0, len(after), CHUNK):
        part = slice(start, start + CHUNK)
        of_part = logits(model, state[..., None, part, :])[0]
        found.append(log_probabilities(of_part, targets[part]))
        mx.eval(found[-1])
    return mx.concatenate(found).tolist()  # type: ignore[return-value]


def log_probabilities(logits: mx.array, tokens: mx.array) -> mx.array:
    """Of logits (..., vocab), for tokens (..., some), in float32."""
    wide = logits.astype(mx.float32)
    chosen = mx.take_along_axis(wide, tokens, axis=-1)
    return chosen - mx.logsumexp(wide, axis=-1, keepdims=True)
