"""Frozen routing: a layer's natural pass chooses experts and weights, later passes re-use them.

For the passes of one loop a layer is replaced by a copy, sharing all weights, whose MoE block
remembers. The natural pass is mlx-lm's own code, to the bit; a later pass has no router product,
no top-k and no sort of indices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# mlx-lm sorts tokens by expert from this many (token, expert) pairs on.
SORT_FROM = 64


@dataclass(frozen=True)
class MoEBlock:
    """Where a family keeps what, and the arithmetic around the experts that is its own.

    Args:
        attribute: of the layer, that holds the block.
        gate, experts: of the block: the router and mlx-lm's SwitchGLU.
        weights: (block, output of the gate, indices) -> weights of the chosen experts, of the
            shape of indices, (..., experts per token).
        shared: (block, x) -> what experts that every token uses add; None: no such experts.
    """

    weights: Callable[[nn.Module, Any, mx.array], mx.array]
    attribute: str = "mlp"
    gate: str = "gate"
    experts: str = "switch_mlp"
    shared: Callable[[nn.Module, mx.array], mx.array] | None = None


def with_frozen_routing(layer: nn.Module, family: MoEBlock) -> nn.Module:
    """`layer` for the passes of one loop; a layer without experts is returned as it is."""
    if not has_experts(layer, family):
        return layer
    stand_in = copy.copy(layer)
    stand_in[family.attribute] = _FrozenBlock(layer[family.attribute], family)
    return stand_in


def join_routing(stand_ins: Sequence[nn.Module], family: MoEBlock) -> nn.Module:
    """One stand-in for the tokens of several stand-ins of a layer, in their order.

    Each has done its natural pass, over some tokens of one sequence. A layer without experts, or
    without frozen routing, is returned as it is.
    """
    first = stand_ins[0]
    if not isinstance(first[family.attribute], _FrozenBlock):
        return first
    stand_in = copy.copy(first)
    stand_in[family.attribute] = first[family.attribute].joined(
        [other[family.attribute] for other in stand_ins]
    )
    return stand_in


def has_experts(layer: nn.Module, family: MoEBlock) -> bool:
    """Whether this layer is a mixture of experts; a model may mix them with dense ones."""
    return family.experts in layer[family.attribute]


class _FrozenBlock:
    def __init__(self, block: nn.Module, family: MoEBlock):
        self._block, self._family = block, family
        self._gate = _Tap(block[family.gate])
        self._experts = _Experts(block[family.experts])
        self._weights: Any = None

    def __call__(self, x: mx.array) -> mx.array:
        block, family = self._block, self._family
        if self._weights is None:
            natural = copy.copy(block)
            natural[family.gate], natural[family.experts] = self._gate, self._experts
            out = natural(x)
            self._weights = family.weights(block, self._gate.output, self._experts.indices)
            return out
        y = self._experts.again(x)
        y = (y * self._weights[..., None]).sum(axis=-2).astype(y.dtype).reshape(x.shape)
        if family.shared is not None:
            y = y + family.shared(block, x)
        group = getattr(block, "sharding_group", None)
        return y if group is None else mx.distributed.all_sum(y, group=group)

    def joined(self, blocks: Sequence[_FrozenBlock]) -> _FrozenBlock:
        """Itself, with what the natural passes of all `blocks` chose for their tokens."""
        joined = _FrozenBlock(self._block, self._family)
        joined._weights = mx.concatenate([b._weights for b in blocks], axis=-2)
        joined._experts.choose(mx.concatenate([b._experts.indices for b in blocks], axis=-2))
        return joined


class _Tap:
    """A router that keeps its last output."""

    def __init__(self, module: Callable):
        self._module = module
        self.output: Any = None

    def __call__(self, x: mx.array) -> Any:
        self.output = self._module(x)
        return self.output


class _Experts:
    """mlx-lm's SwitchGLU, with the order of tokens by expert kept for further states."""

    def __init__(self, switch: Any):
        self._switch = switch
        self.indices: mx.array
        self._sorted: tuple[mx.array, mx.array, mx.array] | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.choose(indices)
        return self.again(x)

    def choose(self, indices: mx.array) -> None:
        """Take these experts, (..., experts per token), from now on."""
        self.indices = indices
        if indices.size >= SORT_FROM:
            flat = indices.flatten()
            order = mx.argsort(flat)
            self._sorted = (order // indices.shape[-1], flat[order], mx.argsort(order))

    def again(self, x: mx.array) -> mx.array:
        """Outputs (..., experts per token, hidden) for other states of the same tokens."""
        indices = self.indices
        if self._sorted is None:
            tokens = x.reshape(*indices.shape[:-1], 1, 1, x.shape[-1])
            return self._run(tokens, indices, False).squeeze(-2)
        rows, chosen, inverse = self._sorted
        out = self._run(x.reshape(-1, 1, x.shape[-1])[rows], chosen, True)
        return mx.unflatten(out[inverse], 0, indices.shape).squeeze(-2)

    def _run(self, x: mx.array, indices: mx.array, is_sorted: bool) -> mx.array:
        switch = self._switch
        up = switch.up_proj(x, indices, sorted_indices=is_sorted)
        gate = switch.gate_proj(x, indices, sorted_indices=is_sorted)
        return switch.down_proj(switch.activation(up, gate), indices, sorted_indices=is_sorted)


def expert_changes(model: Any, tokens: mx.array) -> dict[int, list[float]]:
    """How unsteady live routing is: tokens whose set of experts is not the natural pass's.

    Args:
        model: a looped model with experts; its `routing` setting does not matter.
        tokens: (batch, length), int.

    Returns:
        For each layer of the window that has experts, by its number: for each later pass the
        share of tokens, 0 to 1.
    """
    layers = model.model.layers
    plain = {i: layers[i] for i in model.loop.layers if has_experts(layers[i], model.moe)}
    chosen: dict[int, list[mx.array]] = {i: [] for i in plain}
    try:
        for i, layer in plain.items():
            layers[i] = _watched(layer, model.moe, chosen[i])
        model.with_loop(replace(model.loop, routing="live"))(tokens)
    finally:
        for i, layer in plain.items():
            layers[i] = layer
    changes = {}
    for i, passes in chosen.items():
        natural, *later = (mx.sort(indices, axis=-1) for indices in passes)
        changes[i] = [float(mx.mean(mx.any(sets != natural, axis=-1))) for sets in later]
    return changes


def _watched(layer: nn.Module, family: MoEBlock, chosen: list[mx.array]) -> nn.Module:
    """A copy of `layer`, sharing all weights, that appends the experts of each call to a list."""
    watched, block = copy.copy(layer), copy.copy(layer[family.attribute])
    experts = block[family.experts]

    def watch(x: mx.array, indices: mx.array) -> mx.array:
        chosen.append(indices)
        return experts(x, indices)

    block[family.experts] = watch
    watched[family.attribute] = block
    return watched
