"""The looped stack: prelude, window, coda, around the blocks of an mlx-lm model.

`Looped` goes in front of an mlx-lm model class and replaces only the walk through the layers.
Weights, their names and everything else stay mlx-lm's, so its loaders, adapters and converters
work. Which states a loop forms is the integrators' business; this file knows which layers a pass
runs, what it sees of the past and what it leaves for later tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from .cache import check as check_cache
from .cache import histories, own_entries, plain_entries, policy, position
from .config import LoopConfig
from .errors import UserError
from .integrators import Between, integrate, is_natural, passes
from .kernels import RMSNorm, on_gpu
from .phase import announce, prompt_end
from .presets import resolve
from .routing import MoEBlock, with_frozen_routing


class Looped(nn.Module):
    """Mixin in front of an mlx-lm `Model`: `class Qwen3(Looped, qwen3.Model)`.

    A subclass names its `family` and mlx-lm's `args_class`, says which mask each layer takes
    (`masks`) and, if it has experts, how its routing is frozen (`moe`).

    Attributes:
        config, path: the checkpoint's config.json and folder; empty and None for a model that
            was not loaded from one.
    """

    family: ClassVar[str]
    args_class: ClassVar[type]
    moe: ClassVar[MoEBlock | None] = None
    # Whether mlx-lm's attention of this family reads quantised keys and values.
    quantised_cache: ClassVar[bool] = True
    config: Mapping[str, Any] = MappingProxyType({})
    path: Path | None = None

    model: Any
    model_type: str
    layers: Sequence[nn.Module]
    lm_head: Any

    _loop: LoopConfig | None = None
    _prompt_end: int | None = None

    # --- Settings ---

    @property
    def loop(self) -> LoopConfig | None:
        """The loop settings, complete; None: looping is off. Partial ones may be assigned."""
        return self._loop

    @loop.setter
    def loop(self, loop: LoopConfig | None) -> None:
        if loop is not None:
            loop = resolve(loop, self.model_type, self.family, len(self.layers))
        self._loop = loop

    def with_loop(self, loop: LoopConfig | None) -> Looped:
        """Another view on the same weights, with loop settings of its own. Copies no array."""
        view = copy.copy(self)
        view.loop = loop
        return view

    @property
    def is_unlooped(self) -> bool:
        """Whether the settings amount to the plain model: none, K = 1, or `anchored` at beta 1."""
        return self._loop is None or is_natural(self._loop)

    # --- Where the prompt ends ---

    def begin_decode(self, cache: Sequence[Any]) -> None:
        """Say that the prompt is complete: single tokens fed from now on were generated.

        It matters where `decode` is not `full`. A later call with several tokens starts the next
        prompt. `mlx_loop.generate` and the commands say it themselves.
        """
        announce(cache, position(cache[0]))

    def for_prompt(self, cache: Sequence[Any], length: int) -> Looped:
        """A view for one generation: of what it is fed with `cache`, the next `length` tokens are
        the prompt and all later ones generated, however they are split into calls.
        """
        view = copy.copy(self)
        view._prompt_end = position(cache[0]) + length
        return view

    def _count_looped(self, loop: LoopConfig, cache: Sequence[Any] | None, length: int) -> int:
        """How many of the next `length` tokens loop; they are the first ones."""
        if loop.decode == "full" or cache is None:
            return length
        end = prompt_end(cache, length) if self._prompt_end is None else self._prompt_end
        generated = 0 if loop.decode == "bypass" else int(loop.decode or 0)
        return min(max(end + generated - position(cache[0]), 0), length)

    # --- The forward pass ---

    def __call__(
        self,
        inputs: mx.array,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Tokens (batch, length), int -> logits (batch, length, vocab), model dtype.

        Args:
            cache: one entry per layer, from mlx-lm's `make_prompt_cache(model)`; it is updated.
            input_embeddings: (batch, length, hidden), instead of the tokens' own.

        Raises:
            UserError: the cache was made for other loop settings; `decode` needs to know where
                the prompt ends and nobody said; or the layers are spread over a pipeline.
        """
        if cache is not None:
            check_cache(cache, self._loop, self._histories())
        loop = None if self.is_unlooped else self._loop
        if loop is None and input_embeddings is None:
            return super().__call__(inputs, cache)
        if getattr(self.model, "pipeline_size", 1) > 1:
            raise UserError("a model split into a pipeline cannot loop: set loop=None")
        h = self.model.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        looped = 0 if loop is None else self._count_looped(loop, cache, h.shape[1])
        # The tokens that loop come first and cannot see the others, so they go first.
        parts = [(h[:, :looped], True), (h[:, looped:], False)]
        outs = [self._walk(x, cache, loop, loops) for x, loops in parts if x.shape[1]]
        h = self.model.norm(outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1))
        return self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)

    def masks(self, h: mx.array, caches: Sequence[Any]) -> Sequence[Any]:
        """The attention mask of each layer, as mlx-lm's own model makes it.

        Args:
            h: (batch, length, hidden).
            caches: a history per layer to which `h` is not yet written, or None.
        """
        raise NotImplementedError

    def _walk(
        self, h: mx.array, cache: Sequence[Any] | None, loop: LoopConfig | None, loops: bool
    ) -> mx.array:
        """All layers, (batch, length, hidden) -> the same.

        Args:
            loop: None: there is no window.
            loops: whether these tokens loop, or pass the window once.
        """
        layers = self.layers
        entries = [None] * len(layers) if cache is None else cache
        masks = self.masks(h, [entry and histories(entry)[0] for entry in entries])
        window = range(0) if loop is None else loop.layers
        for i in range(window.start):
            h = layers[i](h, masks[i], entries[i])
        if loop is not None:
            size = len(window) if loop.scope == "block" else 1
            for i in window[::size]:
                part = slice(i, i + size)
                h = self._window(h, layers[part], masks[part], entries[part], loop, loops)
        for i in range(window.stop, len(layers)):
            h = layers[i](h, masks[i], entries[i])
        return h

    def _window(
        self,
        h: mx.array,
        layers: Sequence[nn.Module],
        masks: Sequence[Any],
        entries: Sequence[Any],
        loop: LoopConfig,
        loops: bool,
    ) -> mx.array:
        """What is iterated as one: the whole window, or in layer scope one of its layers."""
        if loops and loop.routing == "frozen" and self.moe is not None:
            layers = [with_frozen_routing(layer, self.moe) for layer in layers]
        kv = [policy(loop.cache, entry, h.shape[1]) for entry in entries]
        g = _Window(layers, masks, kv)
        h = integrate(g, h, loop, _norm(layers[0])) if loops else g(h)
        if loops and loop.cache == "last" and entries[0] is not None:
            # MLX is lazy: of this pass only keys and values are read, so of the last layer
            # nothing else is computed.
            g(h)
        for entry in kv:
            entry.close()
        return h

    # --- Caches ---

    @property
    def make_cache(self) -> Any:
        """mlx-lm's hook of models that need caches of their own; absent where that is not so."""
        if self._histories() > 1:
            return lambda: self.new_cache()
        return super().make_cache  # type: ignore[misc]

    def new_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """An empty cache, one entry per layer.

        Args:
            max_kv_size: the most tokens that a layer keeps, mlx-lm's rotating cache; it keeps
                the first few and the latest. None: all.
        """
        native = getattr(super(), "make_cache", None)
        entries = plain_entries(native() if native else len(self.layers), max_kv_size)
        if self._loop is None or self._histories() == 1:
            return entries
        return own_entries(entries, self._loop.layers, self._histories())

    def _histories(self) -> int:
        """Histories that each window layer keeps."""
        if self._loop is None or self._loop.cache != "own" or self.is_unlooped:
            return 1
        return passes(self._loop)


