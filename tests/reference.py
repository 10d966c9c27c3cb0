"""A slow loop that is hard to get wrong: every pass is a whole pass of mlx-lm's own model.

A pass over the window is a forward pass in which the window's first layer gets another state; what
its last layer returns is read off. Each starts from a copy of the cache. So nothing here knows of
rewinding, tableaux, masks, or what a model does between its layers.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn

from mlx_loop.method.kernels import combine


class Spy:
    """In a layer's place: gives it another state, and something else on for what it returns."""

    def __init__(self, layer, position):
        self.layer, self.position = layer, position
        self.given = self.returned = self.instead_in = self.instead_out = None

    def __call__(self, *args, **kwargs):
        args = list(args)
        place = kwargs if isinstance(self.position, str) else args
        self.given = place[self.position]
        if self.instead_in is not None:
            place[self.position] = self.instead_in
        found = self.layer(*args, **kwargs)
        self.returned = found if isinstance(found, mx.array) else found[0]
        if self.instead_out is None:
            return found
        if isinstance(found, mx.array):
            return self.instead_out
        return (self.instead_out, *found[1:])

    def __getattr__(self, name):
        return getattr(self.layer, name)

    @property
    def __class__(self):
        return type(self.layer)


class Reference:
    """`anchored` loops around mlx-lm's own model, with key/value policy `first` or `last`.

    Args:
        model: mlx-lm's own; it is used up.
        loop: complete settings, with live routing.
    """

    def __init__(self, model, loop):
        position = {"talkie": 1, "gptj": "inputs"}.get(model.model_type, 0)
        self.model, self.loop = model, loop
        self.spies = [Spy(layer, position) for layer in model.layers]
        by_id = {id(spy.layer): spy for spy in self.spies}
        for module in list(model.modules()):
            for value in module.values():
                if isinstance(value, list):
                    value[:] = [by_id.get(id(item), item) for item in value]

    def __call__(self, tokens, cache=None):
        """Logits (batch, length, vocab); `cache` is updated."""
        parts, done = [], {}
        window = self.loop.window
        for start, stop in [window] if isinstance(window[0], int) else window:
            size = stop - start if self.loop.scope == "block" else 1
            parts += [(first, first + size - 1) for first in range(start, stop, size)]
        for first, last in parts:
            done[first, last] = self._looped(tokens, cache, first, last, done)
        return self._pass(tokens, cache, done)

    def _looped(self, tokens, cache, first, last, done):
        def g(x):
            self._pass(tokens, copy.deepcopy(cache), done, (first, x))
            return self.spies[first].given, self.spies[last].returned

        x0, natural = g(None)
        s, rest = 1 / self.loop.loops, 1 - self.loop.beta
        x, gx = x0, natural
        for _ in range(self.loop.loops - 1):
            x = combine((1 - s, s), (x, gx))
            _, gx = g(x)
        return combine((self.loop.beta, rest * (1 - s), rest * s), (natural, x, gx))

    def _pass(self, tokens, cache, done, given=None):
        """A pass in which the parts that are done give on their looped states."""
        for spy in self.spies:
            spy.instead_in = spy.instead_out = None
        for (first, last), state in done.items():
            self.spies[last].instead_out = state
            if self.loop.cache == "last":
                self.spies[first].instead_in = state
        if given is not None:
            self.spies[given[0]].instead_in = given[1]
        return self.model(tokens, cache=cache)


def doubled_window(model, window):
    """The plain mlx-lm model in which the window's layers stand twice: naive, K = 2, `own`."""
    start, stop = window
    double = copy.copy(plain(model))
    double.model = copy.copy(model.model)
    double.model.layers = model.layers[:stop] + model.layers[start:]
    return double


def plain(model):
    """mlx-lm's own model with the weights of a looped one; its lists are its own."""
    cls = next(c for c in type(model).__mro__ if c.__module__.startswith("mlx_lm"))
    return _copied(model, cls)


def _copied(value, cls=None):
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if not isinstance(value, nn.Module):
        return value
    cls = cls or type(value)
    twin = cls.__new__(cls)
    dict.update(twin, {key: _copied(item) for key, item in value.items()})
    vars(twin).update(vars(value))
    return twin
