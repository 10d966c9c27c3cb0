"""What loops, by model type: the table in docs/models.md, from the code.

    python scripts/models_table.py > docs/models.md

Every type is built with tiny random weights (tests/zoo.py) and asked. tests/test_every_type.py
checks that the table says what is true.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.tuner.utils import linear_to_lora_layers
from rich.console import Console
from rich.progress import track

from mlx_loop import LoopConfig, UserError
from mlx_loop.checkpoints.quantise import parameters
from mlx_loop.generation.prompt import reads_quantised_cache
from mlx_loop.generation.speculative import check_drafts
from mlx_loop.models.looped import Looped
from mlx_loop.upstream import REMAPPING, model_types

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo import UNBUILDABLE, build

# A repository of each type that people run; most of mlx-lm's quantised ones are named after these.
EXAMPLES = {
    "Klear": "Kwai-Klear/Klear-46B-A2.5B-Instruct",
    "afmoe": "arcee-ai/Trinity-Mini",
    "apertus": "swiss-ai/Apertus-8B-Instruct-2509",
    "baichuan_m1": "baichuan-inc/Baichuan-M1-14B-Instruct",
    "bailing_moe": "inclusionAI/Ling-lite-1.5",
    "bailing_moe_linear": "inclusionAI/Ring-mini-linear-2.0",
    "bitnet": "microsoft/bitnet-b1.58-2B-4T",
    "cohere": "CohereForAI/c4ai-command-r-v01",
    "cohere2": "CohereForAI/c4ai-command-r7b-12-2024",
    "dbrx": "databricks/dbrx-instruct",
    "deepseek": "deepseek-ai/deepseek-moe-16b-chat",
    "deepseek_v2": "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "deepseek_v3": "moonshotai/Moonlight-16B-A3B-Instruct",
    "deepseek_v32": "deepseek-ai/DeepSeek-V3.2",
    "dots1": "rednote-hilab/dots.llm1.inst",
    "ernie4_5": "baidu/ERNIE-4.5-0.3B-PT",
    "ernie4_5_moe": "baidu/ERNIE-4.5-21B-A3B-PT",
    "exaone": "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct",
    "exaone4": "LGAI-EXAONE/EXAONE-4.0-1.2B",
    "falcon_h1": "tiiuae/Falcon-H1-1.5B-Instruct",
    "gemma": "google/gemma-2b-it",
    "gemma2": "google/gemma-2-2b-it",
    "gemma3": "google/gemma-3-4b-it",
    "gemma3_text": "google/gemma-3-270m-it",
    "gemma3n": "google/gemma-3n-E2B-it",
    "glm": "THUDM/glm-4-9b-chat-hf",
    "glm4": "THUDM/GLM-4-9B-0414",
    "glm4_moe": "zai-org/GLM-4.5-Air",
    "gpt2": "openai-community/gpt2",
    "gpt_bigcode": "bigcode/starcoderbase-1b",
    "gpt_neox": "EleutherAI/pythia-1b",
    "gpt_oss": "openai/gpt-oss-20b",
    "granite": "ibm-granite/granite-3.3-2b-instruct",
    "granitemoe": "ibm-granite/granite-3.1-1b-a400m-instruct",
    "granitemoehybrid": "ibm-granite/granite-4.0-h-tiny",
    "helium": "kyutai/helium-1-2b",
    "hunyuan": "tencent/Hunyuan-A13B-Instruct",
    "hunyuan_v1_dense": "tencent/Hunyuan-1.8B-Instruct",
    "internlm2": "internlm/internlm2_5-7b-chat",
    "internlm3": "internlm/internlm3-8b-instruct",
    "jamba": "ai21labs/AI21-Jamba-Reasoning-3B",
    "kimi_linear": "moonshotai/Kimi-Linear-48B-A3B-Instruct",
    "kimi_vl": "moonshotai/Kimi-VL-A3B-Instruct",
    "lfm2": "LiquidAI/LFM2-1.2B",
    "lfm2-vl": "LiquidAI/LFM2-VL-1.6B",
    "lfm2_moe": "LiquidAI/LFM2-8B-A1B",
    "lille-130m": "Nikity/lille-130m-instruct",
    "llama": "meta-llama/Llama-3.2-3B-Instruct",
    "llama4": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "llama4_text": "facebook/MobileLLM-R1-950M",
    "longcat_flash": "meituan-longcat/LongCat-Flash-Chat",
    "mamba": "state-spaces/mamba-1.4b-hf",
    "mamba2": "mistralai/Mamba-Codestral-7B-v0.1",
    "mimo": "XiaomiMiMo/MiMo-7B-RL",
    "mimo_v2_flash": "XiaomiMiMo/MiMo-V2-Flash",
    "minicpm": "openbmb/MiniCPM-2B-dpo-bf16",
    "minicpm3": "openbmb/MiniCPM3-4B",
    "minimax": "MiniMaxAI/MiniMax-M2",
    "ministral3": "mistralai/Ministral-3-3B-Instruct-2512",
    "mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "nanochat": "karpathy/nanochat-d32",
    "nemotron": "nvidia/Minitron-4B-Base",
    "nemotron-nas": "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
    "nemotron_h": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "olmo": "allenai/OLMo-1B",
    "olmo2": "allenai/OLMo-2-0425-1B-Instruct",
    "olmo3": "allenai/Olmo-3-7B-Instruct",
    "olmoe": "allenai/OLMoE-1B-7B-0125-Instruct",
    "openelm": "apple/OpenELM-1_1B-Instruct",
    "phi": "microsoft/phi-2",
    "phi3": "microsoft/Phi-4-mini-instruct",
    "phi3small": "microsoft/Phi-3-small-8k-instruct",
    "phimoe": "microsoft/Phi-3.5-MoE-instruct",
    "phixtral": "mlabonne/phixtral-2x2_8",
    "pixtral": "mistral-community/pixtral-12b",
    "plamo": "pfnet/plamo-13b-instruct",
    "plamo2": "pfnet/plamo-2-1b",
    "qwen": "Qwen/Qwen-7B-Chat",
    "qwen2": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2_moe": "Qwen/Qwen1.5-MoE-A2.7B-Chat",
    "qwen2_vl": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen3": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3_5": "Qwen/Qwen3.5-4B",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "qwen3_next": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3_vl_moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "recurrent_gemma": "google/recurrentgemma-2b-it",
    "rwkv7": "fla-hub/rwkv7-1.5B-world",
    "seed_oss": "ByteDance-Seed/Seed-OSS-36B-Instruct",
    "smollm3": "HuggingFaceTB/SmolLM3-3B",
    "solar_open": "upstage/Solar-Open-100B",
    "stablelm": "stabilityai/stablelm-2-zephyr-1_6b",
    "starcoder2": "bigcode/starcoder2-3b",
    "step3p5": "stepfun-ai/Step-3.5-Flash",
    "youtu_llm": "tencent/Youtu-LLM-2B",
}

COLUMNS = ("type", "example", "loops", "frozen routing", "`own`", "drafts", "kv bits", "adapters")
HEAD = """# What loops

