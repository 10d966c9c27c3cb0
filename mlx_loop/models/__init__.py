"""Looped model classes, by mlx-lm's model type."""

from __future__ import annotations

from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from ..errors import UserError
from ..loop import Looped
from ..rope import reader
from .dense import Llama, Qwen2, Qwen3
from .mla_moe import DeepseekV2, DeepseekV3
from .moe import GptOss, Mixtral, Olmoe, Qwen2MoE, Qwen3MoE

MODELS: dict[str, type[Looped]] = {
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen2_moe": Qwen2MoE,
    "qwen3_moe": Qwen3MoE,
    "mixtral": Mixtral,
    "olmoe": Olmoe,
    "gpt_oss": GptOss,
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
}


def supported() -> list[str]:
    """Model types as config.json names them."""
    return sorted(MODELS.keys() | {name for name, to in MODEL_REMAPPING.items() if to in MODELS})


def get_classes(config: dict[str, Any]) -> tuple[type[Looped], type]:
    """mlx-lm's `get_model_classes` hook: config.json -> (model class, arguments class).

    Raises:
        UserError: a model type that cannot loop; the message lists those that can.
    """
    model_type = config.get("model_type", "")
    cls = MODELS.get(MODEL_REMAPPING.get(model_type, model_type))
    if cls is None:
        raise UserError(
            f"model type {model_type!r} is not supported; supported are {', '.join(supported())}"
        )
    return cls, reader(cls.args_class)
