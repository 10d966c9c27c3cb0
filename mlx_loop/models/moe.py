"""Mixtures of experts: mlx-lm's qwen3_moe, qwen2_moe, mixtral, olmoe and gpt_oss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gpt_oss, mixtral, olmoe, qwen2_moe, qwen3_moe

from ..loop import Looped
from ..routing import MoEBlock
from .masks import full_or_sliding, same_for_all


def _softmax_then_choose(block: nn.Module, logits: mx.array, indices: mx.array) -> mx.array:
    weights = mx.take_along_axis(mx.softmax(logits, axis=-1, precise=True), indices, axis=-1)
    if getattr(block, "norm_topk_prob", False):
        weights = weights / mx.sum(weights, axis=-1, keepdims=True)
    return weights


def _choose_then_softmax(block: nn.Module, logits: mx.array, indices: mx.array) -> mx.array:
    return mx.softmax(mx.take_along_axis(logits, indices, axis=-1), axis=-1, precise=True)


def _gated_shared_expert(block: nn.Module, x: mx.array) -> mx.array:
    return mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)


class Qwen3MoE(Looped, qwen3_moe.Model):
    family = "moe"
    args_class = qwen3_moe.ModelArgs
    moe = MoEBlock(_softmax_then_choose)
    masks = staticmethod(same_for_all)


class Qwen2MoE(Looped, qwen2_moe.Model):
    family = "moe"
    args_class = qwen2_moe.ModelArgs
    moe = MoEBlock(_softmax_then_choose, shared=_gated_shared_expert)
    masks = staticmethod(same_for_all)


class Mixtral(Looped, mixtral.Model):
    family = "moe"
    args_class = mixtral.ModelArgs
    moe = MoEBlock(_choose_then_softmax, attribute="block_sparse_moe")
    masks = staticmethod(same_for_all)


class Olmoe(Looped, olmoe.Model):
    family = "moe"
    args_class = olmoe.ModelArgs
    moe = MoEBlock(_softmax_then_choose)
    masks = staticmethod(same_for_all)


class GptOss(Looped, gpt_oss.Model):
    family = "moe"
    args_class = gpt_oss.ModelArgs
    # mlx-lm's quantised attention knows no attention sinks.
    quantised_cache = False
    moe = MoEBlock(_choose_then_softmax, gate="router", experts="experts")

    def masks(self, h: mx.array, caches: Sequence[Any]) -> Sequence[Any]:
        model = self.model
        is_sliding = [kind == "sliding_attention" for kind in model.layer_types]
        return full_or_sliding(h, caches, is_sliding, model.window_size)
