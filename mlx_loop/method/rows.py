"""A batch whose rows loop under settings of their own, in one forward pass.

The natural pass of a layer is one for all rows. Where a window ends, the loops of its rows go on
in step: what they want evaluated next is one pass over the rows that still loop. So a layer is
read as often as the longest loop asks for it, not once for each setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from ..settings import ResolvedLoop
from ..upstream import rows_before
from .anatomy import Anatomy, Arguments, apply, bind
from .guard import guarded_steps
from .integrate import Between, steps
from .loop import one_pass, parts
from .routing import Frozen
from .walk import Walk


def can_share(anatomy: Anatomy, cache: Sequence[Any], loop: ResolvedLoop | None) -> bool:
    """Whether rows with these settings can stand in a batch with rows of others.

    Args:
        cache: an empty one of the model's.
        loop: None: those rows do not loop.
    """
    if loop is None:
        return True
    users = [entry for layer in anatomy.layers for entry in layer.entries]
    return loop.cache == "first" and all(
        layer.is_plain
        and len(layer.entries) == 1
        and users.count(layer.entries[0]) == 1
        and isinstance(cache[layer.entries[0]], KVCache)
        for layer in (anatomy.layers[i] for i in loop.layers)
    )


def put_into(walk: Walk, model: Any, settings: Sequence[ResolvedLoop | None]) -> None:
    """Stand in for the layers of all windows.

    Args:
        model: its layers and their anatomy are used.
        settings: of each row, for which `can_share` holds; None: it does not loop.
    """
    rows: dict[ResolvedLoop, list[int]] = {}
    for row, loop in enumerate(settings):
        if loop is not None:
            rows.setdefault(loop, []).append(row)
    windows: dict[tuple[range, str], _Window] = {}
    for loop in rows:
        for part in parts(loop):
            known = windows.setdefault((part, loop.routing), _Window(model, part, loop.routing))
            known.rows[loop] = rows[loop]
    for i in sorted({i for window in windows.values() for i in window.part}):
        walk.put(i, partial(_stand_in, [w for w in windows.values() if i in w.part], i, model))


def _stand_in(windows: Sequence[_Window], i: int, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Called in layer i's place: the natural pass of all rows, and the loops that end here."""
    arguments, layer, frozen = bind(args, kwargs), model.layers[i], None
    where = model.anatomy.layers[i]
    if where.routers and any(window.routing == "frozen" for window in windows):
        frozen = Frozen(layer, where)
        layer = frozen.natural
    natural = apply(layer, arguments)
    out = natural
    for window in windows:
        window.saw(i, arguments, natural, frozen)
        if i == window.part[-1]:
            out = window.loop(out)
    return out


class _Window:
    """The rows whose loops iterate the same layers with the same kind of routing.

    Attributes:
        rows: their numbers in the batch, by settings.
    """

    def __init__(self, model: Any, part: range, routing: str):
        self.part, self.routing = part, routing
        self.rows: dict[ResolvedLoop, list[int]] = {}
        self._where = [model.anatomy.layers[i] for i in part]
        self._layers = [model.layers[i] for i in part]
        self._calls: list[Arguments] = []
        self._natural: list[mx.array] = []
        self._frozen: dict[int, Frozen] = {}

    def saw(self, i: int, arguments: Arguments, natural: mx.array, frozen: Frozen | None) -> None:
        """Keep what layer i was called with, and what it made of that."""
        self._calls.append(arguments)
        self._natural.append(natural)
        if frozen is not None and self.routing == "frozen":
            self._frozen[i] = frozen

    def loop(self, state: mx.array) -> mx.array:
        """`state`, (batch, length, hidden), with the rows that loop here as they leave it."""
        x0 = self._calls[0][self._where[0].state]
        loops = [_Loop(loop, mx.array(rows), x0) for loop, rows in self.rows.items()]
        for each in loops:
            each.go_on(each.passed([natural[each.rows] for natural in self._natural]))
        running, layers, calls = loops, self._layers, self._calls
        while now := [each for each in running if each.out is None]:
            if calls is self._calls or len(now) < len(running):
                layers, calls = self._of(mx.concatenate([each.rows for each in now]))
            running = now
            for each, gx in zip(now, self._evaluate(now, layers, calls), strict=True):
                each.go_on(gx)
            for cache in _caches(calls):
                cache.trim(x0.shape[-2])
        outs = mx.concatenate([each.out for each in loops if each.out is not None])
        rows = mx.concatenate([each.rows for each in loops])
        places = mx.broadcast_to(rows[:, None, None], outs.shape)
        return mx.put_along_axis(state, places, outs, axis=0)

    def _evaluate(
        self, loops: Sequence[_Loop], layers: Sequence[Any], calls: Sequence[Arguments]
    ) -> list[mx.array]:
        """g of what each loop wants."""
        sizes = [each.rows.size for each in loops]
        ends = [sum(sizes[: n + 1]) for n in range(len(sizes) - 1)]

        def between(n: int, h: mx.array) -> mx.array:
            own = zip(loops, mx.split(h, ends), strict=True)
            return mx.concatenate([e.between(n, part) if e.between else part for e, part in own])

        x = mx.concatenate([each.x for each in loops])
        some = between if any(each.between for each in loops) else None
        results = one_pass(self.part, layers, self._where, calls, x, some)
        found: list[mx.array] = mx.split(results[-1], ends)  # type: ignore[assignment]
        return found

    def _of(self, rows: mx.array) -> tuple[list[Any], list[Arguments]]:
        """Layers and what to call them with for some rows, after the natural pass.

        What a pass then writes goes into copies of these rows' keys and values.
        """
        layers = [
            self._frozen[i].later(rows) if i in self._frozen else layer
            for i, layer in zip(self.part, self._layers, strict=True)
        ]
        calls = []
        for arguments, where in zip(self._calls, self._where, strict=True):
            length = arguments[where.state].shape[-2]
            own: Arguments = {
                name: rows_before(value, rows, length)
                for name, value in arguments.items()
                if isinstance(value, BatchKVCache)
            }
            mask = None if where.mask is None else arguments[where.mask]
            if where.mask is not None and isinstance(mask, mx.array) and mask.ndim == 4:
                # A mask of one row is that of all.
                own[where.mask] = mask[rows] if mask.shape[0] > 1 else mask
            calls.append(arguments | own)
        return layers, calls


class _Loop:
    """A loop of some rows: what it wants evaluated next, or the state that leaves it."""

    def __init__(self, loop: ResolvedLoop, rows: mx.array, x0: mx.array):
        self.rows, self._loop = rows, loop
        self.out: mx.array | None = None
        own, guard = x0[rows], loop.guard
        self._steps = steps(own, loop) if guard is None else guarded_steps(own, loop, guard)
        self.x: mx.array
        self.between: Between | None
        self.x, self.between = next(self._steps)

    def passed(self, results: Sequence[mx.array]) -> mx.array:
        """g(x) of what the layers made of x."""
        if self.between is not None:
            for n, result in enumerate(results):
                self.between(n, result)
        return results[-1]

    def go_on(self, gx: mx.array) -> None:
        """Take g(x)."""
        try:
            self.x, self.between = self._steps.send(gx)
        except StopIteration as end:
            self.out = end.value if self._loop.guard is None else end.value[0]


def _caches(calls: Sequence[Arguments]) -> list[BatchKVCache]:
    return [v for arguments in calls for v in arguments.values() if isinstance(v, BatchKVCache)]
