"""What the guard saves and what it costs, on the demo checkpoints.

    python benchmarks/guard.py --model demo

Right answers to held-out questions with and without it, how often it fires, and the time of a
decoded token with a guard over that without one, measured in turn. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import replace

import mlx.core as mx
from decode import median_ratio
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlx_loop
from mlx_loop import Guard, LoopConfig
from mlx_loop.loading import DEMOS
from mlx_loop.significance import wilson
from mlx_loop.sweep import QUESTIONS, Task, read_task

SETTINGS = {
    "no loop": None,
    "naive, K = 8, block scope": LoopConfig(integrator="naive", loops=8, scope="block"),
    "naive, K = 8, layer scope": LoopConfig(integrator="naive", loops=8, scope="layer"),
    "the preset": LoopConfig(),
    "the preset, K = 8": LoopConfig(loops=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=DEMOS, default="demo", help="default %(default)s")
    parser.add_argument("--limit", type=int, default=96, help="questions, evenly spread")
    parser.add_argument("--pairs", type=int, default=100, help="tokens timed with and without")
    args = parser.parse_args()
    model, tokenizer = mlx_loop.load(args.model, dtype="float32")
    task = Task(read_task(QUESTIONS, args.limit), max_tokens=40, template={})
    machine = f"{os.cpu_count()}-core {platform.machine()}, {platform.system()}, float32"
    table = Table(
        "settings", "guard", "right, %", "fired", "time", title=f"{args.model}, {machine}"
    )
    prompt = mx.random.randint(2, 400, (1, 64), key=mx.random.key(0))
    for name, loop in track(SETTINGS.items(), description="answering", transient=True):
        for guard in (None, Guard()) if loop else (None,):
            view = model.with_loop(loop and replace(loop, guard=guard))
            right = 0
            for start in range(0, len(task.items), task.batch):
                batch = task.items[start : start + task.batch]
                found = next(task.rows([view], tokenizer, [batch]))
                right += sum(row["right"] for _, row in found)
            low, high = wilson(right, len(task.items))
            share, time = "", ""
            if guard is not None:
                fired, loops = view.take_firings()
                share = f"{fired / loops:.1%}"
                time = f"{median_ratio(view, model.with_loop(loop), prompt, args.pairs):.3f}"
            count = len(task.items)
            shown = f"{100 * right / count:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            table.add_row(name, str(guard or ""), shown, share, time)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
