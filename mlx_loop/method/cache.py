"""Keys and values under a loop, on mlx-lm's own cache classes.

A loop evaluates a layer several times at the same positions. What a layer sees of earlier
positions, and what it leaves for later ones, is the key/value policy (`LoopConfig.cache`): one
small class each. Recurrent state counts as keys and values do. All work on whatever cache object
mlx-lm put into the list, hold no reference to it between calls, and use array operations only, so
decoding never waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    create_causal_mask,
)

from ..upstream import ROTATING_KEEP, CacheList, one_step_back, position, restore, snapshot

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


# --- One cache during one loop: what is written can be taken back, and written again ---


class _InPlace:
    """A cache that is written in place: cut back it is as before, without a copy of it."""

    def __init__(self, cache: Any, length: int):
        self._cache, self._length = cache, length
        self.recorder = _Recorder(cache)

    def take_back(self) -> None:
        """Undo the last write, if any: a layer may read a cache that another one writes."""
        if not self.recorder.written:
            return
        if isinstance(self._cache, ROTATING):
            one_step_back(self._cache)
        else:
            self._cache.trim(self._length)

    def write_natural(self) -> None:
        if self.recorder.written:
            self._cache.update_and_fetch(*self.recorder.written)


class _Recorder:
    """Passes everything on to a cache and remembers the keys and values that are written."""

    def __init__(self, cache: Any):
        self._cache = cache
        self.written: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.written = (keys, values)
        return self._cache.update_and_fetch(keys, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Replaced:
    """A cache whose arrays are replaced by a write: before and after are two sets of references."""

    def __init__(self, cache: Any):
        self.recorder = cache
        self._before = snapshot(cache)
        self._natural: dict[str, Any] = {}

    def take_back(self) -> None:
        if not self._natural:
            self._natural = snapshot(self.recorder)
        restore(self.recorder, self._before)

    def write_natural(self) -> None:
        restore(self.recorder, self._natural)


class _Members:
    """A list of caches as one."""

    def __init__(self, members: list[Any]):
        self._members = members
        self.recorder = tuple(member.recorder for member in members)

    def take_back(self) -> None:
        for member in self._members:
            member.take_back()

    def write_natural(self) -> None:
        for member in self._members:
            member.write_natural()


def _written(cache: Any, length: int) -> _InPlace | _Replaced | _Members:
    """A cache to which `length` tokens are about to be written, more than once."""
    if isinstance(cache, mlx_lm_cache.CacheList):
        return _Members([_written(member, length) for member in cache.caches])
    # Several tokens are appended to a new copy of a rotating cache, a single one is not.
    if isinstance(cache, IN_PLACE) or (isinstance(cache, ROTATING) and length == 1):
        return _InPlace(cache, length)
    return _Replaced(cache)


# --- The policies ---


class First:
    """Keeps what the natural pass, evaluation 0, wrote. It needs no extra pass."""

    histories = 1

    def __init__(self, entry: Any, length: int):
        self._entry = entry
        self._written = _written(entry, length)
        self._evaluation = 0

    def view(self, evaluation: int) -> Any:
        """What evaluation number `evaluation` of the layers gets as its cache."""
        if evaluation == 0:
            return self._written.recorder
        if evaluation != self._evaluation:
            self._written.take_back()
            self._evaluation = evaluation
        return self._entry

    def close(self) -> None:
        """Called after the last evaluation."""
        if self._evaluation:
            self._written.take_back()
            self._written.write_natural()


class Last(First):
    """Keeps what the last evaluation wrote: a pass from the looped state, made for that."""

    def close(self) -> None:
        pass


class Own:
    """Evaluation k has history k."""

    def __init__(self, histories: Sequence[Any]):
        self._histories, self.histories = histories, len(histories)

    def view(self, evaluation: int) -> Any:
        history = self._histories[evaluation]
        if evaluation and isinstance(history, ChunkedKVCache):
            # As the model itself does before its layers, for the first history.
            history.maybe_trim_front()
        return history

    def close(self) -> None:
        pass


class FirstSideBySide:
    """`First` for several tokens in one call, each as if it were fed alone.

    Alone, a later evaluation of a token sees what is kept of the tokens before it, and of itself
    what that evaluation writes. So what is kept stays where it is, a later evaluation writes
    behind it, and the mask `side_by_side` shows every token its own. No copy of the history.
    """

    histories = 1

    def __init__(self, entry: Any, length: int):
        self._entry, self._length = entry, length

    def view(self, evaluation: int) -> Any:
        return _Behind(self._entry, self._length) if evaluation else self._entry

    def close(self) -> None:
        pass


class _Behind:
    """A cache at the position before its last `length` tokens, which stay; writes do not."""

    def __init__(self, cache: Any, length: int):
        self._cache, self._length = cache, length

    @property
    def offset(self) -> int:
        return self._cache.offset - self._length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        seen = self._cache.update_and_fetch(keys, values)
        self._cache.trim(self._length)
        return seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def side_by_side(mask: Any, past: int, length: int) -> mx.array:
    """What later evaluations see under `FirstSideBySide`, (length, past + 2 length), bool.

    Args:
        mask: what the natural evaluation sees, of shape (length, past + length); not an array:
            every earlier token.
    """
    if not isinstance(mask, mx.array):
        mask = create_causal_mask(length, past)
    itself = mx.eye(length, dtype=mx.bool_)
    earlier = mask & ~mx.pad(itself, [(0, 0), (past, 0)])
    return mx.concatenate([earlier, itself], axis=-1)
