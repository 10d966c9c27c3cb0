"""The recipe `budget`: bits where the looped model's output needs them most.

Damage is measured, not guessed: the model is quantised as a whole, then one layer at a time gets
its full precision back, and the Kullback-Leibler divergence between the two outputs on a text is
what that layer's quantisation costs. A window layer is evaluated once per loop in this, so its
error counts as often as it does in use. Memory holds the quantised model and one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import get_total_parameters

from ..errors import UserError
from ..models.looped import Looped
from ..models.together import FEW, logits
from .quantise import (
    WIDTHS,
    Params,
    Quantization,
    choose,
    evaluate,
    layer_of,
    leaves,
    matrices,
    parameters,
    pieces,
    quantised_bytes,
)

TEXT = Path(__file__).parent / "calibration.txt"
LENGTH = 128  # tokens in a row
ROWS = 2


def encode(tokenizer: TokenizerWrapper, text: str | None = None) -> mx.array:
    """The first tokens of a text, (rows, tokens in a row) int; None: the text of the package.

    Raises:
        UserError: fewer than two tokens.
    """
    tokens = tokenizer.encode(TEXT.read_text() if text is None else text)[: ROWS * LENGTH]
    if len(tokens) < 2:
        raise UserError("the calibration text is empty: give a few hundred words")
    length = min(LENGTH, len(tokens))
    rows = len(tokens) // length
    return mx.array(tokens[: rows * length]).reshape(rows, length)


def budget(
    base: Looped,
    full: Looped,
    quantization: Quantization,
    tokens: mx.array,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Bits of each matrix, by path, for `quantization.bits_per_weight`.

    Args:
        base, full: the same checkpoint twice, from `open_checkpoint`; both are used up.
        tokens: (batch, length), int.
        progress: called with the layers measured and the layers in all.

    Raises:
        UserError: no mixture of widths has that many bits per weight.
    """
    group_size = quantization.group_size
    target = quantization.bits_per_weight
    assert target is not None
    sizes = Sizes(base, quantization)
    uniform = {bits: sizes.bits_per_weight(dict.fromkeys(sizes.free, bits)) for bits in WIDTHS}
    if not uniform[2] <= target <= uniform[8]:
        raise UserError(
            f"{target:g} bits per weight are not possible: this model has {uniform[2]:.2f} with "
            f"2 bits in groups of {group_size} and {uniform[8]:.2f} with 8"
        )
    width = max(bits for bits in WIDTHS if uniform[bits] <= target)
    found = damages(base, full, choose(base, Quantization(width, group_size)), tokens, progress)
    return sizes.spend(found, width, target)


