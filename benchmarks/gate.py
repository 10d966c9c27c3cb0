"""What drafts and a gate are worth on a released model: when the un-looped one says the same.

    python benchmarks/gate.py FOLDER --loops 6 --horizon 1,2 --max-tokens 60 >> table.md
    python benchmarks/gate.py random --loops 6 --share 0.09

Each prompt is answered greedily by the looped model. At every token of the answer the un-looped
pass is made too, from the looped model's own keys and values: what a self-draft and a gate see.
`same` is the share of tokens where both rank the same token first, with its 95 % interval over
prompts; `drafted` what self-drafts that are right so often read, by the formula of
docs/speculative.md at 4 of 36 layers. For each limit of entropy, in nats: the share of tokens that
would loop, the layers that are read per token over those of the un-looped model, in this model and
at 4 of 36 layers, and the share of tokens that the gate changes: sure, and yet other than the
looped model's.

`random` measures time instead: of a random model as deep as Qwen3-4B, 1 GB in float32, whose limit
is set so that this share of its tokens loops. Times are of the processor, token by token in turn
with the un-looped model; put an OpenBLAS in LD_PRELOAD. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from decode import random_model
from mlx_lm.generate import generate_step
from rich.console import Console
from rich.progress import track
from speculative import DEEP, WINDOW

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.generation.prompt import render
from mlx_loop.measure.significance import bootstrap_mean
from mlx_loop.method.loop import layer_passes
from mlx_loop.models import halves
from mlx_loop.models.gate import entropy
from mlx_loop.models.looped import Looped

# Prompts of several kinds.
PROMPTS = (
    "Explain in simple words why the sky is blue.",
    "Write a Python function that checks whether a string is a palindrome.",
    "What is 17 times 6? Show how you get there.",
    "List five things to pack for a week in the mountains.",
    "Write the first lines of a story about a lighthouse keeper who is afraid of the sea.",
    "Translate into French: The train leaves at nine o'clock tomorrow morning.",
    "Summarise in one sentence: Bees collect nectar, carry it home and turn it into honey, which "
    "feeds the hive through the winter, when there are no flowers.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron, and why?",
    "Rewrite politely: Send me the report now.",
    "Write a SQL query that counts the orders of each customer in a table called orders.",
    "Anna is older than Ben. Ben is older than Carl. Who is the youngest?",
    "Name three causes of the French Revolution.",
)
LIMITS = (0.3, 1.0, 2.0, 3.0, 4.0)
TOKENS = 300  # that are timed


def watch(looped: Looped, prompt: list[int], stop: set[int], most: int) -> np.ndarray:
    """Of each token of the answer: whether the un-looped pass says the same, and its entropy."""
    cache, found = looped.new_cache(), []
    looped(mx.array([prompt[:-1]]), cache=cache)
    token = prompt[-1]
    while len(found) < most and token not in stop:
        tokens = mx.array([[token]])
        plain, natural = halves.plain(looped, tokens, cache)
        said = halves.looped(looped, tokens, cache, natural)
        token = int(mx.argmax(said[0, -1]))
        found.append((int(mx.argmax(plain[0, -1])) == token, float(entropy(plain[0, -1]))))
    return np.array(found)


def drafted(rate: float, loops: int) -> float:
    """Layers read per token, of the un-looped model's, at the best number of drafts up to 8."""
    layers, extra = 36, 4 * (loops - 1)
    return min(
        ((n + 1) * layers + extra) / layers / sum(rate**i for i in range(n + 1)) for n in range(9)
    )


