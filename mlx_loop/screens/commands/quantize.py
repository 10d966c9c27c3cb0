"""`mlx_loop quantize`: a checkpoint in fewer bits, from disk to disk."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ...checkpoints.loading import find, load_tokenizer, open_checkpoint, quantization_for
from ...checkpoints.memory import bits_per_weight, weights_bytes
from ...checkpoints.quantise import TOLERANCE, Quantization
from ...checkpoints.saving import quantize
from ...checkpoints.sensitivity import encode
from ...files import check_new
from ..options import apply_loop
from ..terminal import err, out


def run(args: argparse.Namespace) -> int:
    quantization = quantization_from(args)
    path = Path(args.mlx_path)
    if not args.dry_run:
        check_new(path, args.force, "replace it with --force")
    # Whoever ends the program ends it as Ctrl-C does: nothing half written stays.
    signal.signal(signal.SIGTERM, _interrupt)
    with err.status(f"opening {args.model}"):
        source = find(args.model)
        model = open_checkpoint(source)
        apply_loop(args, model)
        tokens = None
        if quantization.recipe == "budget":
            text = Path(args.calibration).read_text() if args.calibration else None
            tokenizer = load_tokenizer(source, {"trust_remote_code": args.trust_remote_code})
            tokens = encode(tokenizer, text)
    with _bar("measuring", MofNCompleteColumn(), TextColumn("layers,")) as bar:
        task = bar.add_task("", total=None)

        def measured(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        chosen = quantization_for(model, quantization, tokens, measured)

    before, size = weights_bytes(model), weights_bytes(model, chosen)
    bits = bits_per_weight(model, chosen)
    table(model, chosen, before, size, bits)
    asked = quantization.bits_per_weight
    if asked is not None and abs(bits - asked) > TOLERANCE:
        out.print(
            f"{asked:g} bits per weight were asked for: no matrix is small enough to fill the rest "
            "with the next width"
        )
    if args.dry_run:
        out.print(f"nothing is written; without --dry-run it would be {path}")
        return 0
    with _bar("writing", DownloadColumn()) as bar:
        task = bar.add_task("", total=size)
        quantize(
            path,
            model,
            chosen,
            recipe=str(quantization),
            overwrite=args.force,
            progress=lambda done: bar.update(task, completed=done),
        )
    out.print(f"{path} is complete: mlx_loop chat --model {path}")
    return 0


def quantization_from(args: argparse.Namespace) -> Quantization:
    """What the options ask for; bits per weight imply the recipe `budget`."""
    recipe = args.q_recipe or ("uniform" if args.bits_per_weight is None else "budget")
    return Quantization(args.q_bits, args.q_group_size, args.q_mode, recipe, args.bits_per_weight)


def table(model: Any, chosen: Any, before: int, size: int, bits: float) -> None:
    """How many matrices get which width, and what it comes to."""
    kinds: dict[str, list[str]] = {}
    for path, params in chosen.items():
        mode = "" if params["mode"] == "affine" else f" {params['mode']}"
        kinds.setdefault(
            f"{params['bits']} bits{mode}, groups of {params['group_size']}", []
        ).append(path)
    for kind, paths in sorted(kinds.items()):
        out.print(f"{len(paths):5} matrices in {kind}")
    out.print(
        f"{before / 1e9:.3f} GB become {size / 1e9:.3f} GB, {bits:.3f} bits per weight; "
        f"loop {'off' if model.loop is None else model.loop}"
    )


def _bar(what: str, *columns: Any) -> Progress:
    return Progress(
        TextColumn(what),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
