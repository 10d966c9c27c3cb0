"""`mlx_loop compare`: what several loop settings make of a prompt, side by side."""

from __future__ import annotations

import argparse
from functools import partial

from ...errors import INTERRUPTED, UserError
from .. import options
from ..fields import parse_config
from ..options import read_prompt

SUMMARY = "see what several loop settings make of a prompt, side by side"
EXAMPLES = """examples:
  mlx_loop compare                                  interactive: no loop, 2, 3 and 6 loops
  mlx_loop compare --integrator naive,euler,anchored --loops 4
  mlx_loop compare --setting "loops=3 cache=own" --setting "loops=2 integrator=rk4"
  mlx_loop compare --prompt "What is 12 + 30?" --loops 1,3,6 --json
The un-looped model is always among them.
In the session, /help lists what can be changed."""

DEFAULT_LOOPS = [2, 3, 6]


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_prompt_options(parser, "answer this and leave; - reads standard input")
    what = 'one more setting to compare, as "loops=6 beta=0.3"; may be given several times'
    options.add(parser, "--setting", what, str, "FIELDS", action="append")
    options.add(parser, "--json", "print one JSON object per prompt")
    options.add_model_options(parser)
    options.add_loop_options(parser, several=True)
    options.add_sampling_options(parser, max_tokens=256)
    options.add_prefill_option(parser)
    options.add_draft_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..compare_session import Asked, Compare
    from ..terminal import busy, is_interactive

    axes = options.axes_from(args)
    extra = [parse_config(text) for text in args.setting or []]
    if args.json and args.prompt is None and is_interactive():
        raise UserError('--json needs a prompt: give --prompt "..." or pipe some in')
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    if not axes and not extra:
        axes = {"loops": DEFAULT_LOOPS}
    with busy("loading", args.model):
        model, tokenizer, start = options.load_with_start(args)
        asked = Asked(
            max_tokens=args.max_tokens,
            sampler=options.sampler_from(args, tokenizer),
            seed=args.seed,
            prefill_step_size=options.prefill_step_from(args),
            **options.draft_from(args, tokenizer),
        )
    session = Compare(
        args.model,
        model,
        tokenizer,
        partial(options.render_prompt, args, tokenizer),
        asked,
        args.draft,
        start,
        axes,
        extra,
        args.json,
    )
    if prompt is None:
        return session.serve()
    return 0 if session.answer(prompt) else INTERRUPTED
