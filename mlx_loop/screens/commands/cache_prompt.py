"""`mlx_loop cache_prompt`: process a prompt once and keep its cache in a file."""

from __future__ import annotations

import argparse

from ...errors import INTERRUPTED
from .. import options
from ..options import kv_from, load_from, prefill_step_from, read_prompt

SUMMARY = "process a long prompt once and keep its cache in a file"
EXAMPLES = """example:
  mlx_loop cache_prompt --prompt - --prompt-cache-file book.safetensors < book.txt
  mlx_loop generate --prompt-cache-file book.safetensors --prompt "Who is the narrator?" """


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add(parser, "--prompt -p", options.THE_PROMPT, str, "TEXT")
    options.add(parser, "--prompt-cache-file", "the file to write", str, "FILE", required=True)
    options.add_model_options(parser)
    options.add_loop_options(parser)
    options.add_cache_options(parser)


def run(args: argparse.Namespace) -> int:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from ...checkpoints.memory import Footprint
    from ...files import check_space
    from ...generation.conversation import Interrupted
    from ...generation.generate import make_prompt_cache
    from ...generation.prompt import check_prompt, opening
    from ...generation.prompt_cache import cache_path, save_prompt_cache
    from ..terminal import busy, err, interruptible, prompt_progress, tell_of_length

    file = cache_path(args.prompt_cache_file)
    prompt = read_prompt(args.prompt)
    with busy("loading", args.model):
        model, tokenizer = load_from(args)
    tokens = opening(tokenizer, prompt)
    cache = make_prompt_cache(model, args.max_kv_size)
    kv = kv_from(args)
    check_prompt(model, tokens, cache, args.max_kv_size, kv["kv_bits"], kv["kv_group_size"])
    size = Footprint(model, fused=True).cache(len(tokens), kv["kv_bits"], kv["kv_group_size"])
    check_space(file.parent, file, size)
    tell_of_length(model, len(tokens))
    step = prefill_step_from(args)
    with interruptible() as stop, prompt_progress(step, stop) as progress:
        steps = generate_step(
            mx.array(tokens),
            # The prompt goes on, so none of these tokens decides the answer.
            model.for_prompt(cache, len(tokens) + 1),
            max_tokens=0,
            prompt_cache=cache,
            prefill_step_size=step,
            prompt_progress_callback=progress,
            **kv,
        )
        try:
            for _ in steps:
                pass
        except Interrupted:
            return INTERRUPTED
    source = {"model": args.model}
    save_prompt_cache(file, cache, model, source, holds_no_answer=True)
    size = sum(entry.nbytes for entry in cache)
    err.print(f"{len(tokens)} tokens, {size / 1e6:.1f} MB, in {args.prompt_cache_file}")
    return 0