Every text model that mlx-lm runs, by the `model_type` in its config.json. `scripts/models_table.py`
makes this table: it builds each type with tiny random weights and asks the code. The tests check it
and, for each type, what a loop computes against an independent formulation
(tests/test_every_type.py). The repositories are examples; they have not been loaded here.

- **frozen routing**: the later passes of a loop re-use the experts of the natural one.
- **`own`**: the key/value policy under which a text gives the same logits however it is fed.
- **drafts**: `--draft` works. It needs a cache that can be cut back, which sliding windows and
  recurrent state are not; a model of a type that says yes may still have sliding windows.
- **kv bits**: `--kv-bits` quantises keys and values.
- **adapters**: LoRA adapters in mlx-lm's format.

"""


def yes(works: bool) -> str:
    return "yes" if works else "-"


def row(name: str) -> list[str]:
    """What is true of a model type, by `COLUMNS`."""
    example = EXAMPLES.get(name, "")
    if name in UNBUILDABLE:
        return [name, example, f"not tried: {UNBUILDABLE[name]}", *["-"] * 5]
    model = build(name)
    try:
        model.with_loop(LoopConfig(window=(2, 6), loops=2))
    except UserError as error:
        reason = str(error).partition(": ")[2]
        return [name, example, f"no: {reason}", "-", "-", "-", *plainly(model)]
    own = model.with_loop(LoopConfig(window=(2, 6), loops=2, cache="own"))
    works = bool(mx.all(mx.isfinite(own(mx.array([[1, 2, 3]]), cache=own.new_cache()))))
    frozen = yes(model.anatomy.mixes_experts)
    return [name, example, "yes", frozen, yes(works), yes(drafts(name)), *plainly(model)]


def drafts(name: str) -> bool:
    """Whether drafts can be checked, if need be in a model of this type without sliding windows."""
    for changes in ({}, {"sliding_window": None, "layer_types": None}):
        try:
            model = build(name, **changes).with_loop(LoopConfig(window=(2, 6), loops=2))
            check_drafts(model, model.new_cache())
        except (TypeError, ValueError, AttributeError):  # A type that needs them.
            continue
        return True
    return False


def plainly(model: Looped) -> list[str]:
    """What is true of mlx-lm's own model too; it is used up."""
    kv_bits = reads_quantised_cache(model)
    text = mx.array([[1, 2, 3]])
    before = model(text)
    try:
        linear_to_lora_layers(model, len(model.layers), {"rank": 2, "scale": 10.0, "dropout": 0.0})
        low_rank = {n: x + 0.1 for n, x in parameters(model).items() if n.endswith("lora_b")}
        model.load_weights(list(low_rank.items()), strict=False)
        adapted = not mx.allclose(model(text), before)
    except (AttributeError, TypeError, ValueError):
        adapted = False
    return [yes(kv_bits), yes(adapted)]


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    rows = [
        line(row(name))
        for name in track(model_types(), "types", console=Console(stderr=True), transient=True)
    ]
    names = ", ".join(f"`{name}` as `{to}`" for name, to in sorted(REMAPPING.items()))
    table = [line(list(COLUMNS)), "|---" * len(COLUMNS) + "|", *rows]
    print(HEAD + "\n".join(table) + f"\n\nmlx-lm runs some types as others: {names}.")


if __name__ == "__main__":
    main()
