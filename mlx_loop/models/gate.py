"""The gate: a token loops only where the un-looped model is not sure what comes next.

A token's plain pass gives its un-looped prediction. Where the entropy of that is below the limit,
it is the answer, and what the pass wrote is kept. Else the token loops: from the natural pass that
was made, if the cache can be cut back (`halves`), or from the start. The host has to know which,
so every token waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ..method.cache import Bookmark, leaves
from ..method.policies import POLICIES
from ..upstream import restore, snapshot
from . import halves

if TYPE_CHECKING:
    from .looped import Looped


class Share:
    """How many of the answer's tokens looped, of how many."""

    def __init__(self) -> None:
        self.looped, self.tokens = 0, 0

    def take(self) -> tuple[int, int]:
        """(looped, all), since the last call."""
        found = self.looped, self.tokens
        self.looped, self.tokens = 0, 0
        return found


def entropy(logits: mx.array) -> mx.array:
    """Of predictions, in nats: (..., vocab) -> (...), float32."""
    logprobs = nn.log_softmax(logits.astype(mx.float32))
    chances = mx.exp(logprobs)
    return -mx.sum(mx.where(chances > 0, chances * logprobs, 0), axis=-1)


def gated(
    model: Looped,
    tokens: mx.array | None,
    cache: list[Any],
    run: Callable[[bool], mx.array],
    share: Share,
) -> mx.array:
    """Logits (batch, 1, vocab) of one token of each row.

    Args:
        tokens: (batch, 1), int; None: there are embeddings only.
        run: whether it loops -> logits; it writes to `cache`.
        share: is told how many rows looped.
    """
    assert model.loop is not None
    limit = model.loop.gate_nats
    if _reuses(model, tokens, cache):
        assert tokens is not None
        plain, natural = halves.plain(model, tokens, cache)
        is_sure = bool(entropy(plain[:, -1]) < limit)
        share.tokens += 1
        share.looped += not is_sure
        return plain if is_sure else halves.looped(model, tokens, cache, natural)
    bookmark = Bookmark(cache)
    plain = run(False)
    sure = entropy(plain[:, -1]) < limit
    count, rows = int(mx.sum(sure)), sure.size
    share.tokens += rows
    share.looped += rows - count
    if count == rows:
        return plain
    kept = [snapshot(leaf) for leaf in leaves(cache)]
    bookmark.go_back(cache)
    looped = run(True)
    if not count:
        return looped
    for leaf, state in zip(leaves(cache), kept, strict=True):
        both = snapshot(leaf)
        restore(leaf, {name: _rows(sure, state.get(name), value) for name, value in both.items()})
    return _rows(sure, plain, looped)


def _reuses(model: Looped, tokens: mx.array | None, cache: list[Any]) -> bool:
    assert model.loop is not None
    if tokens is None or tokens.shape[0] > 1 or not POLICIES[model.loop.cache].side_by_side:
        return False
    return halves.obstacle(model, cache) is None


def _rows(sure: mx.array, plain: Any, looped: Any) -> Any:
    """Of arrays with the batch in front, the rows of `plain` that are sure, else of `looped`."""
    if isinstance(looped, list | tuple):
        return type(looped)(_rows(sure, p, x) for p, x in zip(plain, looped, strict=True))
    # Numbers of rows alone, as positions, are those of any pass.
    if not isinstance(looped, mx.array) or looped.ndim < 2:
        return looped
    return mx.where(sure.reshape(-1, *[1] * (looped.ndim - 1)), plain, looped)
