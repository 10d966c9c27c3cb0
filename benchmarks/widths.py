"""Does looping amplify what quantisation does? Two sweeps of the same questions, compared.

    mlx_loop sweep --model MODEL --task choices:FILE --loops 4 ... --out stored.jsonl
    mlx_loop sweep --model QUANTISED --task choices:FILE --loops 4 ... --out quantised.jsonl
    python benchmarks/widths.py stored.jsonl quantised.jsonl

Of the log-probability of the right choice among the choices, in nats, paired by question: what
quantisation does un-looped, and for each setting what looping does at both widths and how much more
at the second. Intervals are 95 %, p is of the exact signed-rank test, uncorrected.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from mlx_loop.measure.results import key, read_rows
from mlx_loop.measure.significance import bootstrap_mean, signed_rank_p
from mlx_loop.settings import LoopConfig

SCORE = "log_p_among"


def scores(path: Path) -> dict[str, dict[str, float]]:
    """By settings and question."""
    found: dict[str, dict[str, float]] = {}
    for row in read_rows(path):
        if SCORE in row:
            found.setdefault(key(row["loop"]), {})[Path(row["item"]).as_posix()] = row[SCORE]
    return found


def said(values: np.ndarray) -> str:
    low, high = bootstrap_mean(values)
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs=2)
    args = parser.parse_args()
    stored, quantised = map(scores, args.files)
    every = [*stored.values(), *quantised.values()]
    items = sorted(set.intersection(*map(set, every)))
    print(f"{len(items)} questions\n")
    print("| setting | as stored | quantised | more | p |\n| --- | --- | --- | --- | --- |")
    plain = [np.array([of[key(None)][item] for item in items]) for of in (stored, quantised)]
    damage = plain[1] - plain[0]
    print(f"| un-looped |  |  | {said(damage)} | {signed_rank_p(damage):.2g} |")
    for name in stored:
        if name == key(None) or name not in quantised:
            continue
        effects = [
            np.array([of[name][item] for item in items]) - base
            for of, base in zip((stored, quantised), plain, strict=True)
        ]
        more = effects[1] - effects[0]
        title = str(LoopConfig.from_dict(json.loads(name)))
        cells = [title, *map(said, (*effects, more)), f"{signed_rank_p(more):.2g}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
