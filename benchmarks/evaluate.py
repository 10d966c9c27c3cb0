"""Do many settings in one evaluation cost more than each by itself?

    python benchmarks/evaluate.py --model demo --length 384 --repeats 5

Six settings and the un-looped model answer the same RULER problems, once together and once each in
a run of its own; both in turn, several times, in one process.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.generation.batch import answer_batch
from mlx_loop.generation.prompt import render
from mlx_loop.measure.comparison import distinct
from mlx_loop.measure.tasks import ruler

LOOPS = (2, 3, 4, 6, 8, 12)
TASK = "niah_multikey_1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=DEMOS, default="demo", help="default %(default)s")
    parser.add_argument("--length", type=int, default=384, help="tokens (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="problems (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    args = parser.parse_args()
    model, tokenizer = mlx_loop.load(args.model, dtype="float32")
    sources = ruler.Sources()

    def tokens(prompt: str) -> list[int]:
        return render(tokenizer, [{"role": "user", "content": prompt}])

    def size(prompt: str, prefix: str) -> int:
        return len(tokens(prompt))

    problems = [
        ruler.example(TASK, args.length, i, size, sources).prompt for i in range(args.batch)
    ]
    prompts = [tokens(problem) for problem in problems]
    views = distinct(model, [LoopConfig(loops=k) for k in LOOPS])
    ends, limit = set(tokenizer.eos_token_ids), ruler.TASKS[TASK].max_tokens

    def seconds(some: list) -> float:
        start = time.perf_counter()
        list(answer_batch(some, prompts, ends, limit))
        return time.perf_counter() - start

    seconds(views)
    ratios = []
    for _ in range(args.repeats):
        together = seconds(views)
        ratios.append(together / sum(seconds([view]) for view in views))
    print(
        f"`{args.model}`, {len(LOOPS)} settings and the un-looped model, {args.batch} problems of "
        f"{args.length} tokens, {os.cpu_count()}-core {platform.machine()} {platform.system()}: "
        f"together over the sum of each alone {statistics.median(ratios):.2f} "
        f"(median of {args.repeats}, {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
