"""The tables of `mlx_loop plan`."""

from __future__ import annotations

from dataclasses import replace

from rich.text import Text

from ..checkpoints.macs import BANDWIDTH, SIZES
from ..checkpoints.memory import GIB, Footprint, usable
from ..checkpoints.quantise import Quantization, choose, is_quantised
from ..errors import UserError
from ..generation.prefill import GPU_STEP
from ..generation.prompt import reads_quantised_cache
from ..models.looped import Looped
from ..settings import CHOICES
from .terminal import describe, out, plain_table

# What the tables compare, by name.
WIDTHS = {
    "8 bits": Quantization(8),
    "6 bits": Quantization(6),
    "4 bits, window 8": Quantization(4, recipe="window8"),
    "4 bits": Quantization(4),
    "mxfp4": Quantization(mode="mxfp4"),
    "3 bits": Quantization(3),
}
KV_BITS = (None, 8, 4)
# Of which the answer and the speeds are told.
TOLD = ("as stored", "8 bits", "4 bits")
ROOM = 4096  # tokens of context that advice asks for.
CONTEXT = 1000  # tokens before the one whose time is told.


def show(name: str, model: Looped, ram: int, verbose: bool) -> None:
    """Print whether a model without weights fits a Mac of `ram` GB, and which it does fit.

    Args:
        verbose: what it needs, too.
    """
    footprints = _footprints(model)
    out.print(f"{name}: {model.model_type}, {len(model.layers)} layers, {describe(model.loop)}")
    _print_answer(footprints, ram)
    if not verbose:
        out.print("--verbose has weights, caches, Macs and speeds", style="dim")
        return
    out.print()
    quantises = reads_quantised_cache(model)
    _print_weights(footprints, ram, quantises)
    _print_cache(model, quantises)
    _print_macs(footprints)
    _print_speed(model, footprints)
    _print_advice(ram)


def _footprints(model: Looped) -> dict[str, Footprint]:
    """Largest first; a quantised checkpoint only as it is."""
    found = {"as stored": Footprint(model, fused=True)}
    if not is_quantised(model):
        for name, quantization in WIDTHS.items():
            if quantization.recipe == "window8" and model.loop is None:
                continue
            try:
                found[name] = Footprint(model, choose(model, quantization), fused=True)
            except UserError:  # Rows that are no whole number of groups.
                continue
    return found


def _print_answer(footprints: dict[str, Footprint], ram: int) -> None:
    limit = usable(ram * GIB)
    room = min(ROOM, footprints["as stored"].longest(1 << 60))
    fits = {name: f for name, f in footprints.items() if f.longest(limit) >= room}
    if fits:
        name, footprint = next(iter(fits.items()))
        how = f": {name} ({_size(footprint.weights)}), with room for "
        how += f"{_tokens(footprint.longest(limit))} tokens."
        out.print(Text.assemble((f"Fits on {ram} GB", "green"), how))
    else:
        no = (f"Does not fit on {ram} GB", "red")
        out.print(Text.assemble(no, f" with room for {room} tokens."))
    smallest = {n: _smallest(f, room) for n, f in footprints.items() if n in TOLD}
    words = [f"{n} from {size} GB" for n, size in smallest.items() if size]
    out.print(f"Macs with room for {room} tokens: {', '.join(words) or 'none'}.")


def _smallest(footprint: Footprint, room: int) -> int | None:
    """GB of the smallest Mac with room for this many tokens; None: there is none."""
    return next((size for size in SIZES if footprint.longest(usable(size * GIB)) >= room), None)


def _print_weights(footprints: dict[str, Footprint], ram: int, quantises: bool) -> None:
    """Args: quantises: whether `kv_bits` works with the model."""
    limit = usable(ram * GIB)
    table = plain_table("weights", "bits each", "size", f"context on {ram} GB", "with kv 4 bits")
    for kind, footprint in footprints.items():
        kv4 = _tokens(footprint.longest(limit, 4)) if quantises else "-"
        table.add_row(
            kind,
            f"{footprint.bits_per_weight:.2f}",
            _size(footprint.weights),
            _tokens(footprint.longest(limit)),
            kv4,
        )
    out.print(table)
    out.print()


def _print_cache(model: Looped, quantises: bool) -> None:
    table = plain_table("cache, MB per 1000 tokens", *(f"kv {b or 16} bits" for b in KV_BITS))
    loop = model.loop
    for policy in CHOICES["cache"] if loop else ("no loop",):
        view = model.with_loop(loop and replace(loop, cache=policy))
        footprint = Footprint(view, fused=True)
        row = [
            f"{footprint.cache(256_000, bits) / 256 / 1e6:.1f}"
            if bits is None or quantises
            else "-"
            for bits in KV_BITS
        ]
        table.add_row(policy, *row)
    out.print(table)
    footprint = Footprint(model, fused=True)
    for bits in (None, 4) if quantises else (None,):
        at_a_time = f"{GPU_STEP} tokens at a time{'' if bits is None else ', kv 4 bits'}"
        out.print(
            f"a prompt, {at_a_time}, at 8192 tokens: "
            f"{footprint.activations(GPU_STEP, 8192, bits) / 1e6:.0f} MB, of that "
            f"{footprint.loop_extra(GPU_STEP) / 1e6:.0f} MB for the loop"
        )
    out.print()


def _print_macs(footprints: dict[str, Footprint]) -> None:
    out.print("longest context, in tokens, on a Mac:")
    table = plain_table("memory", "usable", *footprints)
    for size in SIZES:
        limit = usable(size * GIB)
        contexts = [_tokens(f.longest(limit)) for f in footprints.values()]
        table.add_row(f"{size} GB", _size(limit), *contexts)
    out.print(table)
    out.print()


def _print_speed(model: Looped, footprints: dict[str, Footprint]) -> None:
    chosen = {n: f for n, f in footprints.items() if n in TOLD}
    out.print("generated tokens/s at most, un-looped / looped:")
    table = plain_table("chip", *chosen)
    plain = {n: Footprint(model.with_loop(None), f.chosen, fused=True) for n, f in chosen.items()}
    for chip, bandwidth in BANDWIDTH.items():
        speeds = [
            f"{bandwidth * 1e9 / plain[n].read_per_token(CONTEXT):.0f} / "
            f"{bandwidth * 1e9 / f.read_per_token(CONTEXT):.0f}"
            for n, f in chosen.items()
        ]
        table.add_row(f"{chip} ({bandwidth} GB/s)", *speeds)
    out.print(table)
    out.print()


def _print_advice(ram: int) -> None:
    more = ram * 1024 * 7 // 8
    out.print(
        "macOS lets the GPU use about two thirds of 32 GB and less, three quarters of more. To "
        f"raise that until the next start: sudo sysctl iogpu.wired_limit_mb={more} "
        "(what is left is the system's). mlx_loop never changes it."
    )
    out.print(
        "Weights and caches are exact. Activations are a formula tested on the CPU backend only; "
        "speeds are what the memory's bandwidth allows, computing nothing else.",
        style="dim",
    )


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _tokens(count: int) -> str:
    if count == 0:
        return "-"
    return f"{count // 1000} k" if count >= 10_000 else str(count)
