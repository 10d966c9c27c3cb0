"""Attention masks shared by the families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask


def same_for_all(h: mx.array, caches: Sequence[Any], return_array: bool = False) -> Sequence[Any]:
    """Every layer attends to the whole past."""
    return [create_attention_mask(h, caches[0], return_array=return_array)] * len(caches)


def full_or_sliding(
    h: mx.array, caches: Sequence[Any], is_sliding: Sequence[bool], window_size: int
) -> Sequence[Any]:
    """Some layers attend to the whole past, others to the last `window_size` tokens."""
    kinds = {
        kind: create_attention_mask(
            h, caches[list(is_sliding).index(kind)], window_size=window_size if kind else None
        )
        for kind in set(is_sliding)
    }
    return [kinds[kind] for kind in is_sliding]
