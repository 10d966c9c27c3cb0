"""`mlx_loop trace`: look inside a loop."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...foreign import path_of, to_json
from .. import options
from ..options import OF_ANSWERS, load_from, read_prompt, refuse, render_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from rich.table import Table

    from ...measure.trace import Loop, State, Trace

SUMMARY = "look inside a loop: does it converge, drift or diverge?"
EXAMPLES = """examples:
  mlx_loop trace --prompt "What is 12 + 30?"
  mlx_loop trace --prompt "What is 12 + 30?" --integrator naive --loops 8 --plot trace.png
  mlx_loop trace --prompt - --tokens < question.txt
docs/trace.md says what each number means."""


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_prompt_options(parser)
    options.add(parser, "--tokens", "show a line for each token too")
    options.add(parser, "--json", "print all numbers as JSON")
    options.add_plot(parser)
    options.add_template_options(parser)
    options.add_model_options(parser)
    options.add_loop_options(parser)


COLOURS = {"converging": "green", "drifting": "yellow", "diverging": "red"}


def run(args: argparse.Namespace) -> int:
    from ...measure.plots import check, save
    from ...measure.trace import trace
    from ..terminal import busy, err

    refuse(args, OF_ANSWERS, "in a trace, in which all tokens loop")
    if args.plot is not None:
        check(path_of(args.plot))
    prompt = read_prompt(args.prompt)
    with busy("loading", args.model):
        model, tokenizer = load_from(args)
    with busy("tracing"):
        traced = trace(model, render_prompt(args, tokenizer, prompt))
    if args.json:
        print(to_json(report(args.model, traced, tokenizer)))
    else:
        show(traced, tokenizer, args.tokens)
    if args.plot is not None:
        files = save(path_of(args.plot), lambda pyplot: draw(pyplot, traced))
        err.print(f"drawn in {files[0]} and, for dark pages, {files[1]}")
    return 0


def report(name: str, traced: Trace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """All numbers as JSON; what is not a number is null."""
    loops = [
        {
            "layers": loop.layers,
            "verdict": loop.verdict,
            "reason": loop.reason,
            **asdict(loop),
        }
        for loop in traced.loops
    ]
    return {
        "model": name,
        "loop": traced.loop.to_dict(),
        "tokens": [tokenizer.decode([token]) for token in traced.tokens],
        "verdict": traced.verdict,
        "loops": _jsonable(loops),
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- Tables ---


def show(traced: Trace, tokenizer: TokenizerWrapper, tokens: bool) -> None:
    """The means over tokens for each pass, the verdict, and if wanted a line for each token."""
    from rich.text import Text

    from ..terminal import describe, out

    out.print(f"loop {describe(traced.loop)}, {len(traced.tokens)} tokens", style="dim")
    for loop in traced.loops:
        out.print(_passes(loop))
    if tokens:
        out.print(_tokens(traced, tokenizer))
    if any(p.experts_changed is not None for loop in traced.loops for p in loop.passes):
        out.print("experts: as if routing were live", style="dim")
    for loop in traced.loops:
        where = f"{_where(loop)}: " if len(traced.loops) > 1 else ""
        colour = COLOURS.get(loop.verdict, "dim")
        out.print(Text.assemble(where, (loop.verdict, colour), f": {loop.reason}"))
    if len(traced.loops) > 1:
        colour = COLOURS.get(traced.verdict, "dim")
        out.print(Text.assemble("in all ", (traced.verdict, colour)))


def _where(loop: Loop) -> str:
    first, last = loop.layers[0], loop.layers[-1]
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _passes(loop: Loop) -> Table:
    from rich.table import Table

    from ...measure.trace import mean

    experts = loop.passes[0].experts_changed is not None
    table = Table(title=f"{_where(loop)}, means over tokens", title_justify="left", box=None)
    for name in ("pass", "residual", "contraction", "norm", "cosine", "lens KL"):
        table.add_column(name, justify="right")
    if experts:
        table.add_column("experts changed", justify="right")
    for number, one in enumerate(loop.passes, start=1):
        cells = [str(number), _number(mean(one.residual)), _number(mean(one.contraction))]
        cells += _state(one.before)
        if one.experts_changed is not None:
            cells.append(f"{one.experts_changed:.0%}")
        table.add_row(*cells)
    table.add_row("result", "", "", *_state(loop.result))
    return table


def _tokens(traced: Trace, tokenizer: TokenizerWrapper) -> Table:
    from rich.table import Table
    from rich.text import Text

    last = traced.loops[-1]
    table = Table(title="tokens, as they leave the window", title_justify="left", box=None)
    table.add_column("token", overflow="fold", max_width=24)
    for name in ("growth", "norm", "cosine", "lens KL"):
        table.add_column(name, justify="right")
    for i, token in enumerate(traced.tokens):
        table.add_row(
            Text(repr(tokenizer.decode([token]))),
            _number(max(loop.growth[i] for loop in traced.loops)),
            _number(last.result.norm[i]),
            _number(last.result.cosine[i]),
            _number(last.result.lens_kl[i]),
        )
    return table


def _state(state: State) -> list[str]:
    from ...measure.trace import mean

    return [_number(mean(values)) for values in (state.norm, state.cosine, state.lens_kl)]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


# --- Picture ---


def draw(pyplot: Any, traced: Trace) -> Any:
    """Residual, contraction, norm and lens KL over the passes: the median token, and of a
    single loop the middle 80 %.
    """
    figure, axes = pyplot.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
    panels = {
        "residual |g(x) - x| / |x|": lambda loop: [p.residual for p in loop.passes],
        "contraction |g(x) - g(x')| / |x - x'|": lambda loop: [p.contraction for p in loop.passes],
        "norm of the state / natural pass": lambda loop: [s.norm for s in _states(loop)],
        "KL of the logit lens to the natural pass": lambda loop: [s.lens_kl for s in _states(loop)],
    }
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
        for loop in traced.loops:
            _line(axis, values(loop), _where(loop), len(traced.loops) == 1)
        passes = len(traced.loops[0].passes)
        axis.set_title(title)
        axis.set_xticks(range(1, passes + 2), [*map(str, range(1, passes + 1)), "result"])
        axis.set_xlim(0.8, passes + 1.2)
    for axis in (axes[0, 1], axes[1, 0]):
        axis.axhline(1, linewidth=0.8, linestyle="--", color=pyplot.rcParams["text.color"])
    for axis in axes[1]:
        axis.set_xlabel("before pass")
    if len(traced.loops) > 1:
        axes[0, 0].legend(frameon=False)
    figure.suptitle(f"{traced.loop}: {traced.verdict}, {len(traced.tokens)} tokens")
    return figure


def _states(loop: Loop) -> list[State]:
    return [*(one.before for one in loop.passes), loop.result]


def _line(axis: Any, values: Sequence[Sequence[float]], label: str, band: bool) -> None:
    numbers, bands = [], []
    for number, tokens in enumerate(values, start=1):
        known = [value for value in tokens if math.isfinite(value)]
        if known:
            low, *_, high = statistics.quantiles(known, n=10) if len(known) > 1 else known * 2
            numbers.append(number)
            bands.append((low, statistics.median(known), high))
    if numbers:
        lows, medians, highs = zip(*bands, strict=True)
        (line,) = axis.plot(numbers, medians, marker="o", markersize=4, label=label)
        if band:
            axis.fill_between(numbers, lows, highs, alpha=0.2, color=line.get_color(), linewidth=0)
