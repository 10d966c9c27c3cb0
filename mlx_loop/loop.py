"""The looped stack: prelude, window, coda, around the blocks of an mlx-lm model.

`Looped` goes in front of an mlx-lm model class and replaces only the walk through the layers.
Weights, their names and everything else stay mlx-lm's, so its loaders, adapters and converters
work. Which states a loop forms is the integrators' business; this file knows which layers a pass
runs, what it sees of the past and what it leaves for later tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from .cache import (
    FirstSideBySide,
    Own,
    Uncached,
    histories,
    own_entries,
    plain_entries,
    policy,
    position,
    rewind,
    side_by_side,
)
from .cache import check as check_cache
from .config import LoopConfig
from .errors import UserError
from .guard import Count, integrate_guarded
from .integrators import Between, integrate, is_natural, passes
from .phase import announce, prompt_end
from .presets import resolve
from .routing import MoEBlock, join_routing, with_frozen_routing


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
    _firings: Count | None = None

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
        self._firings = None if loop is None or loop.guard is None else Count()

    def with_loop(self, loop: LoopConfig | None) -> Looped:
        """Another view on the same weights, with loop settings of its own. Copies no array."""
        view = copy.copy(self)
        view.loop = loop
        return view

    @property
    def is_unlooped(self) -> bool:
        """Whether the settings amount to the plain model: none, K = 1, or `anchored` at beta 1."""
        return self._loop is None or is_natural(self._loop)

    def take_firings(self) -> tuple[int, int]:
        """How often the guard fired: (firings, tokens times loops), since the last call.

        Counted are calls with a cache, that is generation, of this view and those that
        `for_prompt` made of it. In layer scope each layer is a loop. (0, 0) without a guard.
        """
        return (0, 0) if self._firings is None else self._firings.take()

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
        h = self._embed(inputs, input_embeddings)
        looped = 0 if loop is None else self._count_looped(loop, cache, h.shape[1])
        # The tokens that loop come first and cannot see the others, so they go first.
        parts = [(h[:, :looped], True), (h[:, looped:], False)]
        outs = [self._walk(x, cache, loop, loops) for x, loops in parts if x.shape[1]]
        return self.logits(outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1))

    def masks(self, h: mx.array, caches: Sequence[Any]) -> Sequence[Any]:
        """The attention mask of each layer, as mlx-lm's own model makes it.

        Args:
            h: (batch, length, hidden).
            caches: a history per layer to which `h` is not yet written, or None.
        """
        raise NotImplementedError

    def _walk(
        self,
        h: mx.array,
        cache: Sequence[Any] | None,
        loop: LoopConfig | None,
        loops: bool,
        part: range | None = None,
        masks: Sequence[Any] | None = None,
    ) -> mx.array:
        """Layers in order, (batch, length, hidden) -> the same.

        Args:
            loop: None: there is no window.
            loops: whether these tokens loop, or pass the window once.
            part: the layers, which hold the whole window; None: all.
            masks: of all layers; None: they are made.
        """
        part = range(len(self.layers)) if part is None else part
        entries = [None] * len(self.layers) if cache is None else cache
        masks = self._masks(h, entries) if masks is None else masks
        window = part[:0] if loop is None else loop.layers
        h = self._through(range(part.start, window.start), h, masks, entries)
        if loop is not None:
            for inside in _parts(loop):
                h = self._window(h, inside, masks, entries, loop, loops)
        return self._through(range(window.stop, part.stop), h, masks, entries)

    def _through(
        self, layers: range, h: mx.array, masks: Sequence[Any], entries: Sequence[Any]
    ) -> mx.array:
        for i in layers:
            h = self.layers[i](h, masks[i], entries[i])
        return h

    def _masks(self, h: mx.array, entries: Sequence[Any]) -> Sequence[Any]:
        return self.masks(h, [entry and histories(entry)[0] for entry in entries])

    def logits(self, h: mx.array) -> mx.array:
        """States after all layers, (batch, length, hidden) -> logits (batch, length, vocab)."""
        h = self.model.norm(h)
        return self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)

    def _window(
        self,
        h: mx.array,
        part: range,
        masks: Sequence[Any],
        entries: Sequence[Any],
        loop: LoopConfig,
        loops: bool,
    ) -> mx.array:
        """The layers `part`, which are iterated as one."""
        layers = self._for_loop(part, loop) if loops else [self.layers[i] for i in part]
        kv = [policy(loop.cache, entries[i], h.shape[1]) for i in part]
        g = _Window(layers, [masks[i] for i in part], kv)
        h = self.run_loop(g, h, loop) if loops else g(h)
        if loops and loop.cache == "last" and entries[part[0]] is not None:
            # MLX is lazy: of this pass only keys and values are read, so of the last layer
            # nothing else is computed.
            g(h)
        for entry in kv:
            entry.close()
        return h

    def run_loop(self, g: _Window, x0: mx.array, loop: LoopConfig) -> mx.array:
        """One loop, x0 -> the state that leaves it, (batch, length, hidden) both.

        `trace` gives its view another one, which watches this.
        """
        if loop.guard is None:
            return integrate(g, x0, loop)
        out, fired = integrate_guarded(g, x0, loop, loop.guard)
        # Without a cache this may be training, and nothing may leave a compiled function.
        return out if self._firings is None or not g.cached else self._firings.add(fired, out)

    def _for_loop(self, part: range, loop: LoopConfig) -> list[nn.Module]:
        """These layers, as one loop over them needs them."""
        layers = [self.layers[i] for i in part]
        if loop.routing == "frozen" and self.moe is not None:
            return [with_frozen_routing(layer, self.moe) for layer in layers]
        return layers

    def _embed(self, tokens: mx.array, embeddings: mx.array | None = None) -> mx.array:
        if getattr(self.model, "pipeline_size", 1) > 1:
            raise UserError("a model split into a pipeline cannot loop: set loop=None")
        return self.model.embed_tokens(tokens) if embeddings is None else embeddings

    # --- The forward pass in two halves, for speculative decoding ---
    #
    # Up to the first natural pass the plain and the looped model do the same, so `enter` serves
    # both, and `leave_plain` and `leave_looped` go on from there. All need a model that loops,
    # one sequence, a cache that can be trimmed, and key/value policy `first` or `own`.

    def enter(self, tokens: mx.array, cache: Sequence[Any]) -> Natural:
        """Prelude and first natural pass of tokens (1, length), int; writes their entries there."""
        loop, h, past = self._looping(), self._embed(tokens), position(cache[0])
        part = _parts(loop)[0]
        masks = self._masks_at(past, h)
        entries = [histories(entry)[0] for entry in cache]
        x0 = h = self._through(range(part.start), h, masks, entries)
        layers, outputs = self._for_loop(part, loop), []
        for i, layer in zip(part, layers, strict=True):
            h = layer(h, masks[i], entries[i])
            outputs.append(h)
        return Natural(past, x0, outputs, layers)

    def leave_plain(self, natural: Natural, cache: Sequence[Any]) -> mx.array:
        """The plain model's logits (1, length, vocab); writes entries that are not the loop's."""
        part = _parts(self._looping())[0]
        h = natural.outputs[-1]
        masks = self._masks_at(natural.past, h)
        entries = [histories(entry)[0] for entry in cache]
        return self.logits(self._through(range(part.stop, len(cache)), h, masks, entries))

    def leave_looped(self, natural: Natural, cache: Sequence[Any]) -> mx.array:
        """The looped model's logits (1, length, vocab), as if each token had been fed alone.

        It replaces the entries that `leave_plain` wrote.
        """
        loop, h = self._looping(), natural.x0
        rewind(cache[_parts(loop)[0].stop :], natural.past)
        masks = self._masks_at(natural.past, h)
        for part in _parts(loop):
            h = self._window_side_by_side(h, part, masks, cache, loop, natural)
        return self.logits(self._through(range(loop.layers.stop, len(cache)), h, masks, cache))

    def _window_side_by_side(
        self,
        h: mx.array,
        part: range,
        masks: Sequence[Any],
        cache: Sequence[Any],
        loop: LoopConfig,
        natural: Natural,
    ) -> mx.array:
        """As `_window`, each token as if fed alone. Under `own` that is so for any tokens."""
        length, here = h.shape[1], [masks[i] for i in part]
        kv: list[Own | FirstSideBySide]
        if loop.cache == "own":
            kv, later = [Own(cache[i], length) for i in part], here
        else:
            kv = [FirstSideBySide(cache[i], length) for i in part]
            later = [side_by_side(mask, natural.past, length) for mask in here]
        if part.start == loop.layers.start:
            layers = natural.layers
            g = _Window(layers, here, kv, later, natural.outputs)
        else:
            layers = self._for_loop(part, loop)
            g = _Window(layers, here, kv, later)
        h = self.run_loop(g, h, loop)
        for entry in kv:
            entry.close()
        return h

    def _looping(self) -> LoopConfig:
        assert self._loop is not None
        return self._loop

    def _masks_at(self, past: int, h: mx.array) -> Sequence[Any]:
        """The masks of tokens that come after `past` others, whatever the cache holds already."""
        ruler = KVCache()
        ruler.offset = past
        return self.masks(h, [ruler] * len(self.layers))

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


@dataclass
class Natural:
    """What the plain and the looped pass over some tokens share: all up to the natural pass.

    Args:
        past: tokens before these.
        x0: (1, length, hidden), what enters the window.
        outputs: of each layer of what is iterated first, (1, length, hidden) each.
        layers: those layers; with frozen routing they know the experts that this pass chose.
    """

    past: int
    x0: mx.array
    outputs: list[mx.array]
    layers: list[nn.Module]

    @classmethod
    def join(cls, parts: Sequence[Natural], moe: MoEBlock | None) -> Natural:
        """One for the tokens of all parts, which follow each other."""
        layers = parts[0].layers
        if moe is not None:
            columns = zip(*(part.layers for part in parts), strict=True)
            layers = [join_routing(column, moe) for column in columns]
        outputs = zip(*(part.outputs for part in parts), strict=True)
        return cls(
            parts[0].past,
            mx.concatenate([part.x0 for part in parts], axis=1),
            [mx.concatenate(list(output), axis=1) for output in outputs],
            layers,
        )


class _Window:
    """g: one pass over some layers. It counts its evaluations for the key/value policy.

    Args:
        masks, later_masks: of the natural evaluation and of later ones; None: the same.
        outputs: of each layer in the natural evaluation, where that has been done; else none.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        masks: Sequence[Any],
        kv: Sequence[Any],
        later_masks: Sequence[Any] | None = None,
        outputs: Sequence[mx.array] = (),
    ):
        self._layers, self._kv, self._outputs = layers, kv, outputs
        self._masks, self._later_masks = masks, masks if later_masks is None else later_masks
        self.cached = not isinstance(kv[0], Uncached)
        self._evaluation = 0

    def __call__(self, x: mx.array, between: Between | None = None) -> mx.array:
        natural = self._evaluation == 0
        masks = self._masks if natural else self._later_masks
        for i, (layer, mask, kv) in enumerate(zip(self._layers, masks, self._kv, strict=True)):
            view = kv.view(self._evaluation)
            x = self._outputs[i] if natural and self._outputs else layer(x, mask, view)
            if between is not None:
                x = between(i, x)
        self._evaluation += 1
        return x


