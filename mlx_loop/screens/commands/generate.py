"""`mlx_loop generate`: answer one prompt."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ... import several
from ...errors import INTERRUPTED, UserError
from ...foreign import to_json
from .. import options
from ..options import (
    DRAFTS,
    begun_answer,
    generation_from,
    load_from,
    read_prompt,
    refuse,
    render_prompt,
)

if TYPE_CHECKING:
    from ...models.looped import Looped
    from ..terminal import Streamed

SUMMARY = "answer one prompt"
EXAMPLES = """examples:
  mlx_loop generate --prompt "What is 12 + 30?"
  echo "What is 12 + 30?" | mlx_loop generate --loops 6 --json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_prompt_options(parser)
    what = "the first words of the answer, from where the model goes on; they are not printed"
    options.add(parser, "--prefill-response", what, str, "TEXT")
    options.add(parser, "--json", "print one JSON object")
    what = "go on from what `mlx_loop cache_prompt` saved"
    options.add(parser, "--prompt-cache-file", what, str, "FILE")
    options.add_model_options(parser, pipeline=True)
    options.add_loop_options(parser)
    options.add_sampling_options(parser, max_tokens=256)
    options.add_answer_options(parser)
    options.add_cache_options(parser)
    options.add_draft_options(parser)


def run(args: argparse.Namespace) -> int:
    from ...generation.generate import stream_generate
    from ...generation.prompt import check_room, rest
    from ...generation.prompt_cache import load_prompt_cache
    from ...method.cache import tokens_seen
    from ..terminal import busy, err, numbers, out, stream, tell_of_length

    if args.prompt_cache_file is not None:
        if args.draft not in (None, *DRAFTS):
            raise UserError(
                "a draft model has to read the whole prompt, which --prompt-cache-file does not "
                "hold as text: use --draft self, or leave one of them out"
            )
        late = ("system_prompt", "ignore_chat_template")
        refuse(args, late, "with --prompt-cache-file, which holds the beginning of the message")
        refuse(args, ("max_kv_size",), "with --prompt-cache-file, which keeps the size it has")
        if several.count() > 1:
            raise UserError("--prompt-cache-file is of one machine: leave it out, or mlx.launch")
    prompt = read_prompt(args.prompt)
    cache = None
    with busy("loading", args.model):
        model, tokenizer = load_from(args)
        settings = generation_from(args, tokenizer)
        begun = begun_answer(args, tokenizer)
        if args.prompt_cache_file is not None:
            cache, _ = load_prompt_cache(args.prompt_cache_file, model)
            tokens = rest(tokenizer, prompt, args.chat_template_config, begun)
            check_room(cache, tokens)
        else:
            tokens = render_prompt(args, tokenizer, prompt, begun)
    tell_of_length(model, (tokens_seen(cache or []) or 0) + len(tokens))

    def show(text: str) -> None:
        if not args.json:
            out.out(text, end="", highlight=False)

    answer = stream(
        lambda progress: stream_generate(
            model,
            tokenizer,
            tokens,
            prompt_cache=cache,
            max_kv_size=args.max_kv_size,
            prompt_progress_callback=progress,
            **settings,
        ),
        settings["prefill_step_size"],
        show,
    )
    if args.json and not out.quiet:
        print(to_json(_report(args.model, model, answer)))
    else:
        out.print()
        if answer.last is not None:
            err.print(numbers(answer, model), style="dim")
    return INTERRUPTED if answer.stopped else 0


def _report(name: str, model: Looped, answer: Streamed) -> dict[str, Any]:
    from ...method.loop import layer_passes

    report: dict[str, Any] = {
        "model": name,
        "loop": None if model.loop is None else model.loop.to_dict(),
        "layers": model.depth,
        "layer_passes": layer_passes(model.loop, model.depth),
        "text": answer.text,
        "finish_reason": "interrupted" if answer.stopped else None,
    }
    if model.loop is not None and model.loop.guard is not None:
        fired, loops = model.take_firings()
        report["guard"] = {"fired": fired, "loops": loops}
    if model.loop is not None and model.loop.gate is not None:
        looped, tokens = model.take_share()
        report["gate"] = {"looped": looped, "tokens": tokens}
    if answer.last is not None:
        report |= {
            "finish_reason": report["finish_reason"] or answer.last.finish_reason,
            "prompt_tokens": answer.last.prompt_tokens,
            "prompt_tps": answer.last.prompt_tps,
            "generation_tokens": answer.last.generation_tokens,
            "draft_tokens": answer.drafted,
            "generation_tps": answer.last.generation_tps,
            "peak_memory_gb": answer.last.peak_memory,
        }
    return report