class _Window:
    """g: one pass over some layers. It counts its evaluations for the key/value policy."""

    def __init__(self, layers: Sequence[Any], masks: Sequence[Any], kv: Sequence[Any]):
        self._blocks = list(zip(layers, masks, kv, strict=True))
        self._evaluation = 0

    def __call__(
        self, x: mx.array, between: Between | None = None, normed: mx.array | None = None
    ) -> mx.array:
        for i, (layer, mask, kv) in enumerate(self._blocks):
            if i == 0 and normed is not None:
                layer = _with_normed_input(layer, normed)
            x = layer(x, mask, kv.view(self._evaluation))
            if between is not None:
                x = between(i, x)
        self._evaluation += 1
        return x


def _norm(layer: Any) -> RMSNorm | None:
    """What a layer begins with, if an update can take it along, which pays where it is a kernel."""
    norm = layer.get("input_layernorm") if on_gpu() else None
    return RMSNorm(norm.weight, norm.eps) if type(norm) is nn.RMSNorm else None


def _with_normed_input(layer: nn.Module, normed: mx.array) -> nn.Module:
    """A copy of `layer`, sharing all weights, for an input whose RMSNorm is at hand."""
    stand_in = copy.copy(layer)
    stand_in["input_layernorm"] = lambda x: normed
    return stand_in


def layer_passes(loop: LoopConfig | None, num_layers: int) -> int:
    """Layer evaluations for one looped token; a pass for keys and values alone counts as none.

    The cost of a loop on a device where reading weights is what takes time:
    `layer_passes(loop, n) / n` is the time per token relative to the plain model's layers.
    """
    if loop is None or is_natural(loop):
        return num_layers
    extra = len(loop.layers) * (passes(loop) - 1)
    if loop.cache == "last" and loop.scope == "block":
        extra += len(loop.layers) - 1
    return num_layers + extra