def damages(
    base: Looped,
    full: Looped,
    chosen: Mapping[str, Params],
    tokens: mx.array,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """What quantising each matrix costs the looped model's output, in nats per token.

    The damage of a layer is shared out to its matrices by their numbers of weights.

    Args:
        base, full: the same checkpoint twice, from `open_checkpoint`; `base` is quantised here,
            `full` is read layer by layer and let go.
        chosen: how `base` is quantised, as `choose` returns it.
        tokens: (batch, length), int.
        progress: called with the layers measured and the layers in all.
    """
    units: dict[str, list[str]] = {}
    number = layer_of(base)
    for path in chosen:
        layer = number(path)
        units.setdefault(path if layer is None else str(layer), []).append(path)
    originals = matrices(full)
    weights = {path: originals[path].weight.size for path in chosen}
    # On the CPU MLX multiplies in bfloat16 far more slowly, and experts not at all.
    dtype = mx.float32 if mx.default_device() == mx.cpu else None
    evaluate(pieces(base, chosen, dtype))
    quantised = leaves(base)
    before = _log_probabilities(base, tokens)
    found: dict[str, float] = {}
    for done, paths in enumerate(units.values()):
        progress(done, len(units))
        repaired = {path: originals.pop(path) for path in paths}
        if dtype is not None:
            for module in repaired.values():
                module.set_dtype(dtype)
        base.update_modules(tree_unflatten(list(repaired.items())))
        damage = _divergence(_log_probabilities(base, tokens), before)
        for module in repaired.values():
            module.weight = mx.array([])
        base.update_modules(tree_unflatten([(path, quantised[path]) for path in paths]))
        mx.clear_cache()
        size = sum(weights[path] for path in paths)
        found |= {path: damage * weights[path] / size for path in paths}
    progress(len(units), len(units))
    return found


def _log_probabilities(model: Looped, tokens: mx.array) -> list[mx.array]:
    """For each few tokens (tokens, vocab), float32, evaluated."""
    found = []
    for row in tokens:
        state = model.in_turn(row[None])
        for start in range(0, row.size, FEW):
            said = logits(model, state[:, start : start + FEW])[0]
            found.append(nn.log_softmax(said.astype(mx.float32)))
            mx.eval(found[-1])
    return found


def _divergence(p: list[mx.array], q: list[mx.array]) -> float:
    """KL(p || q), the mean over tokens, in nats."""
    nats = [(mx.exp(a) * (a - b)).sum(axis=-1) for a, b in zip(p, q, strict=True)]
    return max(0.0, float(mx.mean(mx.concatenate(nats))))


class Sizes:
    """Bytes of a model for any widths of its matrices.

    Args:
        model: not quantised; nothing is evaluated.
        quantization: its group size and mode hold for all widths.

    Attributes:
        free: number of weights of each matrix whose width is to be chosen, by path.
    """

    def __init__(self, model: Looped, quantization: Quantization):
        every = {
            bits: choose(model, Quantization(bits, quantization.group_size)) for bits in (2, 8)
        }
        modules = matrices(model)
        self.free = {
            path: modules[path].weight.size
            for path, params in every[2].items()
            if params != every[8][path]  # else mlx-lm insists on a width.
        }
        self._bytes = {
            (path, bits): quantised_bytes(
                modules[path].weight.shape,
                modules[path].weight.dtype.size,
                {**every[2][path], "bits": bits},
            )
            for path in self.free
            for bits in WIDTHS
        }
        self._parameters = get_total_parameters(model)
        self._fixed = sum(array.nbytes for array in parameters(model).values())
        for path, params in every[2].items():
            weight = modules[path].weight
            self._fixed -= weight.nbytes
            if path not in self.free:
                self._fixed += quantised_bytes(weight.shape, weight.dtype.size, params)

    def bits_per_weight(self, widths: Mapping[str, int]) -> float:
        """As mlx-lm counts: all bytes of the model over all its weights."""
        size = self._fixed + sum(self._bytes[path, widths[path]] for path in self.free)
        return 8 * size / self._parameters

    def spend(self, damage: Mapping[str, float], width: int, target: float) -> dict[str, int]:
        """Widths for at most `target` bits per weight, the worst damage per byte repaired first.

        Args:
            damage: of each matrix at `width` bits. At other widths it follows the square of the
                step between two levels, as the error of a uniform quantiser does.
            width: bits at which the damage was measured; no matrix gets less than one bit less.
        """
        lowest = max(b for b in WIDTHS if b == 2 or b < width)
        widths = dict.fromkeys(self.free, lowest)
        left = int(target * self._parameters / 8) - self._fixed
        left -= sum(self._bytes[path, lowest] for path in self.free)
        while True:
            best, best_gain = None, -1.0
            for path, bits in widths.items():
                if bits == WIDTHS[-1]:
                    continue
                wider = WIDTHS[WIDTHS.index(bits) + 1]
                cost = self._bytes[path, wider] - self._bytes[path, bits]
                if cost > left:
                    continue
                gain = damage[path] * (_step(bits) ** 2 - _step(wider) ** 2) / cost
                if gain > best_gain:
                    best, best_gain = path, gain
            if best is None:
                return widths
            wider = WIDTHS[WIDTHS.index(widths[best]) + 1]
            left -= self._bytes[best, wider] - self._bytes[best, widths[best]]
            widths[best] = wider


def _step(bits: int) -> float:
    """The distance of two levels of a quantiser, in units of its range."""
    return 1 / (2**bits - 1)
