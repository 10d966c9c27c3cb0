"""Frozen routing: a layer's natural pass chooses experts and weights, later passes re-use them.

The router answers from memory: for the passes of one loop a layer is replaced by a copy, sharing
all weights, in which the router is another module. The rest of the layer is mlx-lm's own, and so
are the numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..upstream import EXPERTS
from .anatomy import Layer, at, find, with_layers


class Frozen:
    """One layer whose routers are asked once, in the natural pass.

    Attributes:
        natural: the layer for that pass.
    """

    def __init__(self, layer: nn.Module, where: Layer):
        self._layer = layer
        self._asked = {path: _Asked(at(layer, path)) for path in where.routers}
        self.natural = with_layers(layer, self._asked)

    def later(self, rows: mx.array | None = None) -> nn.Module:
        """The layer for later passes over the same tokens, or those of some rows of a batch."""
        answers = {
            path: _Answer(asked.answer.said if rows is None else _rows(asked.answer.said, rows))
            for path, asked in self._asked.items()
        }
        return with_layers(self._layer, answers)

    @staticmethod
    def join(parts: Sequence[Frozen]) -> Frozen:
        """One for the tokens of all parts, which follow each other in one sequence."""
        joined = copy.copy(parts[0])
        joined._asked = {}
        for path in parts[0]._asked:
            asked = _Asked(parts[0]._asked[path].router)
            asked.answer.said = _concatenated([part._asked[path].answer.said for part in parts])
            joined._asked[path] = asked
        return joined


class _Asked(nn.Module):
    """A router that remembers its answer. Its parameters are seen under a longer name."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.router = router
        self.answer = _Memory()

    def __call__(self, *args: Any) -> Any:
        self.answer.said = self.router(*args)
        return self.answer.said


class _Memory:
    """Outside the module's parameters: the natural pass has nothing to learn from it."""

    said: Any = None


class _Answer(nn.Module):
    """A router's answer. Its arrays are parameters, so that gradient checkpointing, which sees of
    a layer only those, takes the natural pass's router and its gradient along.
    """

    def __init__(self, said: Any):
        super().__init__()
        self.is_tuple = isinstance(said, tuple)
        self.said = list(said) if self.is_tuple else said

    def __call__(self, *args: Any) -> Any:
        return tuple(self.said) if self.is_tuple else self.said


def _rows(answer: Any, rows: mx.array) -> Any:
    return tuple(part[rows] for part in answer) if isinstance(answer, tuple) else answer[rows]


def _concatenated(answers: Sequence[Any]) -> Any:
    """Answers are of shape (..., tokens, numbers), or tuples of such arrays."""
    if isinstance(answers[0], tuple):
        return tuple(map(_concatenated, zip(*answers, strict=True)))
    return mx.concatenate(list(answers), axis=-2)


def expert_changes(model: Any, tokens: mx.array) -> dict[int, list[float]]:
    """How unsteady live routing is: tokens whose set of experts is not the natural pass's.

    Args:
        model: a looped model with experts; its `routing` setting does not matter.
        tokens: (batch, length), int.

    Returns:
        For each layer of the window that has experts, by its number: for each later pass the
        share of tokens, 0 to 1.
    """
    layers = model.anatomy.layers[: model.loop.layers[-1] + 1]
    chosen: dict[int, list[mx.array]] = {i: [] for i, where in enumerate(layers) if where.routers}

    def watched(i: int) -> nn.Module:
        def keep(indices: mx.array) -> None:
            mx.eval(indices)  # Layer by layer, so that Ctrl-C is heard in between.
            chosen[i].append(indices)

        return watch_experts(model.layers[i], keep)

    live = model.with_loop(replace(model.loop, routing="live"))
    with_layers(live, {layers[i].path: watched(i) for i in chosen})(tokens)
    changes = {}
    for i in model.loop.layers:
        passes = chosen.get(i)
        if not passes:  # Experts of a kind that cannot be watched, or none.
            continue
        natural, *later = (mx.sort(indices, axis=-1) for indices in passes)
        changes[i] = [float(mx.mean(mx.any(sets != natural, axis=-1))) for sets in later]
    return changes


def watch_experts(layer: nn.Module, chosen: Callable[[mx.array], None]) -> nn.Module:
    """A copy of `layer`, sharing all weights, that tells the experts (..., number) of each call."""
    found = find(layer, lambda module: isinstance(module, EXPERTS))
    return with_layers(layer, {path: watched(experts, chosen) for path, experts in found.items()})


def watched(experts: nn.Module, chosen: Callable[[mx.array], None]) -> Callable[..., Any]:
    """The experts of a layer, which tell the numbers of the chosen ones at each call."""

    def call(x: mx.array, indices: mx.array, *rest: Any) -> Any:
        chosen(indices)
        return experts(x, indices, *rest)

    return call
