"""What comparing five settings costs, against answering with each of them alone.

    python benchmarks/compare.py --model demo

Both are done in turn in one process; a ratio is the median over rounds. The answers are
identical. The measures under the answers (KL, agreement) take one more reading of the un-looped
answer for each setting, which nobody needs alone; they are timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.measure.comparison import compare, distinct
from mlx_loop.models.looped import Looped

SETTINGS = [LoopConfig(loops=k) for k in (2, 3, 4, 6)]
STORY = "Tell me a story."
PROMPTS = {"short prompt, long answer": (STORY, 64), "long prompt, 2 tokens": (STORY * 100, 2)}


def alone(views: Sequence[Looped], tokenizer, prompt: list[int], max_tokens: int) -> float:
    """Seconds for the answers one after the other."""
    start = time.perf_counter()
    for view in views:
        mlx_loop.generate(view, tokenizer, prompt, max_tokens=max_tokens)
    return time.perf_counter() - start


def together(
    views: Sequence[Looped], tokenizer, prompt: list[int], max_tokens: int
) -> tuple[float, float]:
    """Seconds for the answers at once, and for the measures after them."""
    start = ended = time.perf_counter()
    for answers in compare(views, tokenizer, prompt, max_tokens=max_tokens):
        if answers[0].measures is None:
            ended = time.perf_counter()
    return ended - start, time.perf_counter() - ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model, tokenizer = mlx_loop.load(args.model)
    views = distinct(model, SETTINGS)
    table = Table(
        "prompt",
        "tokens",
        "together / alone",
        "measures / alone",
        title=f"{args.model}, 5 settings",
    )
    for name, (text, max_tokens) in PROMPTS.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        job = (views, tokenizer, prompt, max_tokens)
        alone(*job), together(*job)
        ratios = []
        for _ in track(range(args.rounds), description="measuring", transient=True):
            own, (both, measures) = alone(*job), together(*job)
            ratios.append((both / own, measures / own))
        medians = [f"{statistics.median(column):.3f}" for column in zip(*ratios, strict=True)]
        table.add_row(name, str(len(prompt)), *medians)
    Console().print(table)


if __name__ == "__main__":
    main()
