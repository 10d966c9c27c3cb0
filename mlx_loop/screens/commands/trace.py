"""`mlx_loop trace`: look inside a loop."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...foreign import path_of, to_json
from .. import options
from ..options import OF_ANSWERS, load_from, read_prompt, refuse, render_prompt

if TYPE_CHECKING:
    from rich.table import Table

    from ...measure.trace import Trace

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
    from ...measure.library import trace
    from ...measure.plots import check, save
    from ..terminal import busy, err, tell_of_length

    refuse(args, OF_ANSWERS, "in a trace, in which all tokens loop")
    if args.plot is not None:
        check(path_of(args.plot))
    prompt = read_prompt(args.prompt)
    with busy("loading", args.model):
        model, tokenizer = load_from(args)
    tokens = render_prompt(args, tokenizer, prompt)
    tell_of_length(model, len(tokens))
    with busy("tracing"):
        traced = trace(model, tokenizer, tokens)
    if args.json:
        print(to_json({"model": args.model, **traced.to_dict()}))
    else:
        show(traced, args.tokens)
    if args.plot is not None:
        files = save(path_of(args.plot), traced.draw)
        err.print(f"drawn in {files[0]} and, for dark pages, {files[1]}")
    return 0


# --- Tables ---


def show(traced: Trace, tokens: bool) -> None:
    """The medians over tokens for each pass, the verdict, and if wanted a line for each token."""
    from rich.text import Text

    from ..measuring import table
    from ..terminal import describe, out

    out.print(f"loop {describe(traced.loop)}, {len(traced.tokens)} tokens", style="dim")
    for loop in traced.loops:
        passes = loop.table()
        out.print(f"{loop.where}, medians over tokens", style="italic")
        out.print(table(passes.header, passes.rows))
    if tokens:
        out.print(_tokens(traced))
    if any(p.experts_changed is not None for loop in traced.loops for p in loop.passes):
        out.print("experts: as if routing were live", style="dim")
    for loop in traced.loops:
        where = f"{loop.where}: " if len(traced.loops) > 1 else ""
        colour = COLOURS.get(loop.verdict, "dim")
        out.print(Text.assemble(where, (loop.verdict, colour), f": {loop.reason}"))
    if len(traced.loops) > 1:
        colour = COLOURS.get(traced.verdict, "dim")
        out.print(Text.assemble("in all ", (traced.verdict, colour)))


def _tokens(traced: Trace) -> Table:
    from rich.table import Table
    from rich.text import Text

    from ...measure.trace import short

    last = traced.loops[-1]
    table = Table(title="tokens, as they leave the window", title_justify="left", box=None)
    table.add_column("token", overflow="fold", max_width=24)
    for name in ("growth", "norm", "cosine", "lens KL"):
        table.add_column(name, justify="right")
    for i, text in enumerate(traced.texts):
        table.add_row(
            Text(repr(text)),
            short(max(loop.growth[i] for loop in traced.loops)),
            short(last.result.norm[i]),
            short(last.result.cosine[i]),
            short(last.result.lens_kl[i]),
        )
    return table
