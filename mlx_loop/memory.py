"""What a model needs of memory, from shapes alone.

Weights and caches are what MLX's own shape inference says of the lazy model, so they are exact;
activations follow a formula. One arithmetic for `load`, which refuses what cannot fit, and for
`mlx_loop plan`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.utils import get_total_parameters

from .cache import histories
from .errors import UserError
from .loop import Looped
from .quantise import Params, matrices, quantised_bytes
from .routing import has_experts

# mlx-lm's caches grow by this many tokens.
CACHE_STEP = 256
# Prompt tokens processed at a time: mlx-lm's own number, and with a quantised cache, whose
# attention is not fused, a smaller one. At 2048 a 4-bit cache raises the peak by 13 %, at 512 it
# lowers it by 24 % (mlx-lm #1043, #1832).
PREFILL_STEP, QUANTISED_PREFILL_STEP = 2048, 512
# Tokens of context that a model must have room for to be worth loading.
LEAST_CONTEXT = 2048


def prefill_step(kv_bits: int | None) -> int:
    """The default number of prompt tokens that are processed at a time."""
    return PREFILL_STEP if kv_bits is None else QUANTISED_PREFILL_STEP


def weights_bytes(model: nn.Module, chosen: Mapping[str, Params] | None = None) -> int:
    """Bytes of all parameters, as they are or quantised.

    Args:
        chosen: as `quantise.choose` returns it; None: as they are.
    """
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    if chosen:
        modules = matrices(model)
        for path, params in chosen.items():
            weight = modules[path].weight
            total += quantised_bytes(weight.shape, weight.dtype.size, params) - weight.nbytes
    return total


def bits_per_weight(model: nn.Module, chosen: Mapping[str, Params] | None = None) -> float:
    """As mlx-lm counts: all bytes of the model, scales included, over all its weights."""
    return 8 * weights_bytes(model, chosen) / get_total_parameters(model)


def largest_piece(model: nn.Module) -> int:
    """Bytes of the largest single parameter."""
    return max(array.nbytes for _, array in tree_flatten(model.parameters()))


@dataclass(frozen=True)
class History:
    """Keys and values that one evaluation of one layer keeps.

    Args:
        values: numbers per token, of keys and values together.
        itemsize: bytes of a number.
        limit: the most tokens it keeps; None: all.
    """

    values: int
    itemsize: int
    limit: int | None

    def nbytes(self, tokens: int, kv_bits: int | None = None, kv_group_size: int = 64) -> int:
        """Bytes that mlx-lm's cache allocates for so many tokens."""
        if self.limit is not None and tokens >= self.limit:
            kept = self.limit
        else:
            kept = -(-tokens // CACHE_STEP) * CACHE_STEP
        if kv_bits is None or self.limit is not None:
            return kept * self.values * self.itemsize
        scales = 2 * self.itemsize * self.values // kv_group_size
        return kept * (self.values * kv_bits // 8 + scales)


def layer_histories(model: Looped) -> list[list[History]]:
    """What each layer keeps under the model's loop settings; nothing is evaluated."""
    cache = model.new_cache()
    model.for_prompt(cache, 1)(mx.zeros((1, 1), mx.int32), cache=cache)
    return [[_history(c) for c in histories(entry)] for entry in cache]


def _history(cache: Any) -> History:
    keys, values = cache.keys, cache.values
    numbers = keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]
    limit = cache.max_size if isinstance(cache, RotatingKVCache) else None
    return History(numbers, keys.dtype.size, limit)


def cache_bytes(
    model: Looped, tokens: int, kv_bits: int | None = None, kv_group_size: int = 64
) -> int:
    """Bytes of the whole cache after `tokens` tokens."""
    return sum(
        history.nbytes(tokens, kv_bits, kv_group_size)
        for layer in layer_histories(model)
        for history in layer
    )


def check(model, name): pass
