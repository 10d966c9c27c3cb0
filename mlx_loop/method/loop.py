"""The looped stack: some layers of a forward pass, iterated.

Which states a loop forms is the integrators' business; this file knows which layers a pass runs,
what they are called with, what they see of the past and what they leave for later tokens. The
first pass over a window, the natural one, is mlx-lm's own: stand-ins in the places of its layers
call them and keep their arguments. The last stand-in has what it needs for the further passes and
gives the looped state on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from ..settings import ResolvedLoop
from ..upstream import BaseCache
from .anatomy import Arguments, Layer, apply, bind, stream, with_stream
from .guard import Count, integrate_guarded
from .integrate import Between, integrate
from .plan import is_natural, passes
from .policies import POLICIES, Policy, side_by_side
from .routing import Frozen
from .walk import Walk

Observer = Callable[[Sequence[int], Sequence[tuple[mx.array, mx.array]], mx.array], None]
"""Told of each loop: its layers, every evaluation (x, g(x)), and the state that leaves it."""


def parts(loop: ResolvedLoop) -> list[range]:
    """The layers that are iterated as one: each whole window, or in layer scope one at a time."""
    if loop.scope == "block":
        return list(loop.windows)
    return [range(i, i + 1) for i in loop.layers]


def layer_passes(loop: ResolvedLoop | None, num_layers: int) -> int:
    """Layer evaluations for one looped token; a pass for keys and values alone counts as none.

    The cost of a loop on a device where reading weights is what takes time:
    `layer_passes(loop, n) / n` is the time per token relative to the plain model's layers. With a
    gate it is the most that a token takes, whose plain pass is made before.
    """
    if loop is None or is_natural(loop):
        return num_layers
    extra = len(loop.layers) * (passes(loop) - 1)
    if POLICIES[loop.cache].extra_pass and loop.scope == "block":
        extra += sum(len(window) - 1 for window in loop.windows)
    if loop.gate is not None:
        extra += num_layers
    return num_layers + extra


@dataclass
class Natural:
    """What natural passes over some tokens left, by layer.

    Args:
        results: what a layer returned.
        frozen: layers with frozen routing, which know the experts that were chosen.
    """

    results: dict[int, Any] = field(default_factory=dict)
    frozen: dict[int, Frozen] = field(default_factory=dict)

    @classmethod
    def join(cls, those: Sequence[Natural]) -> Natural:
        """One for the tokens of all, which follow each other in one sequence."""
        first = those[0]
        return cls(
            {i: mx.concatenate([n.results[i] for n in those], axis=-2) for i in first.results},
            {i: Frozen.join([n.frozen[i] for n in those]) for i in first.frozen},
        )


@dataclass(frozen=True)
class Run:
    """A window that loops in one forward pass.

    Args:
        model: its layers and their anatomy are used.
        loop: complete settings.
        policy: (cache as a layer gets it, number of tokens) -> its key/value policy.
        natural: of the layers that are iterated first, where their natural pass has been made.
        past: the number of tokens before these, where later evaluations are to see each of them
            as if it had been fed alone; None: they see each other.
        firings: counts what the guard does; None: nobody does.
        observer: watches; None: nobody does.
        in_turn: whether each layer of each pass is computed before the next is called.
    """

    model: Any
    loop: ResolvedLoop
    policy: Callable[[Any, int], Policy]
    natural: Natural | None = None
    past: int | None = None
    firings: Count | None = None
    observer: Observer | None = None
    in_turn: bool = False

    def put_into(self, walk: Walk, loops: bool = True) -> None:
        """Stand in for the window's layers.

        Args:
            loops: False: tokens pass once, and what they write goes into every history.
        """
        for part in parts(self.loop):
            is_first = part.start == self.loop.layers[0]
            window = _Window(self, part, self.natural if is_first else None)
            for i in part:
                walk.put(i, partial(window.stand_in, i, loops))


class _Window:
    """g: one pass over the layers `part`, which are iterated as one."""

    def __init__(self, run: Run, part: range, natural: Natural | None):
        self._run, self._part, self._natural = run, part, natural
        self._where = [run.model.anatomy.layers[i] for i in part]
        self._layers = [run.model.layers[i] for i in part]
        self._frozen: dict[int, Frozen] = {}
        if natural is not None:
            self._frozen = natural.frozen
        elif run.loop.routing == "frozen":
            self._frozen = {
                i: Frozen(layer, where)
                for i, layer, where in zip(part, self._layers, self._where, strict=True)
                if where.routers
            }
        self._calls: list[Arguments] = []
        self._results: list[Any] = []
        self._policies: dict[int, Policy] = {}
        self._evaluation = 0

    def stand_in(self, i: int, loops: bool, *args: Any, **kwargs: Any) -> Any:
        """Called in layer i's place: its natural pass, and after the last layer's the rest."""
        arguments = bind(args, kwargs)
        self._calls.append(arguments)
        if self._natural is not None:
            result = self._natural.results[i]
        else:
            n = i - self._part.start
            layer = self._frozen[i].natural if i in self._frozen else self._layers[n]
            result = self._apply(layer, self._seen(arguments, n))
        self._results.append(result)
        if i != self._part[-1]:
            return result
        if not loops:
            self._fill_histories()
            return result
        return self._loop(result)

    def _loop(self, kept: Any) -> Any:
        """The rest of the loop: what the last layer returns for it, after `kept` of the natural
        pass.
        """
        run, x0 = self._run, self._calls[0][self._where[0].state]
        self._layers = [
            self._frozen[i].later() if i in self._frozen else layer
            for i, layer in zip(self._part, self._layers, strict=True)
        ]
        watched = None if run.observer is None else _Watched(self)
        if run.loop.guard is None:
            out = integrate(watched or self, x0, run.loop)
        else:
            out, fired = integrate_guarded(watched or self, x0, run.loop, run.loop.guard)
            # Without a cache this may be training, and nothing may leave a compiled function.
            if run.firings is not None and self._policies:
                out = run.firings.add(fired, out)
        if run.observer is not None and watched is not None:
            run.observer(list(self._part), watched.evaluations, out)
        if POLICIES[run.loop.cache].extra_pass and self._policies:
            # MLX is lazy: of this pass only keys and values are read, so of the last layer
            # nothing else is computed.
            kept = self._evaluate(out)[-1]
        for policy in self._policies.values():
            policy.close()
        return with_stream(kept, out)

    def __call__(self, x: mx.array, between: Between | None = None) -> mx.array:
        if self._evaluation == 0:
            results = self._results
            if between is not None:
                for n, result in enumerate(results):
                    between(n, stream(result))
        else:
            results = self._evaluate(x, between)
        self._evaluation += 1
        return stream(results[-1])

    def _evaluate(self, x: mx.array, between: Between | None = None) -> list[Any]:
        """What the layers return in an evaluation after the natural one."""
        seen = [self._seen(arguments, n) for n, arguments in enumerate(self._calls)]
        return one_pass(self._part, self._layers, self._where, seen, x, between, self._apply)

    def _apply(self, layer: Any, arguments: Arguments) -> Any:
        found = apply(layer, arguments)
        if self._run.in_turn:
            mx.eval(found)
        return found

    def _seen(self, arguments: Arguments, n: int) -> Arguments:
        """A layer's arguments with the caches and the mask of the present evaluation."""
        seen = {
            name: self._view(value, n) if isinstance(value, BaseCache) else value
            for name, value in arguments.items()
        }
        mask, past = self._where[n].mask, self._run.past
        if self._evaluation and past is not None and mask is not None:
            seen[mask] = side_by_side(arguments[mask], past, self._length(n))
        return seen

    def _view(self, cache: Any, n: int) -> Any:
        if id(cache) not in self._policies:
            self._policies[id(cache)] = self._run.policy(cache, self._length(n))
        return self._policies[id(cache)].view(self._evaluation)

    def _length(self, n: int) -> int:
        return int(self._calls[n][self._where[n].state].shape[-2])

    def _fill_histories(self) -> None:
        """Write what the natural pass wrote into the other histories, from the same inputs."""
        count = max((policy.histories for policy in self._policies.values()), default=1)
        for self._evaluation in range(1, count):
            for n, layer in enumerate(self._layers):
                apply(layer, self._seen(self._calls[n], n))


def one_pass(
    part: range,
    layers: Sequence[Any],
    where: Sequence[Layer],
    calls: Sequence[Arguments],
    x: mx.array,
    between: Between | None = None,
    call: Callable[[Any, Arguments], Any] = apply,
) -> list[Any]:
    """What the layers of a part return, of the state x.

    Args:
        calls: what each is called with, but for the state and what layers of the part hand on.
        call: calls a layer.
    """
    results: list[Any] = []
    for n, (layer, place) in enumerate(zip(layers, where, strict=True)):
        arguments = calls[n] | {place.state: x}
        for name, (source, number) in place.feeds.items():
            if source in part:
                arguments[name] = results[source - part.start][number]
        results.append(call(layer, arguments))
        x = stream(results[-1])
        if between is not None:
            x = between(n, x)
    return results


class _Watched:
    """g, with every evaluation (x, g(x)) kept."""

    def __init__(self, g: _Window):
        self._g = g
        self.evaluations: list[tuple[mx.array, mx.array]] = []

    def __call__(self, x: mx.array, between: Between | None = None) -> mx.array:
        gx = self._g(x, between)
        self.evaluations.append((x, gx))
        return gx
