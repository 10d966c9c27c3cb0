"""Does a trace foretell what a setting does to answers?

    mlx_loop sweep --model MODEL --task choices:FILE --loops 2,6 ... --out FILE.jsonl
    python benchmarks/foretell.py MODEL choices:FILE FILE.jsonl --traces 40 --plot foretell.png

Each setting of the sweep is traced on some of its questions. Printed are Spearman's correlations
of the trace's measures (docs/trace.md) with the damage, which is the loss of log-probability of
the right choice among the choices: over the settings, whose damage is the mean over all questions,
and over the traced questions under one setting, averaged over the settings. Intervals are 95 %, of
the bootstrap over questions. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.stats import rankdata

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.measure import plots
from mlx_loop.measure.drift import MEASURES, measures
from mlx_loop.measure.results import key, read_rows
from mlx_loop.measure.tasks import read_tasks, split_names
from mlx_loop.measure.trace import trace

SCORE = "log_p_among"
DRAWS = 2000


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, along the last axis."""
    ranks = [rankdata(x, axis=-1) for x in (a, b)]
    a, b = (x - x.mean(-1, keepdims=True) for x in ranks)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def interval(values: list[float]) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"[{low:+.2f}, {high:+.2f}]"


def draw(found: np.ndarray, known: np.ndarray, pyplot):
    size = {"figsize": (11, 3.6), "layout": "constrained"}
    figure, axes = pyplot.subplots(1, len(MEASURES), sharey=True, **size)
    for number, (axis, label) in enumerate(zip(axes, MEASURES.values(), strict=True)):
        axis.scatter(found[..., number].mean(1), known)
        axis.set_xlabel(label, fontsize=8)
        axis.axhline(0, linewidth=0.8)
    axes[0].set_ylabel("damage, nats")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("task", help="as `mlx_loop sweep --task choices:FILE` had it")
    parser.add_argument("results", type=Path, help="what the sweep wrote")
    parser.add_argument("--traces", type=int, default=40, metavar="N", help="default: 40 questions")
    parser.add_argument("--plot", type=Path, help="where to draw it")
    args = parser.parse_args()
    if args.plot:
        plots.check(args.plot)
    model, tokenizer = mlx_loop.load(args.model, dtype="float32")
    task = read_tasks(split_names(args.task), tokenizer, None)
    score = {(key(row["loop"]), row["item"]): row[SCORE] for row in read_rows(args.results, SCORE)}
    loops = {name: None for name, _ in score}
    settings = [name for name in loops if name != "null"]
    items = [i for i in task.items if all((name, i["item"]) in score for name in loops)]
    if not items:
        raise SystemExit(f"{args.results} has no results of {args.task}, as it is written here")
    step = max(1, len(items) // args.traces)
    traced = slice(0, step * args.traces, step)
    views = [model.with_loop(LoopConfig.from_dict(json.loads(name))) for name in settings]
    found = np.array(
        [
            [list(measures(trace(view, item["prompt"])).values()) for item in items[traced]]
            for view in track(views, "tracing", console=Console(stderr=True), transient=True)
        ]
    )
    plain, looped = (
        np.array([[score[name, item["item"]] for item in items] for name in names])
        for names in (["null"], settings)
    )
    damage = plain - looped
    rng = np.random.default_rng(0)
    asked, drawn = (
        rng.integers(number, size=(DRAWS, number)) for number in (len(items), found.shape[1])
    )
    known = damage.mean(1)
    maybe = [damage[:, d].mean(1) for d in asked]
    print(f"{args.model}, {len(settings)} settings, {len(items)} questions, ", end="")
    print(f"{found.shape[1]} of them traced\n")
    print("| measure | over settings | over questions, under one setting |\n| --- | --- | --- |")
    for number, label in enumerate(MEASURES.values()):
        one, hurt = found[..., number], damage[:, traced]
        over = correlation(one.mean(1), known)
        drawn_over = [
            float(correlation(one[:, d].mean(1), m)) for d, m in zip(drawn, maybe, strict=True)
        ]
        within = correlation(one, hurt).mean()
        drawn_within = [float(correlation(one[:, d], hurt[:, d]).mean()) for d in drawn]
        cells = f"{over:+.2f} {interval(drawn_over)}", f"{within:+.2f} {interval(drawn_within)}"
        print("|", label, "|", " | ".join(cells), "|")
    if args.plot:
        plots.save(args.plot, lambda pyplot: draw(found, known, pyplot))


if __name__ == "__main__":
    main()
