"""Does looping help or hurt a demo model? Accuracy on its held-out questions, with intervals.

    python benchmarks/skills.py --model demo --limit 300 --plot skills.png > skills.md

Greedy answers in float32. The same questions for every setting, so that each is compared with the
un-looped model question by question. All intervals are 95 %: Wilson's for a share, the bootstrap's
for a paired difference. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections import defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import batch_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.stats import binomtest, bootstrap

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.measure.tasks.questions import QUESTIONS, is_right
from mlx_loop.method.loop import layer_passes
from mlx_loop.models.looped import Looped

LOOPS = (2, 4, 8)
CURVES = ("naive", "euler", "anchored")  # integrators of the plot
BY_SKILL = ("un-looped", *(f"{integrator}, K = 4" for integrator in CURVES))


def settings_for(model: Looped) -> dict[str, LoopConfig | None]:
    """What is compared, by name; fields left out are the preset's."""
    settings: dict[str, LoopConfig | None] = {"un-looped": None}
    for integrator in CURVES:
        for k in LOOPS:
            settings[f"{integrator}, K = {k}"] = LoopConfig(integrator=integrator, loops=k)
    other = "layer" if not model.anatomy.mixes_experts else "block"
    settings |= {
        "rk4, K = 2": LoopConfig(integrator="rk4", loops=2),
        f"anchored, K = 4, {other} scope": LoopConfig(loops=4, scope=other),
        "anchored, K = 4, cache last": LoopConfig(loops=4, cache="last"),
        "anchored, K = 4, cache own": LoopConfig(loops=4, cache="own"),
    }
    if model.anatomy.mixes_experts:
        settings["anchored, K = 4, live routing"] = LoopConfig(loops=4, routing="live")
        settings["naive, K = 4, live routing"] = LoopConfig(
            integrator="naive", loops=4, routing="live"
        )
    return settings


def read_questions(limit: int) -> list[dict]:
    """The first `limit` questions of each skill."""
    by_skill = defaultdict(list)
    for line in QUESTIONS.read_text().splitlines():
        question = json.loads(line)
        by_skill[question["skill"]].append(question)
    return [question for group in by_skill.values() for question in group[:limit]]


def scores(
    model: Looped, tokenizer: TokenizerWrapper, questions: list[dict], batch: int = 64
) -> np.ndarray:
    """1 for each question that is answered right, else 0."""
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
            right[i] = is_right(questions[i], text)
        mx.clear_cache()
    return right


def share(right: np.ndarray) -> str:
    """Per cent right with Wilson's interval."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return f"{100 * right.mean():.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def change(right: np.ndarray, base: np.ndarray) -> str:
    """Points gained or lost against `base`, with the interval of the paired bootstrap."""
    difference = right - base
    if not difference.any():
        return "+0.0"
    interval = bootstrap(
        (difference,), np.mean, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, results: dict[str, np.ndarray], title: str) -> None:
    """Accuracy over loop counts, a curve for each integrator."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), dpi=120)
    for integrator in CURVES:
        rights = [results["un-looped"], *(results[f"{integrator}, K = {k}"] for k in LOOPS)]
        tests = [binomtest(int(r.sum()), len(r)).proportion_ci(method="wilson") for r in rights]
        means = [100 * r.mean() for r in rights]
        low = [m - 100 * t.low for m, t in zip(means, tests, strict=True)]
        high = [100 * t.high - m for m, t in zip(means, tests, strict=True)]
        axes.errorbar((1, *LOOPS), means, (low, high), label=integrator, capsize=3, marker="o")
    axes.set(xlabel="loops K", ylabel="right answers, %", ylim=(0, 101), title=title)
    axes.set_xticks((1, *LOOPS))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=DEMOS, default="demo", help="default %(default)s")
    parser.add_argument("--limit", type=int, default=300, help="questions of each skill")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy over loop counts")
    args = parser.parse_args()
    questions = read_questions(args.limit)
    skills = np.array([question["skill"] for question in questions])
    model, tokenizer = mlx_loop.load(args.model, dtype="float32")
    settings = settings_for(model)

    results = {}
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name in progress.track(settings):
            results[name] = scores(model.with_loop(settings[name]), tokenizer, questions)

    base, layers = results["un-looped"], len(model.layers)
    overall, by_skill = [], []
    for name, right in results.items():
        passes = layer_passes(model.with_loop(settings[name]).loop, layers)
        difference = "" if name == "un-looped" else change(right, base)
        overall.append([name, f"{passes / layers:.2f}", share(right), difference])
    names = list(dict.fromkeys(skills.tolist()))
    for skill in names:
        by_skill.append([skill, *(share(results[name][skills == skill]) for name in BY_SKILL)])
    preset = model.loop
    print(
        f"`{args.model}`, {len(questions)} held-out questions, {os.cpu_count()}-core "
        f"{platform.machine()} {platform.system()}, float32. The preset: {preset}.\n"
    )
    print(markdown(["settings", "passes", "right, %", "against un-looped, points"], overall))
    print("\nBy skill, % right:\n")
    print(markdown(["skill", *BY_SKILL], by_skill))
    if args.plot:
        draw(args.plot, results, f"{args.model}: {len(questions)} held-out questions")


if __name__ == "__main__":
    main()
