"""Keys and values under a loop, on mlx-lm's own cache classes.

A loop evaluates a layer several times at the same positions. What a layer sees of earlier
positions, and what it leaves for later ones, is the key/value policy (`LoopConfig.cache`): one
small class each. All work on whatever cache object mlx-lm put into the list, hold no reference to
it between calls, and use array operations only, so decoding never waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    create_causal_mask,
)

from .config import LoopConfig
from .errors import UserError

# mlx-lm's own number of leading tokens that its rotating cache keeps.
ROTATING_KEEP = 4


class CacheList(mlx_lm_cache.CacheList):
    """mlx-lm's CacheList, one history per evaluation, that `kv_bits` can quantise.

    Of the same name, because prompt-cache files name classes that mlx-lm looks up by name; what
    is read back from a file is mlx-lm's own.
    """

    @property
    def offset(self) -> int:
        return self.caches[0].offset

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> mlx_lm_cache.CacheList:
        return mlx_lm_cache.CacheList(
            *(c.to_quantized(group_size=group_size, bits=bits) for c in self.caches)
        )


def histories(entry: Any) -> Sequence[Any]:
    """The histories of one layer: one, or under `own` one per evaluation."""
    return entry.caches if isinstance(entry, mlx_lm_cache.CacheList) else (entry,)


def position(entry: Any) -> int:
    """How many tokens the entry has seen: (in a batch) with the padding, the same for all rows."""
    cache = histories(entry)[0]
    if isinstance(cache, BatchKVCache):
        return cache._idx
    return cache._offset if isinstance(cache, BatchRotatingKVCache) else cache.offset


def plain_entries(native: list[Any] | int, max_kv_size: int | None) -> list[Any]:
    """mlx-lm's entries for an un-looped model.

    Args:
        native: what the model's own hook made, or the number of layers where it has none.
        max_kv_size: None, or the size of the rotating caches that take the place of full ones.
    """
    entries = [KVCache() for _ in range(native)] if isinstance(native, int) else native
    if max_kv_size is None:
        return entries
    return [
        RotatingKVCache(max_kv_size, ROTATING_KEEP) if type(entry) is KVCache else entry
        for entry in entries
    ]


def own_entries(entries: list[Any], layers: range, count: int) -> list[Any]:
    """The same empty entries, but `count` histories for each layer of the window."""
    return [
        CacheList(*(copy.copy(entry) for _ in range(count))) if i in layers else entry
        for i, entry in enumerate(entries)
    ]


def check(cache: Sequence[Any], loop: LoopConfig | None, count: int) -> None:
    """Refuse a cache that does not hold `count` histories for each window layer.

    Raises:
        UserError: it was made for other settings.
    """
    layers = loop.layers if loop else ()
    for i, entry in enumerate(cache):
        needed = count if i in layers else 1
        found = len(histories(entry))
        if found != needed:
            raise UserError(
                f"this cache was made for other loop settings: layer {i} has {found} "
                f"{'history' if found == 1 else 'histories'} in it and needs {needed}; make a "
                "new one with mlx_lm's make_prompt_cache(model)"
            )


def rewind(cache: Sequence[Any], to: int) -> None:
    """Cut every history that is longer back to `to` tokens."""
    for entry in cache:
        for history in histories(entry):
            if history.offset > to:
                history.trim(history.offset - to)


def rewinder(cache: Any, length: int) -> Callable[[], None]:
    """Called before `length` tokens are written: how to make the next write replace that one.

    Raises:
        UserError: a cache class that cannot be rewound.
    """
    if isinstance(cache, KVCache | QuantizedKVCache | BatchKVCache):
        return lambda: _trim(cache, length)
    if isinstance(cache, RotatingKVCache | BatchRotatingKVCache):
        # One token is written in place, over the oldest entry when the cache is full; writing it
        # again takes the same slot. Several are appended to a new copy, so the old one is intact.
        return _one_step_back(cache) if length == 1 else _snapshot(cache)
    raise UserError(
        f"looping does not work with a {type(cache).__name__}: it needs one of mlx-lm's KVCache, "
        "QuantizedKVCache, RotatingKVCache or their batched kinds; or use cache='own'"
    )


def _trim(cache: Any, length: int) -> None:
    cache.trim(length)


def _one_step_back(cache: RotatingKVCache | BatchRotatingKVCache) -> Callable[[], None]:
    def rewind() -> None:
        cache.trim(1)
        if isinstance(cache, BatchRotatingKVCache) and cache.rotated:
            cache.left_padding = cache.left_padding + 1

    return rewind


def _snapshot(cache: RotatingKVCache | BatchRotatingKVCache) -> Callable[[], None]:
    # The copy keeps later in-place updates of the small arrays out; the big ones are replaced.
    before = dict(vars(cache))
    for name in ("offset", "left_padding"):
        if isinstance(before.get(name), mx.array):
            before[name] = mx.array(before[name])

    def rewind() -> None:
        vars(cache).update(before)

    return rewind


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


class Uncached:
    """No cache: every pass attends among the tokens of the call."""

    def view(self, evaluation: int) -> None:
        return None

    def close(self) -> None:
        pass


class First:
    """Keeps what the natural pass, evaluation 0, wrote. It needs no extra pass."""

    def __init__(self, entry: Any, length: int):
        self._entry = entry
        self._rewind = rewinder(entry, length)
        self._natural = _Recorder(entry)
        self._overwritten = False

    def view(self, evaluation: int) -> Any:
        """The cache that evaluation number `evaluation` of the layer reads and writes."""
        if evaluation == 0:
            return self._natural
        self._rewind()
        self._overwritten = True
        return self._entry

    def close(self) -> None:
        """Called after the last evaluation."""
        if self._overwritten:
            self._rewind()
            self._entry.update_and_fetch(*self._natural.written)


class Last:
    """Keeps what the last evaluation wrote: a pass from the looped state, made for that."""

    def __init__(self, entry: Any, length: int):
        self._entry = entry
        self._rewind = rewinder(entry, length)

    def view(self, evaluation: int) -> Any:
        if evaluation:
            self._rewind()
        return self._entry

    def close(self) -> None:
        pass


class Own:
    """Evaluation k has history k. A token that did not loop has its natural entry in each."""

    def __init__(self, entry: Any, length: int):
        self._caches = histories(entry)
        self._natural = _Recorder(self._caches[0])
        self._evaluations = 0

    def view(self, evaluation: int) -> Any:
        self._evaluations += 1
        return self._caches[evaluation] if evaluation else self._natural

    def close(self) -> None:
        for cache in self._caches[self._evaluations :]:
            cache.update_and_fetch(*self._natural.written)


class FirstSideBySide:
    """`First` for several tokens in one call, each as if it were fed alone.

    Alone, a later evaluation of a token sees what is kept of the tokens before it, and of itself
    what that evaluation writes. So what is kept stays where it is, a later evaluation writes
    behind it, and the mask `side_by_side` shows every token its own. No copy of the history.
    """

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


_POLICIES: dict[str, type[First] | type[Last] | type[Own]] = {
    "first": First,
    "last": Last,
    "own": Own,
}


def policy(name: str, entry: Any, length: int) -> Uncached | First | Last | Own:
    """The policy `name` for one layer and one call.

    Args:
        entry: the layer's cache entry, or None.
        length: tokens that every evaluation of the call writes.
    """
    return Uncached() if entry is None else _POLICIES[name](entry, length)
