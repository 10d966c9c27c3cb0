"""What a model needs of memory, from shapes alone.

Weights and caches are what MLX's own shape inference says of the lazy model, so they are exact;
activations follow a formula. One arithmetic for `load`, which refuses what cannot fit, and for
`mlx_loop plan`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ChunkedKVCache
from mlx_lm.utils import get_total_parameters

from ..errors import UserError
from ..generation.prefill import GPU_STEP
from ..method.anatomy import find, with_layers
from ..method.cache import leaves
from ..method.loop import layer_passes
from ..method.policies import POLICIES
from ..method.routing import watched
from ..models.looped import Looped
from ..upstream import EXPERTS
from .quantise import Params, layer_of, matrices, parameters, quantised_bytes

GIB = 1 << 30
# Sizes of a head for which MLX's attention kernel for Apple GPUs is fused.
FUSED_HEADS = (64, 80, 128)
# mlx-lm's caches grow by this many tokens.
CACHE_STEP = 256
# Tokens of context that a model must have room for to be worth loading.
LEAST_CONTEXT = 2048


def weights_bytes(model: nn.Module, chosen: Mapping[str, Params] | None = None) -> int:
    """Bytes of all parameters, as they are or quantised.

    Args:
        chosen: as `quantise.choose` returns it; None: as they are.
    """
    total = sum(array.nbytes for array in parameters(model).values())
    if chosen:
        modules = matrices(model)
        for path, params in chosen.items():
            weight = modules[path].weight
            total += quantised_bytes(weight.shape, weight.dtype.size, params) - weight.nbytes
    return total


def bits_per_weight(model: nn.Module, chosen: Mapping[str, Params] | None = None) -> float:
    """As mlx-lm counts: all bytes of the model, scales included, over all its weights."""
    return 8 * weights_bytes(model, chosen) / get_total_parameters(model)


@dataclass(frozen=True)
class History:
    """What one evaluation of one layer keeps: keys and values, or recurrent state.

    Args:
        values: numbers per token, of keys and values together.
        itemsize: bytes of a number.
        limit: the most tokens it keeps; None: all.
        state: bytes of recurrent state, whatever the number of tokens.
        head: numbers of a key and of a value.
    """

    values: int = 0
    itemsize: int = 0
    limit: int | None = None
    state: int = 0
    head: tuple[int, ...] = ()

    @classmethod
    def of(cls, cache: Any) -> History:
        """Of a cache to which a token was fed."""
        keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
        if keys is None or values is None:
            return cls(state=cache.nbytes)
        numbers = keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]
        limit = getattr(cache, "max_size", None)
        if isinstance(cache, ChunkedKVCache):
            # It grows in steps, and is cut back to a chunk when the next one begins.
            limit = cache.chunk_size + CACHE_STEP
        return cls(numbers, keys.dtype.size, limit, head=(keys.shape[3], values.shape[3]))

    def nbytes(self, tokens: int, kv_bits: int | None = None, kv_group_size: int = 64) -> int:
        """Bytes that mlx-lm's cache allocates for so many tokens."""
        if self.limit is not None and tokens >= self.limit:
            kept = self.limit
        else:
            kept = -(-tokens // CACHE_STEP) * CACHE_STEP
        if kv_bits is None or self.limit is not None:
            return self.state + kept * self.values * self.itemsize
        scales = 2 * self.itemsize * self.values // kv_group_size
        return self.state + kept * (self.values * kv_bits // 8 + scales)


@dataclass(frozen=True)
class _Experts:
    """The experts of a layer.

    Args:
        path: of the module that holds them.
        used, number: for a token, and in all.
        width: numbers of one expert's intermediate array.
    """

    path: str
    used: int
    number: int
    width: int


@dataclass(frozen=True)
class _Survey:
    """What feeding a token shows; nothing is evaluated."""

    histories: list[History]
    experts: list[_Experts]

    @classmethod
    def of(cls, model: Looped) -> _Survey:
        """Under the model's loop settings."""
        used: dict[str, int] = {}
        # A view of its own: what its guard does is not the model's.
        view = model.with_loop(model.loop)
        places = find(view, lambda module: isinstance(module, EXPERTS))
        for path, module in places.items():
            places[path] = watched(module, partial(_note, used, ".".join(map(str, path))))
        cache = view.new_cache()
        seen = with_layers(view, places).for_prompt(cache, 1)
        seen(mx.zeros((1, 1), mx.int32), cache=cache)
        modules = dict(model.named_modules())
        experts = []
        for name, count in used.items():
            up: Any = modules[name].get("up_proj") or modules[name]["fc1"]
            experts.append(_Experts(name, count, up.num_experts, up.output_dims))
        return cls([History.of(leaf) for leaf in leaves(cache)], experts)


class Footprint:
    """What a lazily loaded model needs under its loop settings; no weight is read.

    Args:
        model: as `loading.open_checkpoint` returns it, quantised or not.
        chosen: how it is to be quantised; None: it stays as it is.
        fused: whether attention keeps no scores in memory, as MLX's kernels for Apple GPUs do
            for heads of 64, 80 and 128 numbers; None: as the default device does it. On the
            CPU it keeps them.

    Attributes:
        weights: bytes of the weights.
        bits_per_weight: as mlx-lm counts, scales included.
    """

    def __init__(
        self, model: Looped, chosen: Mapping[str, Params] | None = None, fused: bool | None = None
    ):
        self._model, self.chosen = model, chosen or {}
        self.weights = weights_bytes(model, chosen)
        self.bits_per_weight = bits_per_weight(model, chosen)
        self._survey = _Survey.of(model)
        self._shape = _Shape.of(model, self._survey)
        gpu = mx.default_device() == mx.gpu if fused is None else fused
        self._fused = gpu and self._shape.head in FUSED_HEADS

    def cache(self, tokens: int, kv_bits: int | None = None, kv_group_size: int = 64) -> int:
        """Bytes of the cache after so many tokens."""
        histories = self._survey.histories
        return sum(history.nbytes(tokens, kv_bits, kv_group_size) for history in histories)

    def activations(self, step: int, context: int, kv_bits: int | None = None) -> int:
        """Bytes of intermediate arrays at once, while a prompt is processed.

        MLX hands out memory some operations ahead, so the projections of attention and of the
        MLP after it count together.

        Args:
            step: prompt tokens at a time.
            context: tokens that the last of them attend to.
        """
        s = self._shape
        attention = 2 * s.hidden + 3 * s.queries + 2 * s.values
        total = step * (attention + s.mlp) * s.itemsize
        if s.latent:
            # Scores of positions are an additive mask, beside those of contents; keys and values
            # are expanded for all heads.
            total += 2 * s.heads * step * context * s.itemsize + context * s.queries * s.itemsize
        elif kv_bits is not None or not self._fused:
            total += s.heads * step * context * s.itemsize + step * context
            total += 2 * context * s.values * s.itemsize
        return total + self.loop_extra(step)

    def loop_extra(self, step: int) -> int:
        """Bytes of `activations` that looping adds: states, and keys and values to restore.

        Args:
            step: prompt tokens at a time.
        """
        loop = self._model.loop
        if loop is None or self._model.is_unlooped:
            return 0
        s = self._shape
        together = max(map(len, loop.windows)) if loop.scope == "block" else 1
        kept = together * s.values * s.itemsize if POLICIES[loop.cache].restores else 0
        return step * (2 * s.hidden * 4 + kept)

    def peak(self, context: int, step: int = GPU_STEP, kv_bits: int | None = None) -> int:
        """Bytes at most, while a prompt that fills the context is processed.

        Args:
            step: prompt tokens at a time.
        """
        step = min(step, context)
        whole, rest = divmod(context - 1, step)  # mlx-lm feeds the last token alone.
        chunks = [(step, whole * step), (rest, context)]
        return self.weights + max(
            self.cache(end, kv_bits) + self.activations(length, end, kv_bits)
            for length, end in chunks
        )

    def longest(self, limit: int, kv_bits: int | None = None) -> int:
        """The longest context whose peak is at most `limit` bytes; 0: not even the shortest."""
        low, high = 0, (trained_length(self._model) or 1 << 20) // CACHE_STEP
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak(middle * CACHE_STEP, kv_bits=kv_bits) <= limit:
                low = middle
            else:
                high = middle - 1
        return low * CACHE_STEP

    def read_per_token(self, context: int) -> int:
        """Bytes of weights and cache that generating one token reads: the least time it takes.

        Of experts only those that a token uses, and looped layers once per loop.
        """
        model = self._model
        layers = [0.0] * len(model.layers)
        rest = 0.0
        modules, number = matrices(model), layer_of(model)
        for name, array in parameters(model).items():
            path = name.rpartition(".")[0]
            size: float = array.nbytes
            if name.endswith(".weight") and path in self.chosen:
                weight = modules[path].weight
                size = quantised_bytes(weight.shape, weight.dtype.size, self.chosen[path])
            layer = number(path)
            if layer is not None:
                layers[layer] += size * self._share_used(path)
            elif "embed_tokens" not in path or "lm_head" not in model:
                rest += size
        loop = None if model.loop is None or model.loop.decode == "bypass" else model.loop
        passes = layer_passes(loop, len(layers))
        window = [layers[i] for i in loop.layers] if loop else [0.0]
        extra = (passes - len(layers)) * sum(window) / len(window)
        return int(rest + sum(layers) + extra) + self.cache(context)

    def _share_used(self, path: str) -> float:
        """The share of a module that one token reads: of experts, those chosen for it."""
        for experts in self._survey.experts:
            if path.startswith(experts.path + "."):
                return experts.used / experts.number
        return 1.0


@dataclass(frozen=True)
class _Shape:
    """Numbers per token of the arrays in a layer.

    Args:
        hidden, queries, values, mlp: numbers of the residual stream; of all heads' queries; of
            keys and values as cached; of an MLP's intermediate arrays together.
        heads, head: number of query heads and the size of each.
        itemsize: bytes of a number.
        latent: latent attention whose cache holds the compressed form.
    """

    hidden: int
    queries: int
    values: int
    mlp: int
    heads: int
    head: int
    itemsize: int
    latent: bool

    @classmethod
    def of(cls, model: Looped, survey: _Survey) -> _Shape:
        hidden = _number(model, "hidden_size", "d_model", "n_embd", "model_dim", "hidden_dim")
        heads = _number(model, "num_attention_heads", "n_heads", "n_head", "num_heads")
        history = max(survey.histories, key=lambda history: history.values)
        rotated = _number(model, "qk_rope_head_dim")
        head = max(history.head, default=0)
        if rotated:
            head = _number(model, "qk_nope_head_dim") + rotated
        wide = _number(model, "intermediate_size", "ffn_hidden_size", "n_inner") or 4 * hidden
        mixed = [2 * e.used * (hidden + e.width) for e in survey.experts]
        dense = [4 * hidden + 2 * wide] if len(mixed) < len(model.layers) else []
        compressed = any(name.endswith("embed_q") for name, _ in model.named_modules())
        return cls(
            hidden,
            heads * head,
            history.values,
            max(mixed + dense),
            heads,
            head,
            history.itemsize or 2,
            compressed,
        )


def _note(used: dict[str, int], name: str, chosen: mx.array) -> None:
    used[name] = chosen.shape[-1]


def _number(model: Looped, *names: str) -> int:
    """An argument of the model's, or its text model's, by one of its names; 0: it has none."""
    args: Any = getattr(model, "args", None) or getattr(model, "config", None)
    inner = getattr(args, "text_config", None)
    for values in (vars(args), inner if isinstance(inner, dict) else vars(inner) if inner else {}):
        found = next((values[name] for name in names if isinstance(values.get(name), int)), None)
        if found is not None:
            return int(found)
    return 0


def trained_length(model: Looped) -> int:
    """Tokens of the longest context that a model was trained on; 0: it does not say."""
    name = "max_position_embeddings"
    # Not every type of mlx-lm's keeps it among its arguments.
    config = model.checkpoint.config if model.checkpoint is not None else {}
    for values in (config, config.get("text_config")):
        found = values.get(name) if isinstance(values, Mapping) else None
        if type(found) is int and found > 0:
            return found
    return _number(model, name)


def usable(ram: int) -> int:
    """Bytes that macOS lets the GPU use of so many bytes of memory.

    Metal's recommended working set as Macs report it: two thirds up to 32 GiB, three quarters
    above. Newer systems allow somewhat more (107.5 of 128 GiB on macOS 26).
    """
    return ram * 2 // 3 if ram <= 32 * GIB else ram * 3 // 4


def limit() -> int:
    """Bytes that this machine can use: Metal's recommended working set, else all memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def refuse_what_does_not_fit(model: Looped, name: str) -> None:
    """Refuse, before a weight is read, a model that cannot run here.

    Args:
        model: lazy, quantised (lazily) if it is to be.
        name: what the user calls it.

    Raises:
        UserError: with what would help.
    """
    footprint, most = Footprint(model), limit()
    context = min(LEAST_CONTEXT, trained_length(model) or LEAST_CONTEXT)
    needed = footprint.peak(context)
    if needed <= most:
        return
    raise UserError(
        f"{name} needs {needed / 1e9:.1f} GB with {context} tokens of context, and "
        f"{most / 1e9:.1f} GB can be used here: `mlx_loop plan {name}` shows what fits, "
        "`mlx_loop quantize` makes it smaller; --force (force=True) tries anyway"
    )
