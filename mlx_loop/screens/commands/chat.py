"""`mlx_loop chat`: talk to a looped model."""

from __future__ import annotations

import argparse

from .. import options
from ..options import generation_from, load_from, sampling_given, suggested_sampling

SUMMARY = "talk to a looped model"
EXAMPLES = """examples:
  mlx_loop chat                                     the demo model that ships with mlx_loop
  mlx_loop chat --model mlx-community/Qwen3-4B-Instruct-2507-4bit
  mlx_loop chat --loops 6 --integrator anchored --beta 0.3
  mlx_loop chat --loops 1                           the plain model
  mlx_loop chat --loops 6 --draft self              the same answers, sooner
In the chat, /help lists what can be changed while it runs."""


def add_options(parser: argparse.ArgumentParser) -> None:
    what = "show answers as they come, without rendering Markdown and thoughts, as in a pipe"
    options.add(parser, "--plain", what)
    options.add_model_options(parser, pipeline=True)
    options.add_loop_options(parser)
    options.add_sampling_options(parser, max_tokens=512)
    options.add_answer_options(parser)
    options.add_cache_options(parser)
    options.add_draft_options(parser)


def run(args: argparse.Namespace) -> int:
    from ...generation.conversation import Conversation
    from ..chat_session import Chat
    from ..terminal import busy, err

    with busy("loading", args.model):
        model, tokenizer = load_from(args)
        suggested = {} if sampling_given(args) else suggested_sampling(model)
        vars(args).update(suggested)
        generation = generation_from(args, tokenizer)
    if suggested:
        said = ", ".join(f"{name} {value:g}" for name, value in suggested.items())
        err.print(f"sampling as the checkpoint says: {said} (--temp 0: greedy)", style="dim")
    conversation = Conversation(
        model,
        tokenizer,
        system=args.system_prompt,
        max_kv_size=args.max_kv_size,
        template=args.chat_template_config,
    )
    chat = Chat(conversation, args.model, generation, args.plain)
    chat.tell_of_system()
    return chat.serve()
