"""Does looping amplify quantisation error, and does a window of 8 bits repair it?

    python benchmarks/quantisation.py --limit 20 > quantisation.md

For each demo checkpoint, recipe and K: bits per weight; cosine of the window's states to those of
the full-precision model with the same K; Kullback-Leibler divergence of the output; answers right.
Weights are quantised by MLX and written back in float32, which has the numbers of the quantised
model and runs at the speed of float32. An answer is right if each of its tokens is the likeliest
one, given the ones before: one pass over question and answer. All intervals are 95 %: Wilson's for
a share, the bootstrap's for means, ratios and paired differences. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model
from rich.console import Console
from rich.progress import track
from scipy.stats import bootstrap
from skills import change, markdown, read_questions, share

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.checkpoints.loading import DEMOS, open_checkpoint, quantization_for
from mlx_loop.checkpoints.memory import bits_per_weight
from mlx_loop.checkpoints.quantise import Quantization, choose, evaluate, pieces
from mlx_loop.models.looped import Looped

LOOPS = (1, 3, 6)
BATCH = 32
CALIBRATION = 24  # questions for `budget`; none of those that are scored.


def recipes(path: Any) -> dict[str, Quantization]:
    """What is compared; `budget` may spend what 3 bits with a window of 8 cost."""
    model = open_checkpoint(path)
    window = Quantization(3, recipe="window8")
    spent = round(bits_per_weight(model, choose(model, window)), 3)
    return {
        "4 bits": Quantization(4),
        "4 bits, window8": Quantization(4, recipe="window8"),
        "3 bits": Quantization(3),
        "3 bits, window8": window,
        "budget": Quantization(recipe="budget", bits_per_weight=spent),
    }


def quantised(
    path: Any, quantization: Quantization | None, tokens: mx.array
) -> tuple[Looped, float]:
    """The model in float32, as it is or with quantised weights, and its bits per weight."""
    model = open_checkpoint(path)
    bits = 16.0
    if quantization is not None:
        chosen = quantization_for(model, quantization, tokens)
        bits = bits_per_weight(model, chosen)
        evaluate(pieces(model, chosen))
        model = dequantize_model(model)
    model.set_dtype(mx.float32)
    model.eval()
    return model, bits


def encode(tokenizer: TokenizerWrapper, question: dict) -> tuple[list[int], int]:
    """Question and answer as tokens, and where the answer begins."""
    prompt = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True)
    answer = tokenizer.encode(question["answer"], add_special_tokens=False)
    end = [] if question["skill"] == "fallback" else [tokenizer.eos_token_id]
    return prompt + answer + end, len(prompt)


def run(model: Looped, texts: Sequence[tuple[list[int], int]]) -> list[dict[str, np.ndarray]]:
    """For each text: log-probabilities at its answer (tokens, vocab), tokens, and states."""
    results: list[dict[str, np.ndarray]] = [{} for _ in texts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    for first in range(0, len(order), BATCH):
        group = order[first : first + BATCH]
        longest = max(len(texts[i][0]) for i in group)
        # Padding on the right is seen by nothing that counts.
        rows = [texts[i][0] + [0] * (longest - len(texts[i][0])) for i in group]
        states: list[mx.array] = []
        with_states = recorded(model, states)
        log_p = nn.log_softmax(with_states(mx.array(rows)).astype(mx.float32))
        mx.eval(log_p, states)
        for row, i in enumerate(group):
            tokens, start = texts[i]
            results[i] = {
                "log_p": np.array(log_p[row, start - 1 : len(tokens) - 1]),
                "tokens": np.array(tokens[start:]),
                "states": np.stack([np.array(s[row, : len(tokens)]) for s in states]),
            }
    return results


def recorded(model: Looped, states: list[mx.array]) -> Looped:
    """A view of the model whose window layers append what they return to a list."""

    def watched(layer: nn.Module) -> nn.Module:
        class Recorded(type(layer)):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
                states.append(super().__call__(*args, **kwargs))
                return states[-1]

        twin = copy.copy(layer)
        twin.__class__ = Recorded
        return twin

    view = copy.copy(model)
    view.model = copy.copy(model.model)
    view.model.layers = [
        watched(layer) if i in model.loop.layers else layer
        for i, layer in enumerate(model.model.layers)
    ]
    return view


def compare(found: list[dict], full: list[dict]) -> dict[str, np.ndarray]:
    """Per text: cosine of states, KL(full || found) in nats per token, whether it is right."""
    cosines, divergences, right = [], [], []
    for a, b in zip(found, full, strict=True):
        x, y = a["states"], b["states"]
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        cosines.append(float(((x * y).sum(-1) / norms).mean()))
        p, q = b["log_p"], a["log_p"]
        divergences.append(float((np.exp(p) * (p - q)).sum(-1).mean()))
        right.append(float((a["log_p"].argmax(-1) == a["tokens"]).all()))
    return {"cosine": np.array(cosines), "kl": np.array(divergences), "right": np.array(right)}


def mean(values: np.ndarray) -> str:
    low, high = interval((values,), np.mean)
    return f"{values.mean():.4f} [{low:.4f}, {high:.4f}]"


def ratio(looped: np.ndarray, plain: np.ndarray) -> str:
    def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis=axis) / b.mean(axis=axis)

    low, high = interval((looped, plain), statistic)
    return f"{looped.mean() / plain.mean():.2f} [{low:.2f}, {high:.2f}]"


def interval(samples: tuple[np.ndarray, ...], statistic: Any) -> tuple[float, float]:
    result = bootstrap(
        samples, statistic, paired=len(samples) > 1, n_resamples=2000, method="percentile", rng=0
    )
    return result.confidence_interval.low, result.confidence_interval.high


def study(name: str, limit: int) -> None:
    """Print the tables of one checkpoint."""
    path = DEMOS[name]
    _, tokenizer = mlx_loop.load(name)
    questions = read_questions(limit)
    skills = np.array([question["skill"] for question in questions])
    texts = [encode(tokenizer, question) for question in questions]
    held = [q for q in read_questions(10**6) if q not in questions]
    chosen = held[:: max(1, len(held) // CALIBRATION)][:CALIBRATION]
    text = [token for question in chosen for token in encode(tokenizer, question)[0]]
    calibration = mx.array(text[: len(text) // 128 * 128]).reshape(-1, 128)[:1]

    full: dict[int, list[dict]] = {}
    found: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    sizes: dict[str, float] = {}
    candidates = {"full": None, **recipes(path)}
    for recipe, quantization in track(
        candidates.items(), description=name, console=Console(stderr=True)
    ):
        model, sizes[recipe] = quantised(path, quantization, calibration)
        for k in LOOPS:
            results = run(model.with_loop(LoopConfig(loops=k)), texts)
            if recipe == "full":
                full[k] = results
            found[recipe, k] = compare(results, full[k])
        del model
        mx.clear_cache()

    rows = []
    for (recipe, k), result in found.items():
        row = [recipe, f"{sizes[recipe]:.2f}", str(k)]
        if recipe == "full":
            row += ["1", "0", "", share(result["right"]), ""]
        else:
            plain = found[recipe, 1]["kl"]
            row += [
                f"{result['cosine'].mean():.5f}",
                mean(result["kl"]),
                "" if k == 1 else ratio(result["kl"], plain),
                share(result["right"]),
                change(result["right"], found["full", k]["right"]),
            ]
        rows.append(row)
    loop = open_checkpoint(path, LoopConfig(loops=3)).loop
    print(f"\n### {name}\n\n{len(questions)} questions. The preset at K = 3: {loop}.\n")
    header = ["recipe", "bits", "K", "cosine", "KL, nats per token", "KL / KL at K = 1"]
    print(markdown([*header, "right, %", "against full, points"], rows))
    shown = {r: f"{r}, K = 3" for r in candidates}
    print("\nBy skill, % right, K = 3:\n")
    by_skill = [
        [skill, *(share(found[recipe, 3]["right"][skills == skill]) for recipe in shown)]
        for skill in dict.fromkeys(skills.tolist())
    ]
    print(markdown(["skill", *shown], by_skill), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=DEMOS, nargs="*", default=list(DEMOS))
    parser.add_argument("--limit", type=int, default=20, help="questions of each skill")
    args = parser.parse_args()
    print(
        f"{args.limit} held-out questions of each skill, {os.cpu_count()}-core "
        f"{platform.machine()} {platform.system()}, CPU backend, float32.",
        flush=True,
    )
    for name in args.model:
        study(name, args.limit)


if __name__ == "__main__":
    main()
