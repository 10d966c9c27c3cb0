"""What a loop costs: time per decoded token and peak memory, as ratios to mlx-lm.

    python benchmarks/decode.py                    a random dense model, about 1 GB in float32
    python benchmarks/decode.py --layout moe       a random mixture of experts; also: mla
    python benchmarks/decode.py --model demo       a checkpoint

Both models take the same tokens in turn in one process, so that a busy machine slows both alike;
a ratio is the median over pairs, with its 95 % interval. On Linux, put an OpenBLAS in LD_PRELOAD:
without one, float32 products are so slow that they hide everything else. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console
from rich.progress import track
from scipy.stats import quantile_test
from skills import markdown

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.method.loop import layer_passes
from mlx_loop.models import get_classes
from mlx_loop.models.looped import Looped

COMMON = {
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
}
LAYOUTS: dict[str, dict] = {
    "dense": COMMON
    | {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "moe": COMMON
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "mla": COMMON
    | {
        "model_type": "deepseek_v3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_key_value_heads": 16,
        "kv_lora_rank": 128,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
    },
}
SETTINGS = {
    "mlx-lm": None,  # the same model twice: what it differs from 1 is the error of a ratio
    "K = 1": LoopConfig(loops=1),
    "K = 3, first": LoopConfig(loops=3),
    "K = 3, last": LoopConfig(loops=3, cache="last"),
    "K = 3, own": LoopConfig(loops=3, cache="own"),
    "K = 3, block scope": LoopConfig(loops=3, scope="block"),
    "K = 3, layer scope": LoopConfig(loops=3, scope="layer"),
    "K = 8, first": LoopConfig(loops=8),
    "K = 2, rk4": LoopConfig(integrator="rk4", loops=2),
}
LIVE, FROZEN = (LoopConfig(loops=8, routing=routing) for routing in ("live", "frozen"))


def random_model(layout: dict) -> Looped:
    """A model with random weights."""
    model_class, args_class = get_classes(layout)
    model = model_class(args_class.from_dict(layout))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.02, model.parameters()))
    mx.eval(model.parameters())
    model.loop = LoopConfig()
    return model


def plain_model(looped: Looped) -> nn.Module:
    """mlx-lm's own model on the same arrays."""
    plain = type(looped).__bases__[1](looped.args)
    plain.update(looped.parameters())
    return plain


def decoder(model: Callable, prompt: mx.array) -> Callable[[], float]:
    """A function that decodes one more token and gives the seconds that it took."""
    cache = make_prompt_cache(model)
    token = mx.argmax(model(prompt, cache=cache)[:, -1:], axis=-1)
    mx.eval(token)

    def step() -> float:
        nonlocal token
        start = time.perf_counter()
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
        return time.perf_counter() - start

    return step


def median_ratio(
    model: Callable, base: Callable, prompt: mx.array, pairs: int
) -> tuple[float, float, float]:
    """Time of a token with `model` over that with `base`: median and its 95 % interval."""
    steps = [decoder(m, prompt) for m in (model, base)]
    for step in steps * 3:
        step()
    ratios = []
    for i in range(pairs):
        # Which one comes first alternates: the second one may find caches warm.
        times = {step: step() for step in (steps if i % 2 else steps[::-1])}
        ratios.append(times[steps[0]] / times[steps[1]])
    low, high = quantile_test(ratios, p=0.5).confidence_interval()
    return statistics.median(ratios), low, high


def peak_memory(model: Looped, prompt: mx.array) -> tuple[int, int]:
    """Peak bytes of a prefill and eight decoded tokens, and the bytes of the cache after them."""
    mx.clear_cache()
    cache = make_prompt_cache(model)
    mx.reset_peak_memory()
    token = mx.argmax(model(prompt, cache=cache)[:, -1:], axis=-1)
    for _ in range(8):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
    return mx.get_peak_memory(), sum(entry.nbytes for entry in cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="dense", help="of a random model")
    parser.add_argument("--model", help="a checkpoint instead of random weights")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=40, help="tokens measured with each model")
    args = parser.parse_args()

    if args.model is None:
        model = random_model(LAYOUTS[args.layout])
    else:
        model = mlx_loop.load_model(args.model)
    plain = plain_model(model)
    layers = len(model.layers)
    prompt = mx.random.randint(2, 400, (1, args.prompt_tokens), key=mx.random.key(0))
    base_peak, base_cache = peak_memory(model.with_loop(None), prompt)

    rows = []
    for name, settings in track(SETTINGS.items(), "measuring", console=Console(stderr=True)):
        looped = model.with_loop(settings)
        passes = layer_passes(looped.loop, layers)
        measured = plain_model(model) if settings is None else looped
        ratio, low, high = median_ratio(measured, plain, prompt, args.pairs)
        relative = passes / layers
        peak, cache = peak_memory(measured, prompt)
        rows.append(
            [
                name,
                str(passes),
                f"{relative:.3f}",
                f"{ratio:.3f}",
                f"{ratio / relative:.3f} [{low / relative:.3f}, {high / relative:.3f}]",
                f"{(peak - (cache - base_cache)) / base_peak - 1:+.2%}",
            ]
        )
    header = ["settings", "layer passes", "ratio of passes", "ratio of time", "factor"]
    print(f"{model.model_type}, {layers} layers, {args.pairs} pairs\n")
    print(markdown([*header, "peak memory"], rows))
    print("\nfactor: time over passes; peak memory: without own's histories; both against mlx-lm")
    if model.anatomy.mixes_experts:
        views = model.with_loop(FROZEN), model.with_loop(LIVE)
        ratio, low, high = median_ratio(*views, prompt, args.pairs)
        print(f"K = 8, frozen over live routing: {ratio:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
