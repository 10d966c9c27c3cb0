"""`mlx_loop plan`: what a model needs of memory, and which Mac has it."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from ...foreign import path_of
from ..options import add, add_loop_options, apply_loop, positive

SUMMARY = "say what a model needs of memory, and which Mac has it"
EXAMPLES = """examples:
  mlx_loop plan Qwen/Qwen3-4B-Instruct-2507 --ram 8
  mlx_loop plan Qwen/Qwen3-30B-A3B --ram 24 --loops 6 --cache own"""


def add_options(parser: argparse.ArgumentParser) -> None:
    what = (
        "a folder, a Hugging Face repository (its weights are not downloaded), or a checkpoint "
        "that ships with mlx_loop"
    )
    add(parser, "model", what, str, "MODEL", "demo", nargs="?")
    add(parser, "--ram", "memory of the Mac in question", positive, "GB", 16)
    add(parser, "--verbose", "tables of weights, caches, Macs and speeds after the answer")
    add_loop_options(parser)


def run(args: argparse.Namespace) -> int:
    from ...checkpoints.hub import cached, hollow
    from ...checkpoints.loading import DEMOS, find, open_checkpoint
    from ..plan_tables import show
    from ..terminal import busy

    with ExitStack() as stack:
        with busy("reading the headers of", args.model):
            local = args.model in DEMOS or path_of(args.model).exists()
            is_repo = not local and args.model.count("/") == 1 and args.model[0] not in "./~"
            path = cached(args.model) if is_repo else find(args.model)
            path = path or stack.enter_context(hollow(args.model))
            model = open_checkpoint(path)
            apply_loop(args, model)
        show(args.model, model, args.ram, args.verbose)
    return 0
