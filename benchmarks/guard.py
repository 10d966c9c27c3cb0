"""What the guard saves and what it costs, on the demo checkpoints.

    python benchmarks/guard.py --model demo

Held-out questions are right if greedy decoding gives the answer. How often the guard fires is
counted over all tokens, of questions and answers, and over the loops of each. The time is that of
a decoded token with a guard over that without one, measured in turn. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import replace

import mlx.core as mx
from decode import median_ratio
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlx_loop
from mlx_loop import Guard, LoopConfig
from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.measure.significance import wilson
from mlx_loop.measure.tasks.questions import QUESTIONS, is_right, read_questions
from mlx_loop.models.looped import Looped

SETTINGS = {
    "no loop": None,
    "naive, K = 8, block scope": LoopConfig(integrator="naive", loops=8, scope="block"),
    "naive, K = 8, layer scope": LoopConfig(integrator="naive", loops=8, scope="layer"),
    "the preset": LoopConfig(),
    "the preset, K = 8": LoopConfig(loops=8),
}


def answers_right(view: Looped, tokenizer: TokenizerWrapper, question: dict) -> bool:
    """Whether greedy decoding gives the answer and nothing else."""
    prompt = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True)
    length = len(tokenizer.encode(question["answer"])) + 2
    text = mlx_loop.generate(view, tokenizer, prompt, max_tokens=length)
    return is_right(question, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=DEMOS, default="demo", help="default %(default)s")
    parser.add_argument("--limit", type=int, default=120, help="questions, evenly spread")
    parser.add_argument("--pairs", type=int, default=60, help="tokens timed with and without")
    args = parser.parse_args()
    model, tokenizer = mlx_loop.load(args.model, dtype="float32")
    questions = [q for q in read_questions(QUESTIONS, args.limit) if q["skill"] != "fallback"]
    machine = f"{os.cpu_count()}-core {platform.machine()}, {platform.system()}, float32"
    table = Table(
        "settings",
        "guard",
        "right, %",
        "fired",
        "time",
        title=f"{args.model}, {len(questions)} questions, {machine}",
    )
    prompt = mx.random.randint(2, 400, (1, 64), key=mx.random.key(0))
    for name, loop in track(SETTINGS.items(), description="measuring", transient=True):
        for guard in (None, Guard()) if loop else (None,):
            view = model.with_loop(loop and replace(loop, guard=guard))
            right = sum(answers_right(view, tokenizer, question) for question in questions)
            low, high = wilson(right, len(questions))
            share, time = "", ""
            if guard is not None:
                fired, loops = view.take_firings()
                share = f"{fired / loops:.1%}"
                time = f"{median_ratio(view, model.with_loop(loop), prompt, args.pairs)[0]:.3f}"
            shown = f"{100 * right / len(questions):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            table.add_row(name, str(guard or ""), shown, share, time)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
