"""One update: a linear combination of states, or a rescale of each token, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import mlx.core as mx


def combine(coefficients: Sequence[float], states: Sequence[mx.array]) -> mx.array:
    """`sum_j c_j y_j`, accumulated in float32.

    Args:
        coefficients: as many as there are states.
        states: (batch, length, hidden) each, all of one dtype.

    Returns:
        (batch, length, hidden) in the states' dtype. Where one coefficient is 1 and the others
        are 0 that state itself is returned, so a step that changes nothing is exact.
    """
    terms = [(c, state) for c, state in zip(coefficients, states, strict=True) if c]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    weights, used = zip(*terms, strict=True)
    return _combine(_on_device(weights), *used)


def token_norm(x: mx.array) -> mx.array:
    """L2 norm of each token: (batch, length, hidden) -> (batch, length, 1), float32."""
    return mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True)


@partial(mx.compile, shapeless=True)
def rescale(x: mx.array, norm: mx.array) -> mx.array:
    """Each token of `x` scaled to L2 norm `norm`; a zero token stays zero.

    Args:
        x: (batch, length, hidden).
        norm: (batch, length, 1), float32.
    """
    wide = x.astype(mx.float32)
    square = mx.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * (norm * mx.rsqrt(mx.maximum(square, 1e-24)))).astype(x.dtype)


@lru_cache(maxsize=1024)
def _on_device(coefficients: tuple[float, ...]) -> mx.array:
    return mx.array(coefficients, dtype=mx.float32)


@partial(mx.compile, shapeless=True)
def _combine(coefficients: mx.array, *states: mx.array) -> mx.array:
    total = coefficients[0] * states[0].astype(mx.float32)
    for j, state in enumerate(states[1:], start=1):
        total = total + coefficients[j] * state.astype(mx.float32)
    return total.astype(states[0].dtype)
