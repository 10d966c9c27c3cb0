"""`mlx_loop generate`: answer one prompt."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import INTERRUPTED, UserError
from ...generation.conversation import Interrupted
from ...generation.generate import stream_generate
from ...generation.prompt import encode, render, rest
from ...generation.prompt_cache import load_prompt_cache
from ...method.loop import layer_passes
from ...models.looped import Looped
from ..options import DRAFTS, draft_from, generation_from, load_from, prefill_step_from
from ..terminal import err, interruptible, numbers, out, prompt_progress


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args.prompt)
    with err.status(f"loading {args.model}"):
        model, tokenizer = load_from(args)
        draft = draft_from(args, tokenizer)
    settings = generation_from(args, tokenizer) | draft
    cache = None
    if args.prompt_cache_file is not None:
        if args.draft not in (None, *DRAFTS):
            raise UserError(
                "a draft model has to read the whole prompt, which --prompt-cache-file does not "
                "hold as text: use --draft self, or leave one of them out"
            )
        if args.system_prompt or args.ignore_chat_template:
            raise UserError(
                "--prompt-cache-file holds the beginning of a message: --system-prompt and "
                "--ignore-chat-template come too late"
            )
        cache, _ = load_prompt_cache(args.prompt_cache_file, model)
    if cache is None:
        tokens = render_prompt(args, tokenizer, prompt)
    else:
        tokens = rest(tokenizer, prompt, args.chat_template_config)

    text, response, drafted = "", None, 0
    with interruptible() as stop, prompt_progress(prefill_step_from(args), stop) as progress:
        answer = stream_generate(
            model,
            tokenizer,
            tokens,
            prompt_cache=cache,
            max_kv_size=args.max_kv_size,
            prompt_progress_callback=progress,
            **settings,
        )
        try:
            for response in answer:
                text += response.text
                drafted += response.from_draft
                if not args.json:
                    out.out(response.text, end="", highlight=False)
                    out.file.flush()
                if stop.is_set():
                    answer.close()
        except Interrupted:
            pass
    if args.json:
        report = _report(args, model, text, response, drafted, stop.is_set())
        print(json.dumps(report, ensure_ascii=False))
    else:
        out.print()
        if response is not None:
            err.print(numbers(response, model, drafted), style="dim")
    return INTERRUPTED if stop.is_set() else 0


def read_prompt(prompt: str | None) -> str:
    """The prompt of `--prompt`, or standard input for - or nothing."""
    if prompt is None and sys.stdin.isatty():
        raise UserError('there is no prompt: give --prompt "..." or pipe one in')
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    if not text.strip():
        raise UserError('the prompt is empty: give --prompt "..." or pipe one in')
    return text


def render_prompt(args: argparse.Namespace, tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    """Token ids of `prompt` in the chat template, unless it is to be ignored."""
    if args.ignore_chat_template:
        return encode(tokenizer, prompt)
    message = {"role": "user", "content": prompt}
    return render(tokenizer, [message], args.system_prompt, args.chat_template_config)


def _report(
    args: argparse.Namespace,
    model: Looped,
    text: str,
    response: GenerationResponse | None,
    drafted: int,
    interrupted: bool,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "model": args.model,
        "loop": None if model.loop is None else model.loop.to_dict(),
        "layers": len(model.layers),
        "layer_passes": layer_passes(model.loop, len(model.layers)),
        "text": text,
        "finish_reason": "interrupted" if interrupted else None,
    }
    if model.loop is not None and model.loop.guard is not None:
        fired, loops = model.take_firings()
        report["guard"] = {"fired": fired, "loops": loops}
    if response is not None:
        report |= {
            "finish_reason": report["finish_reason"] or response.finish_reason,
            "prompt_tokens": response.prompt_tokens,
            "prompt_tps": response.prompt_tps,
            "generation_tokens": response.generation_tokens,
            "draft_tokens": drafted,
            "generation_tps": response.generation_tps,
            "peak_memory_gb": response.peak_memory,
        }
    return report
