"""Keys and values under a loop, on mlx-lm's own cache classes.

Recurrent state counts as keys and values do. Nothing here waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from ..upstream import ROTATING_KEEP, CacheList, position, restore, snapshot

IN_PLACE = BatchKVCache | ChunkedKVCache | KVCache | QuantizedKVCache
ROTATING = BatchRotatingKVCache | RotatingKVCache


def leaves(cache: Sequence[Any]) -> Iterator[Any]:
    """The caches in a model's list of entries that hold arrays themselves."""
    for entry in cache:
        if isinstance(entry, mlx_lm_cache.CacheList):
            yield from leaves(entry.caches)
        else:
            yield entry


def tokens_seen(cache: Sequence[Any]) -> int | None:
    """How many tokens a model's cache has seen: (in a batch) with the padding, the same for all
    rows. None: it has recurrent state alone, which does not tell.
    """
    return next((p for p in map(position, cache) if p is not None), None)


def limited(entries: list[Any], max_kv_size: int | None) -> list[Any]:
    """Empty entries, those that would grow without end replaced by rotating ones of a size."""
    if max_kv_size is None:
        return entries
    return [
        RotatingKVCache(max_kv_size, ROTATING_KEEP) if type(entry) is KVCache else entry
        for entry in entries
    ]


def repeated(entry: Any, count: int) -> mlx_lm_cache.CacheList:
    """An empty entry as `count` histories, one for each evaluation of a layer."""
    kind = CacheList if hasattr(entry, "to_quantized") else mlx_lm_cache.CacheList
    return kind(*(copy.deepcopy(entry) for _ in range(count)))


class Bookmark:
    """A place in a cache to go back to: a length, and what cannot be cut back to one.

    That is rotating caches and recurrent state, which are small.
    """

    def __init__(self, cache: Sequence[Any]):
        self._places = [
            position(leaf) if isinstance(leaf, IN_PLACE) else snapshot(leaf)
            for leaf in leaves(cache)
        ]

    def go_back(self, cache: Sequence[Any]) -> None:
        """Make `cache` hold what it held here; it has been added to since."""
        for leaf, place in zip(leaves(cache), self._places, strict=True):
            if isinstance(place, dict):
                restore(leaf, place)
            else:
                leaf.trim((position(leaf) or 0) - (place or 0))


def before(entry: Any, to: int) -> Any:
    """What a cache that can be trimmed was when it held `to` tokens; nothing may be written."""
    if isinstance(entry, mlx_lm_cache.CacheList):
        return mlx_lm_cache.CacheList(*(before(member, to) for member in entry.caches))
    view = copy.copy(entry)
    view.offset = to
    return view


def rewind(cache: Sequence[Any], to: int) -> None:
    """Cut every history that is longer back to `to` tokens; all can be trimmed."""
    for leaf in leaves(cache):
        if leaf.offset > to:
            leaf.trim(leaf.offset - to)
