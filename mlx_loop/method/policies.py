"""Key/value policies: what an evaluation sees of earlier tokens, and what it leaves for later ones.

A loop evaluates a layer several times at the same positions. `LoopConfig.cache` names the policy,
one small class each. All work on whatever cache object mlx-lm put into the list, hold no reference
to it between calls, and use array operations only, so decoding never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ChunkedKVCache, create_causal_mask

from ..upstream import handles, one_step_back, restore, snapshot
from .cache import IN_PLACE, ROTATING


class Policy:
    """One policy, for one cache in one loop.

    Attributes:
        per_pass: whether each evaluation has a history of its own.
        extra_pass: whether a pass from the looped state follows, for what it writes.
        restores: whether it keeps what the natural pass wrote, to write it again.
        side_by_side: what does its work for several tokens that are fed as if each were alone;
            None: it does so itself.
        no_drafts: why drafts cannot be checked under it; None: they can.
        histories: how many there are.
    """

    per_pass: ClassVar[bool] = False
    extra_pass: ClassVar[bool] = False
    restores: ClassVar[bool] = False
    side_by_side: ClassVar[type[Policy] | None] = None
    no_drafts: ClassVar[str | None] = None
    histories = 1

    def __init__(self, entry: Any, length: int):
        """Args: entry: what a layer gets as its cache. length: tokens about to be written."""
        self._entry, self._length = entry, length

    def view(self, evaluation: int) -> Any:
        """What evaluation number `evaluation` of the layers gets as its cache."""
        raise NotImplementedError

    def close(self) -> None:
        """Called after the last evaluation."""


class FirstSideBySide(Policy):
    """`First` for several tokens in one call, each as if it were fed alone.

    Alone, a later evaluation of a token sees what is kept of the tokens before it, and of itself
    what that evaluation writes. So what is kept stays where it is, a later evaluation writes
    behind it, and the mask `side_by_side` shows every token its own. No copy of the history.
    """

    def view(self, evaluation: int) -> Any:
        return _Behind(self._entry, self._length) if evaluation else self._entry


class First(Policy):
    """Keeps what the natural pass, evaluation 0, wrote. It needs no extra pass."""

    restores = True
    side_by_side: ClassVar[type[Policy] | None] = FirstSideBySide

    def __init__(self, entry: Any, length: int):
        super().__init__(entry, length)
        self._written = _written(entry, length)
        self._evaluation = 0

    def view(self, evaluation: int) -> Any:
        if evaluation == 0:
            return self._written.recorder
        if evaluation != self._evaluation:
            self._written.take_back()
            self._evaluation = evaluation
        return self._entry

    def close(self) -> None:
        if self._evaluation:
            self._written.take_back()
            self._written.write_natural()


class Last(First):
    """Keeps what the last evaluation wrote: a pass from the looped state, made for that."""

    extra_pass = True
    restores = False
    side_by_side = None
    no_drafts = "what a token sees of an earlier one is known only after that one has looped"

    def close(self) -> None:
        pass


class Own(Policy):
    """Evaluation k has history k."""

    per_pass = True

    def __init__(self, entry: Any, length: int, histories: Sequence[Any]):
        super().__init__(entry, length)
        self._histories, self.histories = histories, len(histories)

    def view(self, evaluation: int) -> Any:
        history = self._histories[evaluation]
        if evaluation and isinstance(history, ChunkedKVCache):
            # As the model itself does before its layers, for the first history.
            history.maybe_trim_front()
        return history


POLICIES: dict[str, type[Policy]] = {"first": First, "last": Last, "own": Own}


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
        # Layers that use the keys of this one get them after other passes have written.
        return handles(self._cache.update_and_fetch(keys, values))

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


class _Behind:
    """A cache at the position before its last `length` tokens, which stay; writes do not."""

    def __init__(self, cache: Any, length: int):
        self._cache, self._length = cache, length

    @property
    def offset(self) -> int:
        return int(self._cache.offset) - self._length

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
