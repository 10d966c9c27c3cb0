"""Looped logits of released models against PyTorch: transformers' own layers, looped by hooks.

    python benchmarks/released.py FOLDER [FOLDER ...] > table.md

Needs torch and transformers (the `train` extra). A folder holds a checkpoint that transformers
reads. The PyTorch side knows nothing of this package: a pass over the window is a whole forward
pass in which the window's first layer is given another state, from a copy of the cache. Everything
is float32; the measure is the largest difference of two logits over the largest logit.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from skills import markdown
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlx_loop
from mlx_loop import LoopConfig

TEXT = """The lighthouse keeper counted the ships that passed in the night. There were seven on
Monday, four on Tuesday and none on Wednesday, when the fog came. He wrote down their names in a
book with a blue cover, and beside each name the hour and the colour of its lamp."""
DECODED = 8  # Tokens at the end of the text that are fed one by one.

SETTINGS: list[LoopConfig | None] = [
    None,
    LoopConfig(loops=3),
    LoopConfig(loops=6, beta=0.25),
    LoopConfig(loops=4, integrator="euler", scope="layer"),
    LoopConfig(loops=2, integrator="naive"),
    LoopConfig(loops=3, cache="last"),
    LoopConfig(loops=3, cache="last", scope="layer"),
    LoopConfig(loops=3, norm="interpolated"),
]


class Loop:
    """A transformers model with loops around its layers."""

    def __init__(self, model: Any, loop: LoopConfig | None):
        self.model, self.loop = model, loop
        self.given: dict[int, torch.Tensor] = {}
        self.returned: dict[int, torch.Tensor] = {}
        self.instead_in: dict[int, torch.Tensor] = {}
        self.instead_out: dict[int, torch.Tensor] = {}
        layers = model.get_decoder().layers
        self.hooks = [
            hook
            for i, layer in enumerate(layers)
            for hook in (
                layer.register_forward_pre_hook(self._before(i), with_kwargs=True),
                layer.register_forward_hook(self._after(i)),
            )
        ]

    def _before(self, i: int) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any) -> Any:
            self.given[i] = args[0]
            return ((self.instead_in.get(i, args[0]), *args[1:]), kwargs)

        return hook

    def _after(self, i: int) -> Any:
        def hook(layer: Any, args: Any, out: Any) -> Any:
            self.returned[i] = out[0] if isinstance(out, tuple) else out
            state = self.instead_out.get(i, self.returned[i])
            return (state, *out[1:]) if isinstance(out, tuple) else state

        return hook

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def __call__(self, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits, and the cache with the entries that the key/value policy keeps."""
        done: dict[tuple[int, int], torch.Tensor] = {}
        for first, last in self._parts():
            done[first, last] = self._looped(tokens, cache, first, last, done)
        return self._pass(tokens, cache, done)

    def _parts(self) -> list[tuple[int, int]]:
        if self.loop is None:
            return []
        start, stop = self.loop.window
        size = stop - start if self.loop.scope == "block" else 1
        return [(i, i + size - 1) for i in range(start, stop, size)]

    def _looped(self, tokens: Any, cache: Any, first: int, last: int, done: Any) -> torch.Tensor:
        loop = self.loop
        assert loop is not None

        def g(x: torch.Tensor | None) -> torch.Tensor:
            self._pass(tokens, copy.deepcopy(cache), done, first if x is not None else None, x)
            return self.returned[last]

        natural = g(None)
        x0 = x = self.given[first]
        step = 1.0 if loop.integrator == "naive" else 1 / loop.loops
        sizes = [y.norm(dim=-1, keepdim=True) for y in (x0, natural)]
        gx = natural
        for k in range(1, loop.loops + 1):
            x = x + step * (gx - x)
            if k == loop.loops:
                break
            if loop.norm == "interpolated":
                target = sizes[0] + (sizes[1] - sizes[0]) * k / loop.loops
                x = x * target / x.norm(dim=-1, keepdim=True)
            gx = g(x)
        beta = loop.beta if loop.integrator == "anchored" else 0.0
        return beta * natural + (1 - beta) * x

    def _pass(
        self, tokens: Any, cache: Any, done: Any, at: int | None = None, x: Any = None
    ) -> tuple[torch.Tensor, Any]:
        self.instead_in = {} if at is None else {at: x}
        self.instead_out = {last: state for (_, last), state in done.items()}
        if self.loop is not None and self.loop.cache == "last":
            self.instead_in |= {first: state for (first, _), state in done.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers renames this argument.
            out = self.model(tokens, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values


def chunks(length: int) -> Iterator[slice]:
    """The prompt in one piece, then tokens one by one."""
    yield slice(0, length - DECODED)
    for i in range(length - DECODED, length):
        yield slice(i, i + 1)


def error(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(folder: Path) -> Iterator[tuple[str, float, float]]:
    """For each setting: its name, and the error of the prompt and of the decoded tokens."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = mlx_loop.load_model(folder, loop=None, dtype="float32")
    for loop in track(SETTINGS, folder.name, console=Console(stderr=True), transient=True):
        view = ours.with_loop(loop)
        cache, found = view.new_cache(), []
        other, kept, expected = Loop(theirs, view.loop), None, []
        with torch.no_grad():
            for part in chunks(len(ids)):
                logits, kept = other(torch.tensor([ids[part]]), kept)
                expected.append(logits[0].numpy())
                found.append(np.array(view(mx.array([ids[part]]), cache=cache)[0]))
        other.close()
        prompt, decoded = (
            error(np.concatenate(f), np.concatenate(e))
            for f, e in ((found[:1], expected[:1]), (found[1:], expected[1:]))
        )
        yield "un-looped" if view.loop is None else str(view.loop), prompt, decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    args = parser.parse_args()
    rows = [
        [folder.name, name, f"{prompt:.1e}", f"{decoded:.1e}"]
        for folder in args.folders
        for name, prompt, decoded in compare(folder)
    ]
    print(markdown(["model", "settings", "prompt", "decoded"], rows))


if __name__ == "__main__":
    main()
