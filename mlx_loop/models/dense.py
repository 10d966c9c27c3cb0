"""Dense models: mlx-lm's llama (also Mistral), qwen2 and qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama, qwen2, qwen3

from ..loop import Looped
from .masks import full_or_sliding, same_for_all


class Qwen3(Looped, qwen3.Model):
    family = "dense"
    args_class = qwen3.ModelArgs
    masks = staticmethod(same_for_all)


class Qwen2(Looped, qwen2.Model):
    family = "dense"
    args_class = qwen2.ModelArgs
    masks = staticmethod(same_for_all)


class Llama(Looped, llama.Model):
    family = "dense"
    args_class = llama.ModelArgs

    def masks(self, h: mx.array, caches: Sequence[Any]) -> Sequence[Any]:
        is_sliding = [layer.use_sliding for layer in self.layers]
        return full_or_sliding(h, caches, is_sliding, self.model.sliding_window)
