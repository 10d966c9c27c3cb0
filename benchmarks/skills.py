"""Does looping help or hurt the demo model? Accuracy on its held-out questions, with intervals.

    python benchmarks/skills.py --limit 300 > table.md

Greedy answers in float32, scored by exact match. The same questions for every setting; the last
column is the paired difference to the un-looped model over all questions, with a 95 % bootstrap
interval.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import batch_generate
from rich.console import Console
from rich.progress import Progress

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.loop import Looped, layer_passes

QUESTIONS = Path(mlx_loop.__file__).parent / "demo" / "questions.jsonl"

SETTINGS: dict[str, LoopConfig | None] = {"un-looped": None}
SETTINGS |= {f"naive, K = {k}": LoopConfig(integrator="naive", loops=k) for k in (2, 4, 8)}
SETTINGS |= {f"euler, K = {k}": LoopConfig(integrator="euler", loops=k) for k in (2, 4, 8)}
SETTINGS |= {f"anchored, K = {k}": LoopConfig(loops=k) for k in (2, 3, 4, 8, 12)}
SETTINGS |= {
    "anchored, K = 3, layer scope": LoopConfig(loops=3, scope="layer"),
    "anchored, K = 3, cache last": LoopConfig(loops=3, cache="last"),
    "anchored, K = 3, cache own": LoopConfig(loops=3, cache="own"),
    "rk4, K = 2": LoopConfig(integrator="rk4", loops=2),
}


def read_questions(limit: int) -> list[dict]:
    """The first `limit` questions of each skill."""
    by_skill = defaultdict(list)
    for line in QUESTIONS.read_text().splitlines():
        question = json.loads(line)
        by_skill[question["skill"]].append(question)
    return [question for group in by_skill.values() for question in group[:limit]]


def scores(
    model: Looped, tokenizer: mlx_loop.load, questions: list[dict], batch: int = 64
) -> np.ndarray:
    """1 for each question that is answered exactly, else 0."""
    prompts = [
        tokenizer.apply_chat_template(q["messages"], add_generation_prompt=True) for q in questions
    ]
    # Prompts of like length together: little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    right = np.zeros(len(prompts))
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        answers = batch_generate(model, tokenizer, [prompts[i] for i in group], max_tokens=40)
        for i, text in zip(group, answers.texts, strict=True):
            right[i] = text.strip() == questions[i]["answer"]
        mx.clear_cache()
    return right


def wilson(right: np.ndarray) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    n, p, z = len(right), right.mean(), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def paired_difference(right: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Mean difference and its 95 % bootstrap interval over questions."""
    difference = right - base
    draws = np.random.default_rng(0).integers(0, len(difference), (10_000, len(difference)))
    low, high = np.percentile(difference[draws].mean(axis=1), [2.5, 97.5])
    return difference.mean(), low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=300, help="questions of each skill")
    args = parser.parse_args()
    questions = read_questions(args.limit)
    skills = np.array([q["skill"] for q in questions])
    names = list(dict.fromkeys(skills.tolist()))
    model, tokenizer = mlx_loop.load("demo", dtype="float32")
    layers = len(model.layers)

    results = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("answering", total=len(SETTINGS))
        for name, settings in SETTINGS.items():
            results[name] = scores(model.with_loop(settings), tokenizer, questions)
            progress.advance(task)

    base = results["un-looped"]
    print(f"{len(questions)} questions, {platform.machine()} {platform.system()}, float32\n")
    print("| settings | layer passes |" + "".join(f" {name} |" for name in names) + " difference |")
    print("|---|---|" + "---|" * (len(names) + 1))
    for name, right in results.items():
        loop = model.with_loop(SETTINGS[name]).loop
        cells = []
        for skill in names:
            part = right[skills == skill]
            low, high = wilson(part)
            cells.append(f"{part.mean():.1%} [{low:.1%}, {high:.1%}]".replace("%", ""))
        mean, low, high = paired_difference(right, base)
        change = (
            ""
            if name == "un-looped"
            else f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
        print(f"| {name} | {layer_passes(loop, layers)} | {' | '.join(cells)} | {change} |")


if __name__ == "__main__":
    main()
