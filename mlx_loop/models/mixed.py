"""Batches whose rows loop under settings of their own.

The settings stand in the cache, as one entry more than the model has, so that they go wherever a
row goes: mlx-lm merges, extends, filters and splits the caches of a batch entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..method.rows import can_share, put_into
from ..settings import ResolvedLoop
from .looped import Looped


class Settings:
    """The cache entry that says how each row loops.

    Attributes:
        rows: of each its settings; None: it does not loop.
    """

    nbytes = 0
    state: tuple[()] = ()

    def __init__(self, rows: Sequence[ResolvedLoop | None]):
        self.rows = list(rows)

    @classmethod
    def merge(cls, entries: Sequence[Settings]) -> Settings:
        return cls([row for entry in entries for row in entry.rows])

    def extend(self, other: Settings) -> None:
        self.rows += other.rows

    def filter(self, indices: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in indices]

    def extract(self, i: int) -> Settings:
        return Settings([self.rows[i]])

    def is_trimmable(self) -> bool:
        return True

    def trim(self, tokens: int) -> int:
        return tokens

    def prepare(self, **kwargs: Any) -> None:
        """Padding is nothing to them."""

    def finalize(self) -> None:
        """As `prepare`."""


class Mixed:
    """A model for mlx-lm's batches, of rows whose settings are in their caches.

    Attributes:
        loop: the settings of the next cache that is made.

    Args:
        model: of whatever settings.
    """

    loop: ResolvedLoop | None = None

    def __init__(self, model: Looped):
        self._model = model
        # A view checks its settings, which is not to be done for every token.
        self._view = lru_cache(maxsize=64)(model.with_loop)
        self.layers = model.layers

    @staticmethod
    def takes(view: Looped) -> bool:
        """Whether rows with a view's settings can stand in such a batch."""
        if view.tells_tokens_apart or view.stages is not None:
            return False
        return can_share(view.anatomy, view.new_cache(), view.here)

    def make_cache(self) -> list[Any]:
        """An empty cache of one row."""
        return [*self._view(None).new_cache(), Settings([self.loop])]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Tokens (batch, length), int -> logits (batch, length, vocab), model dtype."""
        *entries, settings = cache
        first, *others = set(settings.rows)
        if not others:
            return self._view(first)(tokens, cache=entries)
        walk = self._model.walk()
        put_into(walk, self._model, settings.rows)
        return walk.run(tokens, entries)
