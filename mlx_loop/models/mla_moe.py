"""Multi-head latent attention with mixtures of experts: mlx-lm's deepseek_v2 and deepseek_v3.

mlx-lm maps Kimi K2 and others to deepseek_v3; Moonlight is published as deepseek_v3.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v2, deepseek_v3

from ..loop import Looped
from ..routing import MoEBlock
from .masks import same_for_all


def _from_gate(block: nn.Module, output: tuple[mx.array, mx.array], indices: mx.array) -> mx.array:
    return output[1]


def _shared_experts(block: nn.Module, x: mx.array) -> mx.array:
    return block.shared_experts(x) if "shared_experts" in block else mx.zeros_like(x)


class DeepseekV2(Looped, deepseek_v2.Model):
    family = "mla_moe"
    args_class = deepseek_v2.ModelArgs
    moe = MoEBlock(_from_gate, shared=_shared_experts)
    masks = staticmethod(same_for_all)


class DeepseekV3(Looped, deepseek_v3.Model):
    family = "mla_moe"
    args_class = deepseek_v3.ModelArgs
    quantised_cache = False
    moe = MoEBlock(_from_gate, shared=_shared_experts)
    masks = staticmethod(partial(same_for_all, return_array=True))
