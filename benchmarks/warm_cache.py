"""How much an answer depends on whether its prompt was processed at once or turn by turn.

    python benchmarks/warm_cache.py --model demo

A conversation of four of the demo's questions, in many orders. Its last answer from a cache that
grew turn by turn (warm), and from a prompt that was processed whole (cold): the largest difference
in log-probability of the first token, and how often the greedy answers differ. The un-looped model
shows what rounding does.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.generation.conversation import Conversation
from mlx_loop.measure.tasks.questions import QUESTIONS, read_questions

TURNS = 4
SETTINGS = {
    "un-looped": None,
    "own": LoopConfig(loops=4, cache="own"),
    "first": LoopConfig(loops=4, cache="first"),
    "last": LoopConfig(loops=4, cache="last"),
}


def answer(talk: Conversation, text: str) -> list[GenerationResponse]:
    return list(talk.reply(text, max_tokens=24))


def difference(model: Any, tokenizer: Any, texts: list[str]) -> tuple[float, bool]:
    """Of the last turn: in log-probability, and whether the answer is another one."""
    warm = Conversation(model, tokenizer)
    for text in texts[:-1]:
        answer(warm, text)
    cold = Conversation(model, tokenizer, messages=list(warm.messages))
    a, b = answer(warm, texts[-1]), answer(cold, texts[-1])
    p, q = (r[0].logprobs.astype(mx.float32) for r in (a, b))
    likely = mx.exp(q) > 1e-3
    largest = mx.max(mx.where(likely, mx.abs(p - q), 0)).item()
    return float(largest), [r.token for r in a] != [r.token for r in b]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="default %(default)s")
    parser.add_argument("--talks", type=int, default=60, help="conversations")
    args = parser.parse_args()
    model, tokenizer = mlx_loop.load(args.model, dtype="float32")
    questions = [q["messages"][-1]["content"] for q in read_questions(Path(QUESTIONS), None)]
    rng = random.Random(0)
    talks = [rng.sample(questions, TURNS) for _ in range(args.talks)]
    machine = f"{os.cpu_count()}-core {platform.machine()}, {platform.system()}, float32"
    table = Table("keys and values", "log-probability, largest", "other answers", title=machine)
    for name, loop in SETTINGS.items():
        view = model.with_loop(loop)
        found = [
            difference(view, tokenizer, texts)
            for texts in track(talks, name, console=Console(stderr=True), transient=True)
        ]
        others = sum(is_other for _, is_other in found)
        table.add_row(name, f"{max(d for d, _ in found):.4f}", f"{others} of {len(found)}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
