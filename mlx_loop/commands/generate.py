"""`mlx_loop generate`: answer one prompt."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..conversation import Interrupted
from ..errors import INTERRUPTED, UserError
from ..generation import encode, stream_generate
from ..loading import load
from ..loop import Looped, layer_passes
from ..options import generation_from, load_from, prefill_step_from
from ..prompt_cache import load_prompt_cache
from ..terminal import err, interruptible, numbers, out, prompt_progress

# Stands for the prompt while the text before it, which a cache file holds already, is cut off.
PLACEHOLDER = "<query>"


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args.prompt)
    with err.status(f"loading {args.model}"):
        model, tokenizer = load_from(args)
        draft = None if args.draft_model is None else load(args.draft_model, loop=None)[0]
    settings = generation_from(args, tokenizer)
    cache = None
    if args.prompt_cache_file is not None:
        if draft is not None:
            raise UserError("--draft-model does not work with --prompt-cache-file: leave one out")
        cache, _ = load_prompt_cache(args.prompt_cache_file, model)
    tokens = _render(args, tokenizer, prompt, continues=cache is not None)

    text, response = "", None
    with interruptible() as stop, prompt_progress(prefill_step_from(args), stop) as progress:
        if draft is not None:
            settings |= {"draft_model": draft, "num_draft_tokens": args.num_draft_tokens}
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
                if not args.json:
                    out.out(response.text, end="", highlight=False)
                    out.file.flush()
                if stop.is_set():
                    answer.close()
        except Interrupted:
            pass
    if args.json:
        print(json.dumps(_report(args, model, text, response, stop.is_set()), ensure_ascii=False))
    else:
        out.print()
        if response is not None:
            err.print(numbers(response, model), style="dim")
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


def _render(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, prompt: str, continues: bool
) -> list[int]:
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return (
            tokenizer.encode(prompt, add_special_tokens=False)
            if continues
            else encode(tokenizer, prompt)
        )
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    text = tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": PLACEHOLDER if continues else prompt}],
        add_generation_prompt=True,
        tokenize=False,
        **args.chat_template_config,
    )
    if continues:
        text = prompt + text.split(PLACEHOLDER)[1]
    return tokenizer.encode(text, add_special_tokens=False)


def _report(
    args: argparse.Namespace,
    model: Looped,
    text: str,
    response: GenerationResponse | None,
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
    if response is not None:
        report |= {
            "finish_reason": report["finish_reason"] or response.finish_reason,
            "prompt_tokens": response.prompt_tokens,
            "prompt_tps": response.prompt_tps,
            "generation_tokens": response.generation_tokens,
            "generation_tps": response.generation_tps,
            "peak_memory_gb": response.peak_memory,
        }
    return report
