"""`mlx_loop models`: what is in the Hugging Face cache, and whether it loops."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from ...errors import UserError, suggestion

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

SUMMARY = "list the models in the Hugging Face cache, or delete one"
EXAMPLES = """examples:
  mlx_loop models
  mlx_loop models rm mlx-community/Qwen3-4B-Instruct-2507-4bit     asks before it deletes"""

WIDEST_REASON = 70


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="rm NAME", title="actions")
    rm = actions.add_parser("rm", help="delete a model from the cache, after a question")
    rm.add_argument("name", metavar="NAME", help="as `mlx_loop models` shows it")


def run(args: argparse.Namespace) -> int:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    from ..terminal import err, out, plain_table

    cache = Path(constants.HF_HUB_CACHE)
    try:
        found = scan_cache_dir(cache)
        repos = sorted((r for r in found.repos if r.repo_type == "model"), key=lambda r: r.repo_id)
    except CacheNotFound:
        repos = []
    if name := vars(args).get("name"):
        repo = _named(name, repos)
        out.print(f"{repo.repo_id}, {repo.size_on_disk_str}, in {repo.repo_path}")
        if not _confirmed("delete it? [y/N] "):
            out.print("kept")
            return 0
        # Of this repository alone: a copy of it has revisions of the same names.
        alone = replace(found, repos=frozenset([repo]))
        alone.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()
        if repo.repo_path.exists():  # huggingface-hub only logs what it cannot delete.
            raise UserError(f"{repo.repo_path} could not be deleted: may you write to it?")
        out.print("deleted")
        return 0
    if not repos:
        out.print(f"there is no model in {cache}: --model NAME downloads one")
        return 0
    table = plain_table("model", "size", "loops", left=("loops",))
    with err.status("reading"):
        for repo in repos:
            table.add_row(repo.repo_id, repo.size_on_disk_str, _loops(repo))
    out.print(table)
    return 0


def _named(name: str, repos: list[CachedRepoInfo]) -> CachedRepoInfo:
    names = [repo.repo_id for repo in repos]
    if name not in names:
        meant = suggestion(name, names) or "; `mlx_loop models` lists what is"
        raise UserError(f"there is no {name} in the Hugging Face cache{meant}")
    return repos[names.index(name)]


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _loops(repo: CachedRepoInfo) -> str:
    """`yes`, or why not; no weight is read."""
    from ...checkpoints.loading import open_checkpoint
    from ...settings import LoopConfig

    newest = max(repo.revisions, key=lambda revision: revision.last_modified, default=None)
    try:
        if newest is None:
            raise UserError("nothing is downloaded")
        open_checkpoint(newest.snapshot_path, LoopConfig())
    except UserError as error:
        reason = str(error).replace(f"{newest and newest.snapshot_path}", "it")
        return f"no: {shorten(reason, WIDEST_REASON, placeholder=' ...')}"
    return "yes"
