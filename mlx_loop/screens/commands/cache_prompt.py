"""`mlx_loop cache_prompt`: process a prompt once and keep its cache in a file."""

from __future__ import annotations

import argparse

import mlx.core as mx
from mlx_lm.generate import generate_step

from ...errors import INTERRUPTED
from ...generation.conversation import Interrupted
from ...generation.generate import make_prompt_cache
from ...generation.prompt import check_prompt, opening
from ...generation.prompt_cache import save_prompt_cache
from ..options import load_from, prefill_step_from
from ..terminal import err, interruptible, prompt_progress
from .generate import read_prompt


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args.prompt)
    with err.status(f"loading {args.model}"):
        model, tokenizer = load_from(args)
    tokens = opening(tokenizer, prompt)
    cache = make_prompt_cache(model, args.max_kv_size)
    check_prompt(model, tokens, cache, args.max_kv_size, args.kv_bits, args.kv_group_size)
    step = prefill_step_from(args)
    with interruptible() as stop, prompt_progress(step, stop) as progress:
        steps = generate_step(
            mx.array(tokens),
            model.for_prompt(cache, len(tokens)),
            max_tokens=0,
            prompt_cache=cache,
            prefill_step_size=step,
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
            prompt_progress_callback=progress,
        )
        try:
            for _ in steps:
                pass
        except Interrupted:
            return INTERRUPTED
    save_prompt_cache(args.prompt_cache_file, cache, model, {"model": args.model})
    size = sum(entry.nbytes for entry in cache)
    err.print(f"{len(tokens)} tokens, {size / 1e6:.1f} MB, in {args.prompt_cache_file}")
    return 0
