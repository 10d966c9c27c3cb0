"""What drafting saves: acceptance, layer reads and time, and that no token changes.

    python benchmarks/speculative.py acceptance --model demo   every K and n, real acceptance
    python benchmarks/speculative.py drafts --model demo       self, lookup and a small model
    python benchmarks/speculative.py lossless --model demo     10 000 greedy tokens, all compared
    python benchmarks/speculative.py time --rate 0.98          a random model as deep as Qwen3-4B

Tables are Markdown; progress goes to standard error. Times are of the processor, so that other
programs do not count, and compared are things measured in turn in one process. Put an OpenBLAS in
LD_PRELOAD and set OPENBLAS_NUM_THREADS=1: without it float32 products are so slow that they hide
everything else, and batched and single ones round alike, which they do nowhere else.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
from decode import LAYOUTS, random_model
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.progress import track

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.generation.sampling import Sampler
from mlx_loop.generation.speculative import (
    Drafter,
    LookupDraft,
    ModelDraft,
    Pace,
    SelfDraft,
    expected_tokens,
    round_passes,
    speculative_generate_step,
)
from mlx_loop.measure.tasks.questions import QUESTIONS
from mlx_loop.method.loop import layer_passes
from mlx_loop.models import halves
from mlx_loop.models.looped import Looped

LIMIT = 64  # tokens of an answer
# Qwen3-4B, and the random model of `time`.
DEEP = LAYOUTS["dense"] | {
    "num_hidden_layers": 36,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
WINDOW = (15, 19)


class Fixed(Pace):
    """Always the same number of drafts."""

    def __init__(self, length: int):
        super().__init__(0, 1, length)

    def length(self, room: int) -> int:
        return min(self._most, room)


@dataclass
class Count:
    """What answers took, and what became of the drafts."""

    tokens: int = 0
    kept: int = 0
    rejected: int = 0
    layers: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Of the drafts whose predecessors were right, the share that was right."""
        return self.kept / max(self.kept + self.rejected, 1)


@contextmanager
def counted_layers(model: Looped) -> Iterator[list[int]]:
    """A list whose one number is how often a layer has been run."""
    layer, runs = type(model.layers[0]), [0]
    run = layer.__call__

    def counted(self, *args, **kwargs):
        runs[0] += 1
        return run(self, *args, **kwargs)

    layer.__call__ = counted
    try:
        yield runs
    finally:
        layer.__call__ = run


def prompts(tokenizer: TokenizerWrapper, each: int, skill: str | None = None) -> list[list[int]]:
    """The first questions of one of the demo's skills, or of all with a longer answer besides."""
    by_skill = defaultdict(list)
    for line in QUESTIONS.read_text().splitlines():
        question = json.loads(line)
        by_skill[question["skill"]].append(question["messages"])
    skills = by_skill if skill is None else [skill]
    chosen = [talk for name in skills for talk in by_skill[name][:each]]
    if skill is None:
        chosen.append([{"role": "user", "content": "Tell me a story."}])
    return [tokenizer.apply_chat_template(talk, add_generation_prompt=True) for talk in chosen]


def prefilled(model: Looped, prompt: Sequence[int]) -> list:
    """A cache that holds the prompt but for its last token."""
    cache = model.new_cache()
    model(mx.array([prompt[:-1]]), cache=cache)
    mx.eval([entry.state for entry in cache])
    return cache


def speculate(
    model: Looped,
    drafter: Drafter,
    prompt: Sequence[int],
    cache: list,
    stop: set[int],
    count: Count,
    pace: Pace | None = None,
) -> list[int]:
    """The answer to a prompt. Whole rounds are counted, also where it ends in one's middle."""
    answer: list[int] = []
    start, proposed = time.process_time(), 0
    steps = speculative_generate_step(
        prompt[-1:],
        model,
        drafter,
        prompt_cache=copy.deepcopy(cache),
        context=prompt[:-1],
        max_tokens=-1,
        pace=pace,
    )
    for token, _, from_draft in steps:
        answer.append(token)
        if from_draft:
            proposed += 1
            continue
        count.kept += proposed
        count.rejected += pace is not None and proposed < pace.length(LIMIT)
        proposed = 0
        if len(answer) >= LIMIT or stop & set(answer):
            break
    count.seconds += time.process_time() - start
    count.tokens += len(answer)
    steps.close()
    return answer


def plainly(model: Looped, prompt: Sequence[int], cache: list, stop: set[int]) -> list[int]:
    """The answer to a prompt by mlx-lm's own generator."""
    answer: list[int] = []
    steps = generate_step(
        mx.array(prompt[-1:]), model, max_tokens=LIMIT, prompt_cache=copy.deepcopy(cache)
    )
    for token, _ in steps:
        answer.append(token)
        if token in stop:
            break
    return answer


def header(columns: Sequence[str]) -> None:
    row(*columns)
    row(*["---:"] * len(columns))


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def per_token(count: Count) -> float:
    return count.seconds / count.tokens


