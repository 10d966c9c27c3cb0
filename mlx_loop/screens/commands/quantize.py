"""`mlx_loop quantize`: a checkpoint in fewer bits, from disk to disk."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...files import check_new
from ...foreign import path_of, read_text
from .. import options
from ..options import add, apply_loop, number, refuse

if TYPE_CHECKING:
    from ...checkpoints.quantise import Quantization

SUMMARY = "write a checkpoint in fewer bits, ready to loop"
EXAMPLES = """examples:
  mlx_loop quantize --model Qwen/Qwen3-4B-Instruct-2507 --mlx-path qwen3-4b-4bit
  mlx_loop quantize --model Qwen/Qwen3-4B-Instruct-2507 --q-recipe window8 --dry-run
  mlx_loop quantize --model Qwen/Qwen3-4B-Instruct-2507 --bits-per-weight 4.5 --loops 4
The checkpoint may be larger than memory: it is read, quantised and written
matrix by matrix.
Plain mlx-lm and LM Studio load the folder as the un-looped model."""


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model_name(parser)
    add(parser, "--mlx-path", "the folder to write", str, "DIR", "mlx_model")
    add(parser, "--force", "replace the folder if it exists and is a checkpoint")
    add(parser, "--dry-run", "say what would be written")
    options.add_trust(parser)
    group = parser.add_argument_group("quantisation")
    add(group, "--q-bits", "2, 3, 4, 5, 6 or 8 bits (default: 4)", int, "N")
    what = "weights that share a scale: 32, 64 or 128 (default: 64)"
    add(group, "--q-group-size", what, int, "N")
    what = "number format; all but affine have one width and group size"
    modes = ("affine", "mxfp4", "nvfp4", "mxfp8")
    add(group, "--q-mode", what, str, default="affine", choices=modes)
    what = (
        "uniform: the same bits everywhere; window8: the looped layers in 8 bits; budget: bits "
        "where the looped model's output needs them most"
    )
    add(group, "--q-recipe", what, str, choices=("uniform", "window8", "budget"))
    what = "what the recipe budget may spend, scales included"
    add(group, "--bits-per-weight", what, number(float, 0, 16, "a number of bits"), "B")
    what = "text on which the recipe budget measures (default: one that ships with mlx_loop)"
    add(group, "--calibration", what, str, "FILE")
    options.add_loop_options(parser)


def run(args: argparse.Namespace) -> int:
    from rich.progress import DownloadColumn

    from ...checkpoints.loading import find, load_tokenizer, open_checkpoint, quantization_for
    from ...checkpoints.memory import bits_per_weight, weights_bytes
    from ...checkpoints.quantise import TOLERANCE
    from ...checkpoints.saving import check_checkpoint, quantize
    from ...checkpoints.sensitivity import encode
    from ..terminal import busy, out, progress_bar

    quantization = quantization_from(args)
    if quantization.recipe != "budget":
        refuse(args, ("calibration",), "without the recipe budget")
    path = path_of(args.mlx_path)
    if not args.dry_run:
        check_new(path, args.force, "replace it with --force")
        if path.exists():
            check_checkpoint(path)
    text = read_text(path_of(args.calibration)) if args.calibration is not None else None
    with busy("opening", args.model):
        source = find(args.model)
        model = open_checkpoint(source)
        apply_loop(args, model)
        tokens = None
        if quantization.recipe == "budget":
            tokenizer = load_tokenizer(source, {"trust_remote_code": args.trust_remote_code})
            tokens = encode(tokenizer, text)
    with progress_bar("layers,") as bar:
        task = bar.add_task("measuring", total=None)

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
    with progress_bar(count=DownloadColumn()) as bar:
        task = bar.add_task("writing", total=size)
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
    from ...checkpoints.quantise import Quantization

    recipe = args.q_recipe or ("uniform" if args.bits_per_weight is None else "budget")
    return Quantization(args.q_bits, args.q_group_size, args.q_mode, recipe, args.bits_per_weight)


def table(model: Any, chosen: Any, before: int, size: int, bits: float) -> None:
    """How many matrices get which width, and what it comes to."""
    from ..terminal import out

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
