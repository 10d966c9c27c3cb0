"""Tiny models of every type that mlx-lm has, from one table of common numbers and a few extras."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_map

from mlx_loop.models import looped_class
from mlx_loop.models.looped import Looped
from mlx_loop.upstream import model_classes

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB = 8, 128, 4, 2, 32, 320
DENSE = 3  # the layer without a mixture of experts, where a config can choose one

# Kinds of layers, in an order that puts each kind among the layers 2 to 5.
SLIDING = ["full_attention", "sliding_attention"] * (LAYERS // 2)
LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
CONV = ["conv", "full_attention"] * (LAYERS // 2)
MAMBA = ["mamba", "attention"] * (LAYERS // 2)
KDA = {
    "kda_layers": [1, 3, 5, 7],  # counted from 1
    "num_heads": HEADS,
    "head_dim": HEAD,
    "short_conv_kernel_size": 4,
}
MIXTURE = [layer != DENSE for layer in range(LAYERS)]

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ROPE_OF_KINDS = {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 1000.0}}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _named(names: str, value: object) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# The same few numbers, under all the names that checkpoints have for them.
COMMON = {
    **_named("num_hidden_layers num_layers n_layer n_layers num_transformer_layers", LAYERS),
    **_named("hidden_size hidden_dim n_embd d_model model_dim block_dim mamba_d_ssm", HIDDEN),
    **_named("intermediate_size n_inner ffn_hidden_size shared_intermediate_size", HIDDEN // 2),
    **_named("intermediate_size_mlp ff_intermediate_size dense_intermediate_size", HIDDEN // 2),
    **_named("num_attention_heads num_heads n_head n_heads swa_num_attention_heads", HEADS),
    **_named("linear_num_value_heads index_n_heads mamba_num_heads mamba_n_heads", HEADS),
    **_named("num_key_value_heads num_kv_heads n_kv_heads swa_num_key_value_heads", KV_HEADS),
    **_named("linear_num_key_heads num_attention_groups n_shared_head", KV_HEADS),
    **_named("head_dim v_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank", HEAD),
    **_named("swa_head_dim swa_v_head_dim index_head_dim global_head_dim kv_channels", HEAD),
    **_named("linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_head", HEAD),
    **_named("moe_intermediate_size expert_ffn_hidden_size share_expert_dim", HEAD),
    **_named("shared_expert_intermediate_size moe_shared_expert_intermediate_size", HEAD),
    **_named("hidden_size_per_head hidden_size_per_layer_input", HEAD),
    **_named("qk_rope_head_dim rotary_dim state_size ssm_state_size mamba_d_state", HEAD // 2),
    **_named("vocab_size num_vocab vocab_size_per_layer_input", VOCAB),
    **_named("max_position_embeddings n_positions n_ctx model_max_length block_size", 4096),
    **_named("num_experts num_local_experts n_routed_experts moe_num_experts", 8),
    **_named("sliding_window sliding_window_size attention_window_size window_size", 8),
    **_named("index_topk attention_chunk_size", 8),
    **_named("linear_conv_kernel_dim conv_kernel mamba_d_conv conv_L_cache conv1d_width", 4),
    **_named("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k", 2),
    **_named("top_k_experts zero_expert_num full_attention_interval sliding_window_pattern", 2),
    **_named("n_group n_groups mamba_n_groups group_norm_size layer_group_size mamba_step", 2),
    **_named("num_kv_shared_layers num_kv_reuse_layers mamba_expand", 2),
    **_named("n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts", 1),
    **_named("first_k_dense_replace num_dense_layers moe_layer_start_index topk_group", 1),
    **_named("decoder_sparse_step moe_layer_freq", 1),
    **_named("logits_scaling embedding_multiplier residual_multiplier", 1.0),
    **_named("rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps layernorm_epsilon", 1e-6),
    **_named("rope_theta swa_rope_theta rope_local_base_freq rotary_emb_base", 10000.0),
    **_named("partial_rotary_factor rotary_pct", 0.5),
    **_named("final_logit_softcapping logits_soft_cap gegelu_limit", 20.0),
    **_named("attention_bias mlp_bias use_bias use_qkv_bias mamba_proj_bias", False),
    **_named("conv_bias use_conv_bias tie_word_embeddings", False),
    **_named("use_qk_norm norm_topk_prob use_expert_bias mla_scale_q_lora mla_scale_kv_lora", True),
    "attention_multiplier": HEAD**-0.5,
    "dim_model_base": HIDDEN // 2,
    "layer_types": SLIDING,
    "mlp_layer_types": ["sparse" if mixture else "dense" for mixture in MIXTURE],
    "mlp_only_layers": [DENSE],
    "rope_scaling": None,
    "routed_scaling_factor": 1.5,
    "scale_depth": 1.4,
    "scale_emb": 2.0,
    "scoring_func": "sigmoid",
    "time_step_limit": (0.001, 100.0),
    "time_step_rank": "auto",
    "topk_method": "noaux_tc",
}
EXTRAS: dict[str, dict[str, Any]] = {
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [1, 3, 5, 7], "conv_window": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": HEAD, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": YARN, "topk_method": "group_limited_greedy"},
    "deepseek_v41": {
        "compress_ratios": (0, 0, 2, 2, 1, 1, 1, 0),
        "kv_source_layer_ids": (2, 4),
        "index_source_layer_ids": (2, 4, 5),
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "index_topk": 3,
        "o_groups": 2,
        "o_lora_rank": HEAD,
    },
    "exaone4": {"sliding_window_pattern": "GL"},
    "exaone_moe": {"is_moe_layer": MIXTURE},
    "gear": {"layer_types": (["full_attention", "sliding_attention", "conv_mixer"] * 3)[:LAYERS]},
    "gemma3n": {
        "activation_sparsity_pattern": [0.5, 0.0] * (LAYERS // 2),
        "altup_num_inputs": 2,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": HEAD,
    },
    "gemma4_text": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
    },
    "glm_moe_dsa": {"rope_parameters": YARN},
    "granitemoehybrid": {"layer_types": MAMBA},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "jamba": {
        "layers_block_type": MAMBA,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 3,
    },
    "kimi_k3": {
        "linear_attn_config": KDA,
        "mla_use_output_gate": True,
        "routed_expert_hidden_size": HEAD,
        "latent_moe_use_norm": True,
    },
    "kimi_linear": {"linear_attn_config": KDA},
    "laguna": {
        "num_attention_heads_per_layer": [HEADS, 2 * HEADS] * (LAYERS // 2),
        "rope_parameters": ROPE_OF_KINDS,
    },
    "lfm2": {
        "layer_types": CONV,
        "block_multiple_of": 4,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": {"layer_types": CONV},
    "llama4": {"interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0] * (LAYERS // 4)},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "longcat_flash_ngram": {"ngram_vocab_size_ratio": 2},
    "mellum": {"rope_parameters": ROPE_OF_KINDS},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1] * (LAYERS // 2),
        "moe_layer_freq": MIXTURE,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minicpm3": {"rope_scaling": {"short_factor": 1.0, "long_factor": 1.0}},
    "minimax_m3_vl": {"index_n_heads": KV_HEADS, "index_block_size": 2, "index_topk_blocks": 2},
    "ministral3": {"rope_parameters": YARN},
    "mistral4": {"rope_parameters": YARN},
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
        ]
        * (LAYERS // 4),
    },
    "nemotron_h": {"hybrid_override_pattern": list("M*-E" * (LAYERS // 4))},
    "olmo_hybrid": {"layer_types": LINEAR, "linear_allow_neg_eigval": True},
    "openelm": {
        "ffn_dim_divisor": HEAD,
        "ffn_multipliers": [1.0, 2.0] * (LAYERS // 2),
        "num_query_heads": [HEADS, 2 * HEADS] * (LAYERS // 2),
        "num_kv_heads": [KV_HEADS] * LAYERS,
    },
    "phi3small": {"dense_attention_every_n_layers": 2},
    "phixtral": {"model_dim": HIDDEN // 2},
    "prism_hadamard_qwen35": {
        "num_experts": 0,
        "intermediate_size": 512,
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": f"model.layers.{layer}.mlp.{projection}",
                "block": block,
                "embedding": False,
                "dtype": "float16",
            }
            for layer in range(LAYERS)
            for projection, block in (("up_proj", 0), ("down_proj", 512))
        ],
    },
    "qwen3_5": {"num_experts": 0},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv7": _named("a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim", 16),
    "spark2_5": {"rope_parameters": ROPE_OF_KINDS},
    "step3p5": {
        "attention_other_setting": {"num_attention_heads": 2 * HEADS, "num_attention_groups": 2},
    },
}
# Types with a text_config, and the type in there; some have no other than their own.
TEXT = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    **{name: name for name in "gemma3n kimi_k3 llama4 minimax_m3_vl qwen3_5 qwen3_5_moe".split()},
    "prism_hadamard_qwen35": "prism_hadamard_qwen35",
}
UNBUILDABLE = {
    "bitnet": "its linear layers are Metal kernels, without a fallback",
    "muse_spark": "its norms, gates and routing are Metal kernels, without a fallback",
    "olmo": "importing it exits without the package ai2-olmo",
}
TYPES = sorted(
    path.stem
    for path in Path(mlx_lm.models.__path__[0]).glob("*.py")
    if "class ModelArgs" in path.read_text() and path.stem not in UNBUILDABLE
)


def config(name: str, **changes: Any) -> dict[str, Any]:
    """What config.json of a tiny checkpoint of this type would hold, with some changes."""

    def flat(name: str) -> dict[str, Any]:
        return {"model_type": name, **COMMON, **EXTRAS.get(name, {}), **changes}

    nested = {"text_config": flat(TEXT[name])} if name in TEXT else {}
    return copy.deepcopy({**flat(name), **nested})


def _random(p: mx.array) -> mx.array:
    if p.dtype == mx.uint32:  # packed
        return mx.random.randint(0, 2**32 - 1, p.shape, mx.uint32)
    noise = mx.random.normal(p.shape)
    if p.ndim < 2:  # a gain or a bias, or the log of a decay, which is not to forget too fast
        return mx.clip(p, -1, 1) + 0.1 * noise
    inputs = p.shape[-1] if p.shape[-1] > 1 else p.shape[-2]  # the latter: depthwise convolution
    return inputs**-0.5 * noise


def build(name: str, seed: int = 0, **changes: Any) -> Looped:
    """A model of this type, looping off, with random weights in float32."""
    _, args_class = model_classes(name)
    mx.random.seed(seed)
    model = looped_class(name)(args_class.from_dict(config(name, **changes)))
    if name == "phi3small":  # sets logits beyond the end of a small vocabulary
        model._dummy_tokenizer_ids = model._dummy_tokenizer_ids[:0]
    model.update(tree_map(_random, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model