def acceptance(args: argparse.Namespace) -> None:
    model, tokenizer = mlx_loop.load(args.model, dtype="float32")
    stop, asked = set(tokenizer.eos_token_ids), prompts(tokenizer, args.each)
    plain, layers = model.with_loop(None), len(model.layers)
    example = model.with_loop(LoopConfig(loops=6, scope=args.scope)).loop
    print(f"{args.model}, {example} and other K alike; {layers} layers; {len(asked)} prompts\n")
    columns = ["K", "n", "acceptance", "reads per token", "by the formula", "36 layers, of 36"]
    header([*columns, "time, of un-looped", "time, of looped"])
    for loops in args.loops:
        looped = model.with_loop(LoopConfig(loops=loops, scope=args.scope))
        base, alone = Count(), Count()
        counts = {n: Count() for n in args.lengths}
        for prompt in track(asked, f"K = {loops}", console=ERR, transient=True):
            # Without drafts by the same generator: of a small model its own time is a good part.
            cache = prefilled(plain, prompt)
            speculate(plain, SelfDraft(), prompt, cache, stop, base, Fixed(0))
            cache = prefilled(looped, prompt)
            speculate(looped, SelfDraft(), prompt, cache, stop, alone, Fixed(0))
            expected = plainly(looped, prompt, cache, stop)
            for n, count in counts.items():
                with counted_layers(model) as runs:
                    answer = speculate(looped, SelfDraft(), prompt, cache, stop, count, Fixed(n))
                count.layers += runs[0]
                assert answer[: len(expected)] == expected
        ratio = per_token(alone) / per_token(base)
        reads = layer_passes(looped.loop, layers)
        row(loops, "none", "", f"{reads:.2f}", "", f"{1 + (loops - 1) / 9:.3f}", f"{ratio:.2f}", "")
        for n, count in counts.items():
            yields = expected_tokens(count.rate, n)
            row(
                loops,
                n,
                f"{count.rate:.3f}",
                f"{count.layers / count.tokens:.2f}",
                f"{round_passes(looped, n) / yields:.2f}",
                f"{(n * 36 + 36 + 4 * (loops - 1)) / yields / 36:.3f}",
                f"{per_token(count) / per_token(base):.2f}",
                f"{per_token(count) / per_token(alone):.2f}",
            )


def drafts(args: argparse.Namespace) -> None:
    model, tokenizer = mlx_loop.load(args.model, dtype="float32")
    looped = model.with_loop(LoopConfig(loops=6))
    stop, asked = set(tokenizer.eos_token_ids), prompts(tokenizer, args.each, args.skill)
    small = mlx_loop.load_model(args.draft_model, dtype="float32", loop=None)
    counts: dict[str, Count] = defaultdict(Count)
    for prompt in track(asked, "drafting", console=ERR, transient=True):
        cache = prefilled(looped, prompt)
        expected = plainly(looped, prompt, cache, stop)
        for name, drafter, pace in (
            ("none", SelfDraft(), Fixed(0)),
            ("self", SelfDraft(), None),
            ("lookup", LookupDraft(), None),
            (f"{args.draft_model}, un-looped", ModelDraft(small), None),
        ):
            answer = speculate(looped, drafter, prompt, cache, stop, counts[name], pace)
            assert answer[: len(expected)] == expected
    base = counts["none"]
    print(f"{args.model}, {looped.loop}; {base.tokens} tokens; the number of drafts adapts\n")
    header(["draft", "tokens from drafts", "tokens per round", "time, of looped"])
    for name, c in counts.items():
        rounds = c.tokens - c.kept
        share, length = f"{c.kept / c.tokens:.2f}", f"{c.tokens / rounds:.2f}"
        row(name, share, length, f"{per_token(c) / per_token(base):.2f}")


def lossless(args: argparse.Namespace) -> None:
    model, tokenizer = mlx_loop.load(args.model, dtype=args.dtype)
    stop, asked = set(tokenizer.eos_token_ids), prompts(tokenizer, 300)
    # One of each skill in turn.
    order = [prompt for i in range(300) for prompt in asked[i::300]]
    settings = [
        LoopConfig(loops=3, scope="block"),
        LoopConfig(loops=3, scope="layer", cache="own"),
    ]
    print(f"{args.model}, {args.dtype}\n")
    header(["settings", "tokens", "answers", "differences", "ties", "gap of logits / rounding"])
    for loop in settings:
        looped, count, answers, differences = model.with_loop(loop), Count(), 0, []
        for prompt in track(order, "comparing", console=ERR, transient=True):
            if count.tokens >= args.tokens / len(settings):
                break
            answers += 1
            cache = prefilled(looped, prompt)
            expected = plainly(looped, prompt, cache, stop)
            count.tokens += len(expected)
            found = speculate(looped, SelfDraft(), prompt, cache, stop, Count())[: len(expected)]
            if found != expected:
                same = next(
                    i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b
                )
                differences.append(tie(looped, [*prompt, *expected[:same]], len(prompt)))
        ties = sum(gap <= 2 * error for gap, error in differences)
        worst = ", ".join(f"{gap:.1e} / {error:.1e}" for gap, error in differences[:4])
        row(looped.loop, count.tokens, answers, len(differences), ties, worst)


