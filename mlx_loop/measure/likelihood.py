"""Log-likelihoods of continuations under several loop settings at once.

Tokens are fed as by mlx-lm's adapter to lm-evaluation-harness: the prompt in pieces, its last token
among them, then a continuation in one piece, all but its last token. Under `first` the later passes
of a continuation therefore see what the prompt's natural pass left, and each other; they do not see
the prompt's later passes, as they would if prompt and continuation were fed in one.

A prompt is fed once for all of its continuations, and the layers below the windows are computed
once for all settings (`together`). Padding is on the right, where causal attention does not look.
Prompts and continuations are fed one by one where a cache cannot be merged or takes padding in, and
where `decode` splits a continuation: mlx-lm's rotating caches of a batch do not take several tokens
after a single one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import mlx.core as mx

from ..generation.batch import batched, merges
from ..generation.prefill import PREFILL_STEP
from ..models.looped import Looped
from ..models.together import logits, states

# States of which logits are made at a time, which bounds the memory.
CHUNK = 64
Tokens = Sequence[int]


def log_likelihoods(
    views: Sequence[Looped],
    prompts: Sequence[Tokens],
    endings: Sequence[Sequence[Tokens]],
    step: int = PREFILL_STEP,
) -> list[list[list[float]]]:
    """log p(continuation | prompt) in nats, of each view, prompt and continuation of it.

    Args:
        views: of one model. A continuation counts as generated where `decode` is not `full`.
        prompts: token ids, at least one each.
        endings: the continuations of each prompt: token ids, at least one each.
        step: prompt tokens that are fed at a time.
    """
    alone = not all(merges(view.new_cache(), uneven=True) and not _splits(view) for view in views)
    if alone and len(prompts) > 1:
        each = [
            log_likelihoods(views, [prompt], [of], step)
            for prompt, of in zip(prompts, endings, strict=True)
        ]
        return [list(chain.from_iterable(of)) for of in zip(*each, strict=True)]

    lengths = [len(prompt) for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    caches = [view.new_cache() if alone else batched(view, lengths, padding) for view in views]
    first = _feed_prompts(views, prompts, caches, step)
    # What is known of a state: that these tokens follow it.
    after: list[Tokens] = [[ending[0] for ending in of] for of in endings]
    found = [[state] for state in first]
    for cache in caches if any(padding) else ():
        for entry in cache:
            entry.finalize()
    longer = [(i, end) for i, of in enumerate(endings) for end in of if len(end) > 1]
    if longer and not alone:
        for cache in caches:
            for entry in cache:
                entry.filter([i for i, _ in longer])
    for group in [[one] for one in longer] if alone else [longer] if longer else []:
        rows = [ending[:-1] for _, ending in group]
        of_views = _continue(views, rows, copy.deepcopy(caches) if alone else caches)
        at = [(i, j) for i, row in enumerate(rows) for j in range(len(row))]
        row, column = map(mx.array, zip(*at, strict=True))
        for states_of, state in zip(found, of_views, strict=True):
            states_of.append(state[..., row, column, :])
        after += [[token] for _, ending in group for token in ending[1:]]
    results = []
    for states_of in found:
        chances = _log_probabilities(views[0], mx.concatenate(states_of, axis=-2), after)
        rest = iter(chances[len(prompts) :])
        results.append(
            [
                [chance + sum(next(rest)[0] for _ in end[1:]) for chance, end in pairs]
                for pairs in map(zip, chances, endings)
            ]
        )
    return results


def _feed_prompts(
    views: Sequence[Looped], prompts: Sequence[Tokens], caches: list[list[Any]], step: int
) -> list[mx.array]:
    """The state of each prompt's last token under each view, (..., prompts, hidden)."""
    tokens, last = padded(prompts), mx.array([len(prompt) - 1 for prompt in prompts])
    found: list[mx.array] = []
    for start in range(0, tokens.shape[1], step):
        piece = tokens[:, start : start + step]
        # Prompts that end in an earlier piece keep their state, the others' is replaced later.
        place = mx.clip(last - start, 0, piece.shape[1] - 1)
        ends = (last >= start)[:, None]
        of_piece = [
            state[..., mx.arange(len(prompts)), place, :] for state in states(views, piece, caches)
        ]
        found = [mx.where(ends, x, y) for x, y in zip(of_piece, found or of_piece, strict=True)]
        mx.eval(found, [entry.state for cache in caches for entry in cache])
    return found


def _continue(
    views: Sequence[Looped], rows: Sequence[Tokens], caches: list[list[Any]]
) -> list[mx.array]:
    """The states of tokens that follow prompts, (..., rows, length, hidden) under each view."""
    tokens = padded(rows)
    found: dict[int, mx.array] = {}
    counts = [_count_looped(view, tokens.shape[1]) for view in views]
    for count in set(counts):
        group = [i for i, n in enumerate(counts) if n == count]
        parts = [
            states([views[i] for i in group], tokens[:, part], [caches[i] for i in group], loops)
            for part, loops in ((slice(count), True), (slice(count, None), False))
            if tokens[:, part].size
        ]
        found |= {
            i: mx.concatenate(list(of), axis=-2)
            for i, of in zip(group, zip(*parts, strict=True), strict=True)
        }
    return [found[i] for i in range(len(views))]


def _splits(view: Looped) -> bool:
    """Whether a part of a continuation loops, and the rest does not."""
    return view.loop is not None and view.loop.decode not in ("full", "bypass")


def _count_looped(view: Looped, length: int) -> int:
    """How many of `length` generated tokens loop; they are the first ones."""
    decode = "full" if view.loop is None else view.loop.decode
    if decode == "full":
        return length
    return 0 if decode == "bypass" else min(int(decode), length)


def padded(rows: Sequence[Tokens]) -> mx.array:
    """(rows, length of the longest), int, with zeros on the right."""
    longest = max(map(len, rows))
    return mx.array([[*row, *[0] * (longest - len(row))] for row in rows], mx.int32)


def _log_probabilities(
    model: Looped, state: mx.array, after: Sequence[Tokens]
) -> list[list[float]]:
    """For each state log p of each of the tokens that may follow it.

    Args:
        state: (..., states, hidden).
    """
    targets, found = padded(after), []
    for start in range(0, len(after), CHUNK):
        part = slice(start, start + CHUNK)
        wide = logits(model, state[..., None, part, :])[0].astype(mx.float32)
        chosen = mx.take_along_axis(wide, targets[part], axis=-1)
        found.append(chosen - mx.logsumexp(wide, axis=-1, keepdims=True))
        mx.eval(found[-1])
    return mx.concatenate(found).tolist()  # type: ignore[return-value]
