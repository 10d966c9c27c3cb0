"""Tiny models that every test file shares."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_loop.models.dense import Llama, Qwen2, Qwen3

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "head_dim": 32,
}
MODELS = {
    "qwen3": (Qwen3, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2, {"tie_word_embeddings": False}),
    "llama": (Llama, {"tie_word_embeddings": False}),
    # Every other layer attends to the last 8 tokens only.
    "sliding_llama": (
        Llama,
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 4},
    ),
}


def make(name, seed=0):
    """A model with looping off and random weights, large enough that every layer matters."""
    cls, extra = MODELS[name]
    model = cls(
        cls.args_class.from_dict({"model_type": name.removeprefix("sliding_"), **SIZES, **extra})
    )
    mx.random.seed(seed)
    model.update(
        tree_map(lambda p: mx.random.normal(p.shape) * 0.1 if p.ndim > 1 else p, model.parameters())
    )
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session", params=list(MODELS))
def any_model(request):
    """Each kind of dense model in turn."""
    return make(request.param)


@pytest.fixture(scope="session")
def model():
    """One dense model. Tests take views of it with `with_loop`."""
    return make("qwen3")


def tokens(batch, length, seed=0):
    """Random token ids (batch, length)."""
    return mx.array(np.random.default_rng(seed).integers(2, 300, (batch, length)))


def relative_error(found, expected):
    """Largest absolute difference over largest absolute value, in float32."""
    found, expected = (np.array(mx.array(x).astype(mx.float32)) for x in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())
