"""Greedy answers to a batch of prompts under several loop settings at once.

What settings share of the prompt, the layers below their windows, is computed once
(`together`). Prompt and answer are fed in the same pieces as by mlx-lm: chunks, the last
prompt token alone, then one token at a time; rows that have ended leave the batch. All rows of a
batch are in the same phase, so every `decode` setting works. Where caches cannot be merged, as
mlx-lm's chunked ones, or recurrent states would take padding in, as those of some model types do,
prompts are answered one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import ArraysCache

from ..method.cache import leaves
from ..models.looped import Looped
from ..models.together import states
from .prefill import PREFILL_STEP, prefill
from .prompt import check_tokens
from .sampling import check_finite


def answer_batch(
    views: Sequence[Looped],
    prompts: Sequence[Sequence[int]],
    ends: set[int],
    max_tokens: int,
    step: int = PREFILL_STEP,
) -> Iterator[tuple[int, list[list[int]], float]]:
    """Answer the prompts under each setting; yields (number of the view, answers, seconds).

    An answer is token ids without the one that ended it. The time of the layers that views share
    counts for the first of them.

    Args:
        views: of one model, as `comparison.distinct` makes them.
        prompts: token ids, at least one each. Shorter ones are padded, as mlx-lm does it.
        ends: tokens that end an answer.
        step: prompt tokens processed at a time, those of all rows together.
    """
    check_tokens(views[0], *prompts)
    uneven = len(set(map(len, prompts))) > 1
    if len(prompts) > 1 and not all(merges(view.new_cache(), uneven) for view in views):
        alone = [list(answer_batch(views, [prompt], ends, max_tokens, step)) for prompt in prompts]
        for parts in zip(*alone, strict=True):
            seconds_of_view = sum(seconds for _, _, seconds in parts)
            yield parts[0][0], [answers[0] for _, answers, _ in parts], seconds_of_view
        return
    lengths = [len(prompt) - 1 for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    tokens = padded([prompt[:-1] for prompt in prompts])
    last = mx.array([prompt[-1:] for prompt in prompts])
    caches: list[list[Any]] = [batched(view, lengths, padding) for view in views]
    with wired_limit(views[0], [generation_stream]), mx.stream(generation_stream):  # type: ignore[list-item]
        seconds = [0.0] * len(views)

        def feed(tokens: mx.array) -> None:
            states(views, tokens, caches)
            for i, cache in enumerate(caches):
                start = time.perf_counter()
                mx.eval([entry.state for entry in cache])
                seconds[i] += time.perf_counter() - start

        prefill(feed, tokens, step_of_rows(step, len(prompts)))
        for i, view in enumerate(views):
            start = time.perf_counter()
            if any(padding):
                for entry in caches[i]:
                    entry.finalize()
            answers = _decode(view, caches[i], last, ends, max_tokens)
            caches[i] = []
            mx.clear_cache()
            yield i, answers, seconds[i] + time.perf_counter() - start


def step_of_rows(step: int, rows: int) -> int:
    """Tokens of each of so many rows that make up a step, hardly ever fewer than 4."""
    return max(step // rows, min(step, 4))


def padded(rows: Sequence[Sequence[int]]) -> mx.array:
    """(rows, length of the longest), int, with zeros on the right."""
    longest = max(map(len, rows))
    return mx.array([[*row, *[0] * (longest - len(row))] for row in rows], mx.int32)


def batched(view: Looped, lengths: Sequence[int], padding: Sequence[int]) -> list[Any]:
    """An empty cache for rows of such lengths with so much padding on the right."""
    rows = [view.new_cache() for _ in padding]
    if not merges(rows[0]):
        (cache,) = rows
        return cache
    batch = [entries[0].merge(list(entries)) for entries in zip(*rows, strict=True)]
    if any(padding):
        for entry in batch:
            entry.prepare(lengths=list(lengths), right_padding=list(padding))
    return batch


def merges(cache: list[Any], uneven: bool = False) -> bool:
    """Whether caches like this empty one can be a batch; uneven: of rows that need padding."""
    entries = [*cache, *leaves(cache)]
    recurrent = any(isinstance(entry, ArraysCache) for entry in entries)
    return all(hasattr(entry, "merge") for entry in entries) and not (uneven and recurrent)


def _decode(
    view: Looped, cache: list[Any], last: mx.array, ends: set[int], max_tokens: int
) -> list[list[int]]:
    """Args: last: (batch, 1), the last token of each prompt."""
    answers: list[list[int]] = [[] for _ in range(last.shape[0])]
    running = list(range(len(answers)))
    phased = view.for_prompt(cache, 1)
    token, totals = _next(phased, last, cache)
    for fed in range(1, max_tokens + 1):
        # One step ahead, so that the device does not wait while the tokens are looked at.
        check, following = totals, token
        if fed < max_tokens:
            following, totals = _next(phased, token, cache)
        keep = []
        tokens: list[int] = token[:, 0].tolist()  # type: ignore[assignment]
        check_finite(view.loop, check)
        for i, (row, said) in enumerate(zip(running, tokens, strict=True)):
            if said not in ends:
                answers[row].append(said)
                keep.append(i)
        if not keep:
            break
        if len(keep) < len(running) and fed < max_tokens:
            for entry in cache:
                entry.filter(keep)
            running = [running[i] for i in keep]
            following = following[mx.array(keep)]
            # Padding that no row needs any more is gone, so positions have moved: the prompt
            # ended `fed` tokens before the end of the cache.
            phased = view.for_prompt(cache, -fed)
        token = following
    return answers


def _next(view: Looped, tokens: mx.array, cache: list[Any]) -> tuple[mx.array, mx.array]:
    """(batch, 1) -> the likeliest next tokens, (batch, 1), and what tells whether logits are."""
    logits = view(tokens, cache=cache)[:, -1:]
    token, total = mx.argmax(logits, axis=-1), mx.logsumexp(logits, axis=-1)
    mx.async_eval(token, total)
    return token, total
