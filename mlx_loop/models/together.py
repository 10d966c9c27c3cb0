"""Several loop settings in one go: what lies below their windows is computed once.

Below its window a looped model is the plain one. The view whose window comes last walks first, and
in the others' walks the layers below their windows answer with what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..method.anatomy import stream
from ..method.cache import leaves
from ..upstream import restore, snapshot
from . import histories
from .looped import Looped

# Tokens whose logits are computed at a time, where Ctrl-C is to be heard in between.
FEW = 16


def states(
    views: Sequence[Looped], tokens: mx.array, caches: Sequence[list[Any]] | None = None
) -> list[mx.array]:
    """The residual stream after all layers under each view, of tokens as those of a prompt pass.

    Args:
        views: of one model.
        tokens: (batch, length), int.
        caches: one for each view, of equal content below the windows; None: none, and the tokens
            loop under `prompt="plain"` too.

    Returns:
        (batch, length, hidden) for each view; `logits` makes logits of them.
    """
    starts = [_start(view, caches is not None) for view in views]
    order = sorted(range(len(views)), key=starts.__getitem__, reverse=True)
    first = order[0]
    theirs = histories.faces(views[first], None if caches is None else caches[first]) or []
    found: dict[int, mx.array] = {}
    known: dict[int, Any] = {}
    for number in order:
        view = views[number]
        results: dict[int, Any] = {}
        walk = view.walk()
        cache = None if caches is None else caches[number]
        loops = starts[number] < len(view.layers)
        if loops or histories.per_layer(view) > 1:
            view.run(cache).put_into(walk, loops)
        if number == first:
            walk.keep(range(max((starts[i] for i in order[1:]), default=0)), known)
        else:
            for i in range(starts[number]):
                entries = view.anatomy.layers[i].entries if cache is not None else ()
                pairs = [
                    (mine, theirs[e])
                    for e in entries
                    for mine in histories.of_entry(view, cache or [], e)
                ]
                walk.put(i, _from_memory(known[i], pairs))
        last = len(view.layers) - 1
        walk.keep([last], results)
        # What comes after may write into the state.
        walk.end_after(last)
        walk.run(tokens, histories.faces(view, cache))
        found[number] = stream(results[last])
    return [found[i] for i in range(len(views))]


def _from_memory(result: Any, entries: Sequence[tuple[Any, Any]]) -> Callable[..., Any]:
    """A stand-in that answers, and makes its cache entries what another view's have become.

    Not earlier: masks depend on how much a cache holds.

    Args:
        entries: pairs of its own entry and the other view's.
    """

    def answer(*args: Any, **kwargs: Any) -> Any:
        for mine, theirs in entries:
            for to, of in zip(leaves([mine]), leaves([theirs]), strict=True):
                restore(to, snapshot(of))
        return result

    return answer


def _start(view: Looped, is_prompt: bool) -> int:
    """How many layers come before a view's window; all, where nothing loops."""
    loop = None if view.is_unlooped else view.loop
    if loop is None or (is_prompt and loop.prompt == "plain"):
        return len(view.layers)
    return loop.layers[0]


def logits(model: Looped, state: mx.array) -> mx.array:
    """What mlx-lm makes of a state after all layers: last norm and head.

    Args:
        state: (batch, length, hidden).

    Returns:
        (batch, length, vocab).
    """
    walk = model.walk()
    for i, layer in enumerate(model.anatomy.layers):
        walk.answer(i, state if layer.results == 1 else (state, *[None] * (layer.results - 1)))
    return walk.run(mx.zeros(state.shape[-3:-1], mx.int32), None)