def timing(loops: int, share: float) -> None:
    """Time of a gated token over that of an un-looped one, and of one that always loops."""
    model = random_model(DEEP)
    prompt = mx.random.randint(2, 400, (64,), key=mx.random.key(0))
    found = [
        float(entropy(logprobs))
        for _, (_, logprobs) in zip(range(TOKENS), decode(model, prompt), strict=False)
    ]
    limit = float(np.quantile(found, 1 - share))
    settings = {
        "un-looped": None,
        "all loop": LoopConfig(loops=loops, window=WINDOW),
        "gate": LoopConfig(loops=loops, window=WINDOW, gate=f"entropy:{limit!r}"),
    }
    views = {name: model.with_loop(loop) for name, loop in settings.items()}
    running = [decode(view, prompt) for view in views.values()]
    for steps in running:
        next(steps)
    views["gate"].take_share()
    times = np.array([[seconds(steps) for steps in running] for _ in range(TOKENS)])
    looped, tokens = views["gate"].take_share()
    drawn = np.random.default_rng(0).integers(TOKENS, size=(2000, TOKENS))
    means = times[drawn].mean(1)
    print(f"random, 36 layers, window {WINDOW}, K = {loops}; {TOKENS} tokens, float32\n")
    print("| tokens | time, of un-looped |\n| --- | --- |")
    for number, name in enumerate(views):
        low, high = np.quantile(means[:, number] / means[:, 0], [0.025, 0.975])
        ratio = times[:, number].mean() / times[:, 0].mean()
        shown = f"{name}, {looped / tokens:.1%} loop" if name == "gate" else name
        print(f"| {shown} | {ratio:.2f} [{low:.2f}, {high:.2f}] |")


def decode(model: Looped, prompt: mx.array) -> Iterator[tuple[int, mx.array]]:
    return generate_step(prompt, model, max_tokens=-1, prompt_cache=model.new_cache())


def seconds(steps: Iterator) -> float:
    start = time.process_time()
    next(steps)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a checkpoint, or random")
    parser.add_argument("--loops", type=int, default=6, metavar="K", help="default: 6")
    parser.add_argument("--horizon", default="1,2", metavar="T,T,...", help="default: 1,2")
    parser.add_argument("--max-tokens", type=int, default=60, metavar="N", help="default: 60")
    parser.add_argument("--share", type=float, default=0.09, help="random: default 0.09")
    args = parser.parse_args()
    if str(args.folder) == "random":
        timing(args.loops, args.share)
        return
    model, tokenizer = mlx_loop.load(args.folder, dtype="float32")
    machine = f"{os.cpu_count()}-core {platform.machine()} {platform.system()}, float32"
    for horizon in map(float, args.horizon.split(",")):
        looped = model.with_loop(LoopConfig(loops=args.loops, horizon=horizon))
        assert looped.loop is not None
        stop, answers = set(tokenizer.eos_token_ids), []
        title = f"{args.folder.name}, T = {horizon:g}"
        console = Console(stderr=True)
        for text in track(PROMPTS, title, console=console, transient=True):
            prompt = render(tokenizer, [{"role": "user", "content": text}])
            answers.append(watch(looped, prompt, stop, args.max_tokens))
        every = np.concatenate(answers)
        low, high = bootstrap_mean([answer[:, 0].mean() for answer in answers])
        layers, top = len(model.layers), looped.loop.layers[-1] + 1
        whole = layer_passes(looped.loop, layers) / layers
        print(f"\n`{args.folder.name}`, {looped.loop}; {len(every)} tokens, {machine}.")
        same = float(every[:, 0].mean())
        print(f"Same: {same:.3f} [{low:.3f}, {high:.3f}]; all loop: {whole:.3f}.")
        most, reads, least = (drafted(rate, args.loops) for rate in (low, same, high))
        print(f"Drafted: {reads:.2f} [{least:.2f}, {most:.2f}].\n")
        print("| limit | loops | reads | 4 of 36 | changed |\n| --- | --- | --- | --- | --- |")
        for limit in LIMITS:
            unsure = every[:, 1] >= limit
            share = float(unsure.mean())
            changed = float((~unsure & (every[:, 0] == 0)).mean())
            reads = 1 + share * (whole - 1 + (layers - top) / layers)
            wide = 1 + share * (4 * (args.loops - 1) + 36 - 19) / 36
            print(f"| {limit} | {share:.3f} | {reads:.3f} | {wide:.3f} | {changed:.3f} |")


if __name__ == "__main__":
    main()
