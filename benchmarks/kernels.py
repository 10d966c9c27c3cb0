"""What an update costs as one kernel: launches, bytes and time, against the same in plain MLX.

    python benchmarks/kernels.py                       on the GPU, if there is one, else the CPU
    python benchmarks/kernels.py --out results.json    keep the numbers

Launches and bytes are counted in MLX's own graphs, for bfloat16 states, on any machine: what each
operation that moves data reads and writes. Times are ratios, measured in turn in one process; the
floor is the time of the kernel's bytes at the bandwidth of a copy as large as the state. Without a
GPU the kernel cannot run; its plain-MLX twin, one compiled graph, is measured in its place.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlx_loop.method.kernels import on_gpu
from mlx_loop.method.kernels.source import Variant, launch
from mlx_loop.method.kernels.update import plain, twin

UPDATES = {
    "euler": Variant("linear", 2),
    "anchored, last": Variant("linear", 3),
    "rk4": Variant("linear", 5),
    "euler, first norm": Variant("linear", 2, measured=2, rescaled=True),
    "euler, later norms": Variant("linear", 2, rescaled=True, norms=True),
    "aitken": Variant("aitken", 3),
    "anderson, memory 2": Variant("anderson", 6),
}
# (batch, length, hidden): a decoded token of a 4B and an 8B model, a prompt of each.
SHAPES = ((1, 1, 2560), (1, 1, 4096), (1, 512, 2560), (1, 512, 4096))

# Operations that give another view of a buffer and launch nothing.
VIEWS = {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Squeeze", "Unflatten"}


def inputs(variant: Variant, shape: Sequence[int], dtype: mx.Dtype) -> list[mx.array]:
    """Random arguments of a variant."""
    arrays = [mx.random.uniform(0.1, 0.3, ((variant.measured + 1) * variant.states + 1,))]
    arrays += [mx.random.normal(shape).astype(dtype) for _ in range(variant.states)]
    if variant.norms:
        arrays.append(mx.random.uniform(1, 2, (*shape[:2], 2)))
    mx.eval(arrays)
    return arrays


def traffic(function: Callable, arrays: Sequence[mx.array]) -> tuple[int, int]:
    """Launches and bytes of a function, from MLX's graph of it."""
    launches, size = 0, 0

    def count(node: dict) -> None:
        nonlocal launches, size
        if node["type"] == "primitive" and node["name"] not in VIEWS:
            launches += 1
            for _, shape, dtype in (*node["inputs"], *node["outputs"]):
                size += dtype.size * math.prod(shape)

    mx.export_function(count, function, *arrays)
    return launches, size


def chain(function: Callable, arrays: Sequence[mx.array], steps: int) -> Callable[[], float]:
    """A function that runs `steps` updates, each of the last one's result; seconds for one."""
    constants, first, *rest = arrays

    def run() -> float:
        state = first
        start = time.perf_counter()
        for _ in range(steps):
            state = function(constants, state, *rest)[0]
        mx.eval(state)
        return (time.perf_counter() - start) / steps

    return run


def measure(variant: Variant, shape: Sequence[int], dtype: mx.Dtype, pairs: int) -> dict:
    """One row of the table."""
    arrays = inputs(variant, shape, dtype)
    composed = plain(variant)

    def kernel(*a: mx.array) -> Sequence[mx.array]:
        return launch(variant, "cuda" if mx.cuda.is_available() else "metal", *a)

    halves = inputs(variant, shape, mx.bfloat16)
    launches, size = traffic(lambda *a: launch(variant, "metal", *a), halves)
    composed_launches, composed_size = traffic(composed, halves)
    # What the kernel moves in copies of a state; one copy reads and writes it.
    copies = size / (2 * halves[1].nbytes)
    one = mx.array(1, dtype)
    steps = 4 if arrays[1].nbytes > 2**20 else 64
    runs = [
        chain(kernel if on_gpu() else twin(variant), arrays, steps),
        chain(composed, arrays, steps),
        # A copy as MLX's own operations make it: as much is written as read.
        chain(lambda _, x, *rest: [x * one], arrays, steps),
    ]
    for run in runs * 2:
        run()
    times = [[run() for run in runs] for _ in range(pairs)]
    fused, slow, copied = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "shape": list(shape),
        "launches": launches,
        "composed launches": composed_launches,
        "bytes": size,
        "composed bytes": composed_size,
        "time over composed": round(fused / slow, 3),
        "floor over time": round(copies * copied / fused, 3),
    }


def machine() -> str:
    """What was measured on."""
    if on_gpu():
        return str(mx.device_info()["device_name"])
    return f"{os.cpu_count()}-core {platform.machine()}, {platform.system()}, CPU backend"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="how often each form is timed")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()

    dtype = mx.bfloat16 if on_gpu() else mx.float32
    form = "kernel" if on_gpu() else "twin (no GPU: the kernel did not run)"
    columns = ("update", "state", "launches", "bytes", "time", "of the floor")
    table = Table(*columns, title=f"{form} against plain MLX, {machine()}, {dtype}")
    rows = []
    work = [(name, shape) for shape in SHAPES for name in UPDATES]
    for name, shape in track(work, description="measuring", transient=True):
        row = {"update": name, **measure(UPDATES[name], shape, dtype, args.pairs)}
        rows.append(row)
        table.add_row(
            name,
            "x".join(map(str, shape)),
            f"{row['launches']} : {row['composed launches']}",
            f"1 : {row['composed bytes'] / row['bytes']:.1f}",
            f"{row['time over composed']:.2f}",
            f"{row['floor over time']:.0%}",
        )
    console = Console()
    console.print(table)
    console.print("time: over plain MLX. of the floor: the kernel's bytes at a copy's bandwidth.")
    if args.out is not None:
        about = {"machine": machine(), "measured": form, "timed": str(dtype), "mlx": mx.__version__}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