def _parts(loop: LoopConfig) -> list[range]:
    """The layers that are iterated as one: the whole window, or in layer scope one at a time."""
    size = len(loop.layers) if loop.scope == "block" else 1
    return [loop.layers[i : i + size] for i in range(0, len(loop.layers), size)]


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


# --- Several views at once ---


def forward(
    views: Sequence[Looped], tokens: mx.array, caches: Sequence[list[Any]] | None = None
) -> list[mx.array]:
    """States of each view after all layers; all tokens loop, as those of a prompt do.

    Args:
        views: of one model. Layers below a view's window are computed once for all views.
        tokens: (batch, length), int.
        caches: one for each view, as `share` left them; None: none.

    Returns:
        (batch, length, hidden) for each view; `Looped.logits` makes logits of them.
    """
    entries: Sequence[Any] = [None] * len(views) if caches is None else caches
    count, starts = len(views[0].layers), _starts(views)
    h = views[0].model.embed_tokens(tokens)
    # Before any layer writes: masks depend on how much a cache holds.
    masks = [
        view._masks(h, [None] * count if cache is None else cache)
        for view, cache in zip(views, entries, strict=True)
    ]
    outs, done = {}, 0
    for i in sorted(range(len(views)), key=starts.__getitem__):
        if starts[i] > done:
            h = views[i]._walk(h, entries[i], None, False, range(done, starts[i]), masks[i])
            done = starts[i]
        loop = None if views[i].is_unlooped else views[i].loop
        rest = range(done, count)
        outs[i] = views[i]._walk(h, entries[i], loop, True, rest, masks[i])
    return [outs[i] for i in range(len(views))]


def share(views: Sequence[Looped], caches: Sequence[list[Any]]) -> None:
    """Make caches of equal content one below the windows, as `forward` needs them."""
    starts = _starts(views)
    deepest = caches[starts.index(max(starts))]
    for cache, start in zip(caches, starts, strict=True):
        cache[:start] = deepest[:start]


def part(views: Sequence[Looped], caches: Sequence[list[Any]]) -> None:
    """Undo `share`. The arrays stay shared until one cache writes, and nothing is copied now."""
    for cache, start in zip(caches, _starts(views), strict=True):
        cache[:start] = copy.deepcopy(cache[:start])


def _starts(views: Sequence[Looped]) -> list[int]:
    """For each view, how many layers come before its window; all, where nothing loops."""
    count = len(views[0].layers)
    return [
        count if view.is_unlooped or view.loop is None else view.loop.layers.start for view in views
    ]
