"""`mlx_loop bench`: how fast a looped model is, beside the un-looped one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from statistics import fmean

from .. import options
from ..options import add, from_zero, positive

SUMMARY = "measure speed and memory, beside the model without a loop"
EXAMPLES = """examples:
  mlx_loop bench --loops 2,3,6 -p 512 -g 128
  mlx_loop bench --model mlx-community/Qwen3-4B-Instruct-2507-4bit -b 4 -n 3
Options are those of mlx_lm.benchmark. Prompts are random tokens; each setting
has its turn in each trial, and a ratio is to the un-looped model of the same
trial, with the lowest and highest."""


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    add(group, "--prompt-tokens -p", "length of the prompt", positive, "N", 512)
    add(group, "--generation-tokens -g", "length of the answer", positive, "N", 1024)
    add(group, "--batch-size -b", "prompts at a time", positive, "N", 1)
    add(group, "--num-trials -n", "trials that are timed", positive, "N", 5)
    add(group, "--delay", "seconds between two runs", from_zero, "S", 0)
    options.add_prefill_option(group)
    options.add_model_options(parser)
    options.add_loop_options(parser, several=True)


def run(args: argparse.Namespace) -> int:
    from ...measure.bench import Speed, bench
    from ...measure.names import names
    from ...measure.provenance import machine
    from ..measuring import load_views, table
    from ..terminal import err, extra_cost, out

    views, tokenizer = load_views(args, {})
    titles = names([view.loop for view in views])
    trials: list[list[Speed]] = []
    with err.status("running, the first time to warm up"):
        for number, speeds in enumerate(
            bench(
                views,
                tokenizer,
                args.prompt_tokens,
                args.generation_tokens,
                args.batch_size,
                args.num_trials,
                options.prefill_step_from(args),
                args.delay,
            ),
            1,
        ):
            trials.append(speeds)
            for title, speed in zip(titles, speeds, strict=True):
                said = ", ".join(f"{name}={value:.3f}" for name, value in vars(speed).items())
                err.print(f"Trial {number}, {title}:  {said}", style="dim", soft_wrap=True)
    header = ["setting", "cost", "prompt tokens/s", "ratio", "generated tokens/s", "ratio", "GB"]
    rows = []
    for view, title, mine in zip(views, titles, zip(*trials, strict=True), strict=True):
        row = [title, "" if view.is_unlooped else extra_cost(view)]
        for name in ("prompt_tps", "generation_tps"):
            values = [getattr(speed, name) for speed in mine]
            plain = [getattr(speeds[0], name) for speeds in trials]
            row += [f"{fmean(values):.1f}", "" if view.is_unlooped else _ratio(values, plain)]
        rows.append([*row, f"{max(speed.peak_memory for speed in mine):.3f}"])
    out.print(table(header, rows))
    out.print(
        f"{args.model}, {args.prompt_tokens} prompt tokens, {args.generation_tokens} generated, "
        f"batch {args.batch_size}, {args.num_trials} trial{'s' * (args.num_trials > 1)}; "
        f"mlx {version('mlx')}, {machine()}",
        style="dim",
    )
    return 0


def _ratio(values: Sequence[float], plain: Sequence[float]) -> str:
    ratios = [mine / theirs for mine, theirs in zip(values, plain, strict=True)]
    return f"{fmean(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
