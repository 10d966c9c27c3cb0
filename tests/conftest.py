"""Tiny models that every test file shares."""

from __future__ import annotations

import signal

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from tries import shared

from mlx_loop import LoopConfig
from mlx_loop.models import get_classes

# What is started with `&` or `nohup` ignores them, and so would the programs that tests start.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# Settings side by side, with windows that differ: each key/value policy, each kind of `decode`.
SIDE_BY_SIDE = [
    LoopConfig(loops=3, window=(2, 5)),
    LoopConfig(loops=2, window=(3, 6), cache="last"),
    LoopConfig(loops=2, window=(3, 6), cache="own"),
    LoopConfig(loops=3, window=(2, 5), decode="bypass"),
    LoopConfig(loops=3, window=(2, 5), decode=2),
]

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
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
DENSE = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False},
    # Every other layer attends to the last 8 tokens only.
    "sliding_llama": {
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"] * 4,
    },
}
MIXTURES = {
    "qwen3_moe": {
        **EXPERTS,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [3],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "mixtral": {**EXPERTS, "intermediate_size": 64},
    "olmoe": {**EXPERTS, "intermediate_size": 64, "norm_topk_prob": True},
    "gpt_oss": {
        **EXPERTS,
        "intermediate_size": 64,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    "deepseek_v2": {
        **LATENT,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
        "rope_scaling": YARN,
    },
    "deepseek_v3": {**LATENT, "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1},
}
MODELS = DENSE | MIXTURES


def make(name, seed=0, **changes):
    """A model with looping off and random weights, large enough that every layer matters."""
    config = {"model_type": name.removeprefix("sliding_"), **SIZES, **MODELS[name], **changes}
    cls, args_class = get_classes(config)
    model = cls(args_class.from_dict(config))
    mx.random.seed(seed)
    model.update(
        tree_map(lambda p: mx.random.normal(p.shape) * 0.1 if p.ndim > 1 else p, model.parameters())
    )
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session", params=list(MODELS))
def any_model(request):
    """Each kind of model in turn."""
    return make(request.param)


@pytest.fixture(scope="session", params=list(MIXTURES))
def any_mixture(request):
    """Each kind of model with experts in turn."""
    return make(request.param)


@pytest.fixture(scope="session", params=["qwen3", "sliding_llama", "qwen3_moe", "deepseek_v3"])
def one_of_each(request):
    """A dense model, one with sliding windows, one with experts, one with latent attention."""
    return make(request.param)


@pytest.fixture(scope="session")
def model():
    """One dense model. Tests take views of it with `with_loop`."""
    return make("qwen3")


def embed(model, text):
    """(batch, length) -> (batch, length, hidden), of the models above."""
    return model.model.embed_tokens(text)


def tokens(batch, length, seed=0):
    """Random token ids (batch, length)."""
    return mx.array(np.random.default_rng(seed).integers(2, 300, (batch, length)))


def relative_error(found, expected):
    """Largest absolute difference over largest absolute value, in float32."""
    found, expected = (np.array(mx.array(x).astype(mx.float32)) for x in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="session")
def tries():
    """Tries of commands."""
    return shared()
