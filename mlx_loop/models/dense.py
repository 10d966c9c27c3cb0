"""Dense models: mlx-lm's llama (also Mistral), qwen2 and qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.base import create_attention_mask

from ..loop import Looped


class _OneMask(Looped):
    """Every layer attends to the whole past."""

    family = "dense"

    def masks(self, h: mx.array, caches: Sequence[Any]) -> Sequence[Any]:
        return [create_attention_mask(h, caches[0])] * len(caches)


class Qwen3(_OneMask, qwen3.Model):
    args_class = qwen3.ModelArgs


class Qwen2(_OneMask, qwen2.Model):
    args_class = qwen2.ModelArgs


class Llama(Looped, llama.Model):
    """Some checkpoints let a part of the layers attend to a sliding window only."""

    family = "dense"
    args_class = llama.ModelArgs

    def masks(self, h: mx.array, caches: Sequence[Any]) -> Sequence[Any]:
        model = self.model
        full = create_attention_mask(h, caches[model.fa_idx])
        if model.swa_idx is None:
            return [full] * len(caches)
        sliding = create_attention_mask(h, caches[model.swa_idx], window_size=model.sliding_window)
        return [sliding if layer.use_sliding else full for layer in model.layers]
