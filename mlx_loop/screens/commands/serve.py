"""`mlx_loop serve`: answer over HTTP, as OpenAI's interface has it, and on a page."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import several
from ...errors import UserError
from .. import options

if TYPE_CHECKING:
    from ..serve.desk import Desk
    from ..serve.names import Names

SUMMARY = "answer other programs over HTTP, with the loop settings in the model's name"
EXAMPLES = """examples:
  mlx_loop serve --model Qwen/Qwen3-4B-Instruct-2507
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "demo:loops=6,beta=0.3", "messages": [{"role": "user", "content": "Hi"}]}'
A page that compares settings is at http://127.0.0.1:8080/.
docs/serve.md has the clients."""

KEY = "MLX_LOOP_API_KEY"
LOOP_NAMES = "loops=1 loops=2 loops=6 recipe=paper recipe=generative"


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add = options.add
    add(group, "--host", "where to listen; 0.0.0.0: everywhere", str, "HOST", "127.0.0.1")
    port = options.number(int, 0, 65535, "a port, 0 to 65535")
    add(group, "--port", "0: any that is free", port, "N", 8080)
    what = f"what requests must send as a bearer token (default: the variable {KEY}, else nothing)"
    add(group, "--api-key", what, str, "KEY")
    what = "other sites' pages that may ask, as https://chat.example,http://localhost:3000, or *"
    add(group, "--allowed-origins", what, _words(","), "ORIGINS")
    what = (
        "settings that /v1/models lists, with spaces between "
        f"(default: '{LOOP_NAMES}', as far as they fit)"
    )
    add(group, "--loop-names", what, _words(" "), "NAMES")
    what = "tokens of a prompt and its answer together (default: the model's own limit)"
    add(group, "--max-context", what, options.positive, "N")
    add(group, "--max-request-bytes", "of a request", options.positive, "N", 8 << 20)
    what = "of all key/value caches (default: half of the memory beside the weights)"
    add(group, "--prompt-cache-bytes", what, options.positive, "N")
    what = "caches of earlier prompts that are kept"
    add(group, "--prompt-cache-size", what, options.from_zero, "N", 10)
    what = "answers at once, in each batch"
    add(group, "--decode-concurrency", what, options.positive, "N", 32)
    what = "prompts at once, in each batch"
    add(group, "--prompt-concurrency", what, options.positive, "N", 8)
    what = "what is printed"
    levels = ("debug", "info", "warning", "error")
    add(group, "--log-level", what, str, default="warning", choices=levels)
    options.add_model_options(parser, pipeline=True)
    options.add_loop_options(parser)
    group = parser.add_argument_group("answers", "What a request does not say.")
    options.add_max_tokens(group, 512)
    what = "sampling temperature; 0 is greedy"
    add(group, "--temp", what, options.temperature, "T", 0.0)
    options.add_template_config(group)
    options.add_kv_options(parser.add_argument_group("cache"))
    options.add_draft_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.draft not in (None, *options.DRAFTS):
        raise UserError("a server drafts without a second model: use --draft self or lookup")
    if args.draft is not None and several.count() > 1:
        raise UserError("drafts are for one machine: leave --draft out, or mlx.launch")
    from ..terminal import busy, err

    with busy("loading", args.model):
        desk = open_desk(args)
    if not several.is_first():
        desk.join()
        return 0
    from ..serve.server import Server, serve

    server = Server(desk, (args.host, args.port))
    host, port = map(str, server.server_address[:2])
    shown = f"[{host}]" if ":" in host else host
    err.print(
        f"{server.desk.names.name} is served at http://{shown}:{port}/v1, "
        f"with a page at http://{shown}:{port}/",
        soft_wrap=True,
    )
    return serve(server)


def open_desk(args: argparse.Namespace) -> Desk:
    """What serves as the options ask for."""
    from ...checkpoints.memory import limit, trained_length, weights_bytes
    from ...generation.prompt import check_prompt
    from ...generation.speculative import NUM_DRAFT_TOKENS
    from ..serve.desk import Desk
    from ..serve.names import Names

    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s"
    )
    model, tokenizer, start = options.load_for_names(args)
    check_prompt(model, [0], model.new_cache(), None, args.kv_bits, args.kv_group_size or 64)
    names = Names(model, args.model, start)
    room = max((limit() - weights_bytes(model)) // 2, 1 << 20)
    settings = argparse.Namespace(
        host=args.host,
        api_key=args.api_key or os.environ.get(KEY) or None,
        allowed_origins=args.allowed_origins or [],
        loop_names=_listed(names, args.loop_names),
        max_context=args.max_context or trained_length(model) or 1 << 20,
        max_request_bytes=args.max_request_bytes,
        draft=args.draft,
        # What follows has the names of mlx-lm's server.
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        num_draft_tokens=args.num_draft_tokens or NUM_DRAFT_TOKENS,
        chat_template_args=args.chat_template_config,
        prefill_step_size=options.prefill_step_from(args),
        decode_concurrency=args.decode_concurrency,
        prompt_concurrency=args.prompt_concurrency,
        prompt_cache_size=args.prompt_cache_size,
        prompt_cache_bytes=args.prompt_cache_bytes or room,
        **options.kv_from(args),
        # It loads models itself; here one is loaded already.
        model=names.name,
        adapter_path=None,
        draft_model=None,
        chat_template=None,
        use_default_chat_template=False,
        trust_remote_code=False,
        pipeline=False,
    )
    return Desk(settings, names, tokenizer)


def _listed(names: Names, given: list[str] | None) -> list[str]:
    found = []
    for name in LOOP_NAMES.split() if given is None else given:
        try:
            names.view(f"{names.name}:{name}")
            found.append(name)
        except UserError:
            if given is not None:
                raise
    return found


def _words(between: str) -> Callable[[str], list[str]]:
    return lambda text: [word.strip() for word in text.split(between) if word.strip()]
