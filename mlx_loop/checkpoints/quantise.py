"""Quantising a model piece by piece, and the recipes that say which matrix gets how many bits.

MLX does the arithmetic (`to_quantized`); mlx-lm loads the result. MLX is lazy, so a checkpoint can
be larger than memory: a matrix is read when its quantised form is evaluated, and freed after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError
from ..method.anatomy import layer_paths
from ..models.looped import Looped

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# What MLX supports, and mlx-lm's defaults: mode -> (bits, group size).
MODES = {"affine": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
BIT_RECIPES = ("uniform", "window8", "budget")
# Achieved and asked bits per weight may differ by this before `budget` says why.
TOLERANCE = 0.05

Params = dict[str, Any]
"""Arguments of MLX's `to_quantized`: `bits`, `group_size`, `mode`; an entry of config.json."""


@dataclass(frozen=True)
class Quantization:
    """How a model is quantised.

    Args:
        bits: 2, 3, 4, 5, 6 or 8; None: the mode's own.
        group_size: weights that share a scale, 32, 64 or 128; None: the mode's own.
        mode: `affine`, or `mxfp4`, `nvfp4`, `mxfp8`, each of which has one width and group size.
        recipe: `uniform`; `window8`: the loop's window in 8 bits, because its error enters once
            per loop; `budget`: bits by measured sensitivity of the looped model's output.
        bits_per_weight: what `budget` may spend, scales included.

    Raises:
        UserError: a combination that MLX does not have.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str = "uniform"
    bits_per_weight: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} is not valid: use one of {', '.join(MODES)}")
        if self.recipe not in BIT_RECIPES:
            raise UserError(
                f"recipe {self.recipe!r} is not valid: use one of {', '.join(BIT_RECIPES)}"
            )
        bits, group_size = MODES[self.mode]
        for name, value, own, choices in (
            ("bits", self.bits, bits, WIDTHS),
            ("group_size", self.group_size, group_size, GROUP_SIZES),
        ):
            allowed = choices if self.mode == "affine" else (own,)
            if value is None:
                object.__setattr__(self, name, own)
            elif value not in allowed:
                shown = ", ".join(map(str, allowed))
                raise UserError(f"{name}={value} is not valid with mode {self.mode}: use {shown}")
        if (self.recipe == "budget") != (self.bits_per_weight is not None):
            raise UserError("the recipe budget and bits per weight need each other")
        if self.recipe == "budget" and self.mode != "affine":
            raise UserError("the recipe budget mixes widths, which only mode affine has")

    @property
    def params(self) -> Params:
        """What a matrix gets that the recipe does not single out."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        if self.recipe == "budget":
            return (
                f"budget of {self.bits_per_weight:g} bits per weight, groups of {self.group_size}"
            )
        width = f"{self.bits} bits" if self.mode == "affine" else self.mode
        rest = ", the loop's window in 8 bits" if self.recipe == "window8" else ""
        return f"{self.recipe}, {width}, groups of {self.group_size}{rest}"


def as_quantization(quantize: int | str | Quantization) -> Quantization:
    """A number of bits, or a mode, stands for the uniform recipe."""
    if isinstance(quantize, Quantization):
        return quantize
    return Quantization(mode=quantize) if isinstance(quantize, str) else Quantization(bits=quantize)