def tie(model: Looped, text: Sequence[int], start: int) -> tuple[float, float]:
    """Where answers part: the gap between the two likeliest tokens, and how far rounding goes.

    Rounding is the largest difference of a logit between the last eight tokens fed one by one and
    checked together. A gap of up to twice that is a tie: either token may come out first.
    """
    logits = []
    for together in (False, True):
        cache = model.new_cache()
        split = max(len(text) - 8, start - 1)
        model(mx.array([text[: start - 1]]), cache=cache)
        for token in text[start - 1 : split]:
            model(mx.array([[token]]), cache=cache)
        rest = mx.array([text[split:]])
        if together and rest.shape[1] > 1:
            out = halves.looped(model, rest, cache, halves.enter(model, rest, cache))
        else:
            out = [model(rest[:, i : i + 1], cache=cache) for i in range(rest.shape[1])][-1]
        logits.append(out[0, -1].astype(mx.float32))
    best = mx.sort(logits[0])
    return (best[-1] - best[-2]).item(), mx.max(mx.abs(logits[0] - logits[1])).item()


class SetRate(Sampler):
    """Keeps each draft with the same probability, whatever it is."""

    def __init__(self, rate: float):
        object.__setattr__(self, "temp", 0.0)
        object.__setattr__(self, "rate", rate)

    def verify(self, logprobs, drafted, draft_logits):
        kept = mx.random.uniform(shape=drafted.shape) < self.rate
        count = mx.cumprod(kept.astype(mx.int32)).sum()
        return count, mx.argmax(logprobs, axis=-1)[count]


def rounds(model: Looped, prompt: Sequence[int], length: int, rate: float) -> Callable[[], float]:
    """A function that decodes one more round of so many drafts and gives its seconds."""
    steps = speculative_generate_step(
        prompt,
        model,
        SelfDraft(),
        prompt_cache=model.new_cache(),
        max_tokens=-1,
        sampler=SetRate(rate),
        pace=Fixed(length),
    )

    def step() -> float:
        start = time.process_time()
        # A round ends with a token that was not drafted.
        while next(steps)[2]:
            pass
        return time.process_time() - start

    return step


def timing(args: argparse.Namespace) -> None:
    model = random_model(DEEP)
    prompt = mx.random.randint(2, 400, (64,), key=mx.random.key(0)).tolist()
    size = sum(p.nbytes for _, p in tree_flatten(model.parameters())) / 1e9
    print(f"random, float32, {size:.1f} GB, 36 layers, window {WINDOW}, acceptance {args.rate}\n")
    header(["K", "n", "reads, of un-looped", "time, of un-looped", "time, of looped"])
    for loops in args.loops:
        looped = model.with_loop(LoopConfig(loops=loops, window=WINDOW))
        measured = [rounds(m, prompt, 0, args.rate) for m in (model.with_loop(None), looped)]
        measured += [rounds(looped, prompt, n, args.rate) for n in args.lengths]
        for step in measured:
            step()
        repeats = track(range(args.repeats), f"K = {loops}", console=ERR, transient=True)
        times = [[step() for step in measured] for _ in repeats]
        base, alone, *drafted = map(statistics.median, zip(*times, strict=True))
        row(loops, "none", f"{layer_passes(looped.loop, 36) / 36:.3f}", f"{alone / base:.2f}", "")
        for n, seconds in zip(args.lengths, drafted, strict=True):
            tokens = expected_tokens(args.rate, n)
            reads = round_passes(looped, n) / tokens / 36
            time_of = seconds / tokens
            row(loops, n, f"{reads:.3f}", f"{time_of / base:.2f}", f"{time_of / alone:.2f}")


ERR = Console(stderr=True)
PARTS = {"acceptance": acceptance, "drafts": drafts, "lossless": lossless, "time": timing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default="demo", help="a checkpoint that talks as the demos do")
    parser.add_argument("--scope", choices=("block", "layer"), help="default: as preset")
    parser.add_argument("--draft-model", default="demo", help="drafts: another checkpoint")
    parser.add_argument("--skill", help="drafts: prompts of this skill only, such as repeat")
    parser.add_argument("--each", type=int, default=3, help="prompts of each skill")
    parser.add_argument("--tokens", type=int, default=10_000, help="lossless: tokens to compare")
    parser.add_argument("--dtype", default="float32", help="lossless: of the model")
    parser.add_argument("--rate", type=float, default=0.98, help="time: the acceptance that is set")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 3, 6, 8], metavar="K")
    parser.add_argument("--lengths", type=int, nargs="+", default=range(1, 9), metavar="n")
    parser.add_argument("--repeats", type=int, default=7, help="time: rounds of each kind")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
