"""Memory and time of quantising a checkpoint of 4 GB to 4 bits: mlx_loop against mlx_lm.convert.

    python benchmarks/quantise.py --gigabytes 4

Writes a synthetic checkpoint in Qwen3's published layout to a temporary folder, quantises it with
both in turn, each in a process of its own, loads it with `quantize=`, and removes everything.
Medians of all runs. Peaks are MLX's own (`mx.get_peak_memory`), the resident set is the operating
system's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.progress import track

import mlx_loop
from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.checkpoints.quantise import parameters
from mlx_loop.models import get_classes
from mlx_loop.screens.cli import main as mlx_loop_main

SHARD = 1 << 30
WAYS = ["mlx_loop quantize", "mlx_lm.convert", "mlx_loop.load(quantize=4)"]


def write_checkpoint(folder: Path, size: float) -> int:
    """Random bfloat16 weights of about `size` bytes; returns the bytes written."""
    config = json.loads((DEMOS["demo"] / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 65536}
    # 2 bytes for each of 12.6 M weights in attention, 37.7 M in the MLP; and the embeddings.
    layers = max(1, round((size / 2 - 65536 * 2048) / 50.3e6))
    config |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    folder.mkdir()
    for file in DEMOS["demo"].glob("*token*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    cls, args_class = get_classes(config)
    shapes = {
        name: array.shape for name, array in parameters(cls(args_class.from_dict(config))).items()
    }
    # The same random numbers again and again: what they are changes neither memory nor time.
    numbers = mx.random.normal((1 << 20,), dtype=mx.bfloat16, scale=0.02)
    places: dict[str, str] = {}
    shard: dict[str, mx.array] = {}
    total = 0
    names = list(shapes)
    for name in names:
        count = math.prod(shapes[name])
        shard[name] = mx.tile(numbers, -(-count // numbers.size))[:count].reshape(shapes[name])
        mx.eval(shard[name])
        total += shard[name].nbytes
        if name == names[-1] or sum(array.nbytes for array in shard.values()) > SHARD:
            file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            mx.save_safetensors(str(folder / file), shard, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return total


def measure(what: str, source: str, target: str) -> None:
    """Do one of the three, in this process, and print its cost as JSON."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        if what == "mlx_loop quantize":
            mlx_loop_main(["quantize", "--model", source, "--mlx-path", target, "--q-bits", "4"])
        elif what == "mlx_lm.convert":
            import mlx_lm

            mlx_lm.convert(source, target, quantize=True, q_bits=4)
        else:
            mlx_loop.load_model(source, quantize=4)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    cost = {
        "peak": mx.get_peak_memory(),
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "seconds": seconds,
        "cpu": time.process_time(),
    }
    print(json.dumps(cost))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.3, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default %(default)s")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_checkpoint(folder / "source", args.gigabytes * 1e9)
        print(
            f"{size / 1e9:.2f} GB in bfloat16 to 4 bits, {os.cpu_count()}-core "
            f"{platform.machine()} {platform.system()}, {mx.default_device()}\n",
            flush=True,
        )
        source, target = folder / "source", folder / "target"
        costs: dict[str, list[dict[str, float]]] = {what: [] for what in WAYS}
        quantised = 0
        for what in track(WAYS * args.repeats, "quantising", console=Console(stderr=True)):
            command = [sys.executable, __file__, "--measure", what, str(source), str(target)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            costs[what].append(json.loads(done.stdout.splitlines()[-1]))
            if target.exists():
                quantised = sum(file.stat().st_size for file in target.glob("*.safetensors"))
                shutil.rmtree(target)
        print("| | peak, GB | peak / checkpoint | peak / quantised | resident, GB | CPU s | s |")
        print("|---|---|---|---|---|---|---|")
        for what, runs in costs.items():
            peak, resident, seconds, cpu = (
                statistics.median(run[name] for run in runs)
                for name in ("peak", "resident", "seconds", "cpu")
            )
            print(
                f"| {what} | {peak / 1e9:.2f} | {peak / size:.2f} | {peak / quantised:.2f} | "
                f"{resident / 1e9:.2f} | {cpu:.1f} | {seconds:.1f} |"
            )


if __name__ == "__main__":
    main()