def quantised_bytes(shape: tuple[int, ...], itemsize: int, params: Params) -> int:
    """Bytes of a matrix, packed, with its scales and (affine) biases.

    Args:
        shape: of the unquantised weight, (..., rows, columns).
        itemsize: bytes of one unquantised weight; affine scales and biases have its type.
    """
    size = 1
    for n in shape:
        size *= n
    per_group = 2 * itemsize if params.get("mode", "affine") == "affine" else 1
    return size * params["bits"] // 8 + size // params["group_size"] * per_group


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """All arrays of a model, by full name."""
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have no modules in them, by path."""
    found = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module, destination={})
    return cast(dict[str, nn.Module], found)


def matrices(model: nn.Module) -> dict[str, Any]:
    """The modules that MLX can quantise, by path."""
    return {path: m for path, m in leaves(model).items() if hasattr(m, "to_quantized")}


def is_quantised(model: nn.Module) -> bool:
    """Whether any matrix is quantised already."""
    return any("scales" in module for module in leaves(model).values())


def layer_of(model: nn.Module) -> Callable[[str], int | None]:
    """Path of a module -> number of the layer that it is in; None: embeddings and head."""
    names = {tuple(map(str, path)): i for i, path in enumerate(layer_paths(model))}
    depths = {len(name) for name in names}

    def number(path: str) -> int | None:
        parts = tuple(path.split("."))
        return next((names[parts[:n]] for n in depths if parts[:n] in names), None)

    return number


def choose(
    model: Looped, quantization: Quantization, widths: Mapping[str, int] | None = None
) -> dict[str, Params]:
    """How each matrix is quantised, by path; one that is left out stays as it is.

    mlx-lm's own exceptions, such as a router in 8 bits, come before the recipe.

    Args:
        model: not quantised, its loop settings those that it will have; nothing is evaluated.
        widths: bits of each matrix under `budget` (`sensitivity.spend`).
    """
    exceptions = getattr(model, "quant_predicate", None)
    window = model.loop.layers if model.loop is not None else range(0)
    if quantization.recipe == "window8" and model.loop is None:
        raise UserError("the recipe window8 needs a loop: set loop settings or use uniform")
    chosen: dict[str, Params] = {}
    layer = layer_of(model)
    for path, module in matrices(model).items():
        params = dict(quantization.params)
        if quantization.recipe == "window8" and layer(path) in window:
            params |= {"bits": 8, "mode": "affine"}
            params["group_size"] = max(quantization.group_size or 64, GROUP_SIZES[0])
        elif widths is not None:
            params["bits"] = widths.get(path, params["bits"])
        verdict = exceptions(path, module) if exceptions else True
        if isinstance(verdict, Mapping):
            params = {"mode": "affine", **verdict}
        # mlx-lm leaves rows that are no whole number of groups as they are.
        if verdict and module.weight.shape[-1] % params["group_size"] == 0:
            chosen[path] = params
    if not chosen:
        raise UserError(
            f"no matrix has rows of whole groups of {quantization.group_size}: use a smaller "
            "group size"
        )
    return chosen


def section(quantization: Quantization, chosen: Mapping[str, Params]) -> dict[str, Any]:
    """The `quantization` section of config.json, as mlx-lm writes and reads it."""
    default = quantization.params
    if quantization.recipe == "budget":
        widths = [params["bits"] for params in chosen.values()]
        default["bits"] = max(set(widths), key=widths.count)
    return default | {path: params for path, params in chosen.items() if params != default}


@dataclass
class Piece:
    """Arrays of one module, evaluated together: what quantising holds in memory at a time.

    Args:
        name: the module's path.
        arrays: by full name, lazy.
        finite: whether what they are made of is; lazy.
        source: bytes of what they are made of.
    """

    name: str
    arrays: dict[str, mx.array]
    finite: list[mx.array]
    source: int

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def start(self) -> None:
        """Begin to read it, while others are computed."""
        mx.async_eval(self.arrays, self.finite)

    def evaluate(self) -> None:
        """Read, quantise, check.

        Raises:
            UserError: the weights hold NaN or infinity.
        """
        mx.eval(self.arrays, self.finite)
        if not all(flag.item() for flag in self.finite):
            raise UserError(f"{self.name} holds NaN or infinite weights: the checkpoint is damaged")
        self.finite = []
        mx.clear_cache()


def pieces(
    model: nn.Module, chosen: Mapping[str, Params], dtype: mx.Dtype | None = None
) -> list[Piece]:
    """Quantise `model` in place, lazily, and say in which pieces it can be evaluated.

    Args:
        chosen: as `choose` returns it; empty: nothing is quantised.
        dtype: of what stays unquantised, scales included; None: as stored.
    """
    checks: dict[str, list[mx.array]] = {}
    sources: dict[str, int] = {}
    for name, array in parameters(model).items():
        owner = name.rpartition(".")[0]
        sources[owner] = sources.get(owner, 0) + array.nbytes
        if mx.issubdtype(array.dtype, mx.floating):
            # Sums: a fraction of the time of a test of each weight. Down the rows they are twice
            # as fast as along them, but so many float16 numbers may overflow.
            axis = -1 if array.ndim < 2 or array.dtype == mx.float16 else -2
            summed = array.astype(mx.float32) if array.ndim < 2 else array
            total = summed.sum(axis=axis) if array.ndim else summed
            checks.setdefault(owner, []).append(mx.isfinite(total).all())
    nn.quantize(model, class_predicate=lambda path, _: chosen.get(path, False))
    if dtype is not None:
        model.set_dtype(dtype)
    found: dict[str, Piece] = {}
    for name, array in parameters(model).items():
        owner = name.rpartition(".")[0]
        if owner not in found:
            found[owner] = Piece(owner, {}, checks.pop(owner, []), sources[owner])
        found[owner].arrays[name] = array
    return list(found.values())


def evaluate(todo: list[Piece]) -> None:
    """Evaluate all pieces in memory; the list is emptied.

    The largest go first, while little else is there, so that the peak stays near the quantised
    size.

    Raises:
        UserError: as `Piece.evaluate`.
    """
    todo.sort(key=lambda piece: piece.source)
    while todo:
        todo.pop().evaluate()


def shards(todo: list[Piece], limit: int) -> list[list[Piece]]:
    """Pieces in order, grouped into files of at most `limit` bytes; a larger one has its own."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in todo:
        if not groups or size + piece.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.nbytes
    return groups
