"""`mlx_loop upload`: put a saved folder on the Hugging Face hub."""

from __future__ import annotations

import argparse

from ...errors import UserError
from ...foreign import one_line, path_of
from ..options import add

SUMMARY = "share a saved or quantised model on the Hugging Face hub"
EXAMPLES = """example:
  hf auth login
  mlx_loop upload --path qwen3-4b-4bit --upload-repo you/Qwen3-4B-Instruct-2507-looped-4bit"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add(parser, "--path", "a folder that mlx_loop has written", str, "DIR", required=True)
    what = "the repository, such as you/qwen3-4b"
    add(parser, "--upload-repo", what, str, "NAME", required=True)


def run(args: argparse.Namespace) -> int:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    from ...checkpoints.card import upload
    from ...checkpoints.hub import HubError
    from ...checkpoints.loading import read_config
    from ...checkpoints.whole import check_whole
    from ..terminal import out

    folder = path_of(args.path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one that mlx_loop has written")
    check_whole(folder, read_config(folder))
    try:
        page = upload(folder, args.upload_repo)
    except (HubError, HFValidationError, OSError) as error:
        refused = isinstance(error, HfHubHTTPError | HFValidationError | LocalTokenNotFoundError)
        todo = "check the name and run `hf auth login`" if refused else "check the network"
        reason = one_line(error)
        raise UserError(f"cannot upload to {args.upload_repo} ({reason}): {todo}") from error
    out.print(f"{folder} is at {page}")
    return 0
