"""A forward pass of mlx-lm's own model in which stand-ins take the places of some layers.

There is no other walk through the layers: masks, embeddings, what happens between layers, last
norm and head are mlx-lm's. A stand-in may answer from memory; MLX is lazy, so what then nobody
reads is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from .anatomy import StandIn, with_layers


class Walk:
    """Put stand-ins in place, then `run`.

    Args:
        model: a `Looped` model; its loop settings do not matter.
        forward: (model, tokens, cache, ...) -> logits, mlx-lm's own.
    """

    def __init__(self, model: Any, forward: Callable[..., mx.array]):
        self._model, self._forward = model, forward
        self._calls: dict[int, Callable[..., Any]] = {}

    def put(self, i: int, call: Callable[..., Any]) -> None:
        """`call` gets what layer i would get, and its result takes the place of the layer's."""
        self._calls[i] = call

    def answer(self, i: int, result: Any) -> None:
        """Layer i gives `result`, whatever it gets."""
        self.put(i, lambda *args, **kwargs: result)

    def keep(self, layers: Iterable[int], results: dict[int, Any]) -> None:
        """Keep what these layers, or their stand-ins, return, by number."""
        for i in layers:
            self.put(i, self._kept(i, self._calls.get(i, self._model.layers[i]), results))

    def _kept(self, i: int, call: Callable[..., Any], results: dict[int, Any]) -> Any:
        def kept(*args: Any, **kwargs: Any) -> Any:
            results[i] = call(*args, **kwargs)
            return results[i]

        return kept

    def in_turn(self, layers: Iterable[int]) -> None:
        """Compute what each of these layers, or its stand-in, returns before the next is called."""
        for i in layers:
            self.put(i, self._computed(self._calls.get(i, self._model.layers[i])))

    def _computed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            mx.eval(found)
            return found

        return computed

    def end_after(self, i: int) -> None:
        """No layer after layer i runs, and `run` gives None."""
        call = self._calls.get(i, self._model.layers[i])

        def last(*args: Any, **kwargs: Any) -> Any:
            call(*args, **kwargs)
            raise _Ended

        self.put(i, last)

    def run(self, tokens: mx.array | None, cache: Sequence[Any] | None, **kwargs: Any) -> Any:
        """Logits (batch, length, vocab) of tokens (batch, length), int.

        Args:
            tokens: None, where mlx-lm's model needs embeddings only.
            cache: an entry per layer as mlx-lm makes them, or None.
            kwargs: whatever else mlx-lm's model takes.
        """
        layers = self._model.anatomy.layers
        places = {
            layers[i].path: StandIn(self._model.layers[i], call) for i, call in self._calls.items()
        }
        try:
            return self._forward(with_layers(self._model, places), tokens, cache, **kwargs)
        except _Ended:
            return None


class _Ended(Exception):
    """Leaves mlx-lm's forward pass early."""
