"""A looped model: mlx-lm's model class with `Looped` in front.

Weights, their names and everything else stay mlx-lm's, so its loaders, adapters and converters
work, and its own forward pass runs (`walk`) with the window's layers iterated (`loop`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from .. import upstream
from ..errors import UserError
from ..method.anatomy import Anatomy, at, stream, survey
from ..method.cache import limited, repeated
from ..method.guard import Count
from ..method.loop import Observer, Run
from ..method.phase import How, announce, prompt_end, seen, spans
from ..method.plan import is_natural
from ..method.walk import Walk
from ..presets import resolve
from ..settings import LoopConfig, LoopLike, ResolvedLoop, as_loop
from . import histories, pipeline
from .gate import Share, gated


@dataclass(frozen=True)
class Checkpoint:
    """Where a model was loaded from.

    Args:
        path: its folder.
        config: its config.json.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)


class _Known:
    """What all views of a model know of it."""

    anatomy: Anatomy | None = None
    vocabulary: int | None = None
    part: Anatomy | None = None


class Looped(nn.Module):
    """Mixin in front of an mlx-lm `Model`.

    Attributes:
        checkpoint: what the model was loaded from; None: it was made by hand.
        observer: watches every loop (`loop.Observer`); None: nobody does.
        stages: which layers are on which machine; None: all of them on each.
    """

    checkpoint: Checkpoint | None = None
    observer: Observer | None = None
    stages: pipeline.Stages | None = None

    model_type: str
    layers: Sequence[nn.Module]

    _loop: ResolvedLoop | None = None
    _here: ResolvedLoop | None = None
    _prompt_end: int | None = None
    _firings: Count | None = None
    _make_cache: Callable[[], list[Any]] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._known = _Known()
        self._share = Share()

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> nn.Module:
        """MLX's own, which looks at names and shapes; integers are refused where floats belong."""
        given = file_or_weights if isinstance(file_or_weights, list) else []
        own: dict[str, mx.array] = dict(tree_flatten(self.parameters()))
        for name, array in given:
            kinds = {mx.issubdtype(x.dtype, mx.floating) for x in (array, own.get(name, array))}
            if len(kinds) > 1:
                raise UserError(f"{name} is of type {array.dtype}, which is not the model's")
        return super().load_weights(file_or_weights, strict)

    # --- Settings ---

    @property
    def anatomy(self) -> Anatomy:
        """How mlx-lm's forward pass uses the layers; of a pipeline, those that are here.

        Raises:
            UserError: a model type whose layers cannot be iterated.
        """
        if self.stages is None:
            return self.whole
        if self._known.part is None:
            self._known.part = pipeline.part(self.whole, self.stages.here)
        return self._known.part

    @property
    def depth(self) -> int:
        """How many layers there are, on all machines."""
        return len(self.layers) if self.stages is None else self.stages.all[-1].stop

    @property
    def whole(self) -> Anatomy:
        """The `anatomy` of all layers, on whatever machine.

        Raises:
            UserError: as `anatomy`.
        """
        known = self._known.anatomy
        if self.stages is not None and known is not None:
            return known
        holders = self.modules() if known is None else [at(self, known.layers[0].path[:-2])]
        if any(getattr(holder, "pipeline_size", 1) > 1 for holder in holders):
            raise UserError(
                "a pipeline that mlx-lm has made cannot loop: load the model with group and "
                "pipeline=True, or set loop=None"
            )
        if known is None:
            known = self._known.anatomy = survey(self, _forward)
        return known

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model has an embedding for; None: that cannot be told."""
        if self._known.vocabulary is None:
            kinds = nn.Embedding | nn.QuantizedEmbedding
            tables = (module for module in self.modules() if isinstance(module, kinds))
            self._known.vocabulary = max((table.weight.shape[0] for table in tables), default=None)
        return self._known.vocabulary

    @property
    def loop(self) -> ResolvedLoop | None:
        """The loop settings, complete; None: looping is off.

        Partial ones may be assigned, or a number of loops, or a dict of fields (`as_loop`).
        """
        return self._loop

    @loop.setter
    def loop(self, loop: LoopConfig | None) -> None:
        resolved = None
        if loop is not None:
            anatomy = self.whole
            resolved = resolve(loop, self.model_type, len(anatomy.layers), anatomy.mixes_experts)
            if not is_natural(resolved):
                anatomy.check_loop(resolved)
                if self.stages is not None:
                    pipeline.check(resolved, self.stages.all)
        self._loop = self._here = resolved
        if resolved is not None and self.stages is not None:
            self._here = pipeline.loop_of(resolved, self.stages.here)
        self._share = Share()
        self._firings = None if resolved is None or resolved.guard is None else Count()

    def __setattr__(self, name: str, value: Any) -> None:
        # MLX takes dicts and lists for parameters before a property sees them.
        super().__setattr__(name, as_loop(value) if name == "loop" else value)

    def with_loop(self, loop: LoopLike) -> Looped:
        """Another view on the same weights, with loop settings of its own. Copies no array."""
        view = copy.copy(self)
        view.loop = as_loop(loop)
        return view

    @property
    def here(self) -> ResolvedLoop | None:
        """The settings under which layers of this machine loop, with the window as they are
        numbered here; None: none of them loops.
        """
        return None if self.is_unlooped else self._here

    @property
    def is_unlooped(self) -> bool:
        """Whether the settings amount to the plain model: none, K = 1, or `anchored` at beta 1."""
        return self._loop is None or is_natural(self._loop)

    @property
    def leaves_prompts_plain(self) -> bool:
        """Whether a prompt leaves in the cache what it leaves without a loop."""
        loop = None if self.is_unlooped else self._loop
        return loop is None or (loop.prompt == "plain" and loop.cache == "first")

    @property
    def tells_tokens_apart(self) -> bool:
        """Whether an answer's tokens pass in another way than a prompt's."""
        loop = None if self.is_unlooped else self._loop
        return loop is not None and (loop.decode, loop.prompt, loop.gate) != (
            "full",
            "looped",
            None,
        )

    def take_firings(self) -> tuple[int, int]:
        """How often the guard fired: (firings, tokens times loops), since the last call.

        Counted are calls with a cache, that is generation, of this view and those that
        `for_prompt` made of it. In layer scope each layer is a loop. (0, 0) without a guard.
        """
        return (0, 0) if self._firings is None else self._firings.take()

    def take_share(self) -> tuple[int, int]:
        """How many of the answer's tokens the `gate` let loop: (looped, all), since the last call.

        Of this view and those that `for_prompt` made of it. (0, 0) without a gate.
        """
        return self._share.take()

    # --- Where the prompt ends ---

    def begin_decode(self, cache: list[Any]) -> None:
        """Say that the prompt is complete: single tokens fed from now on were generated.

        It matters where `decode` is not `full`, and with `prompt` and `gate`. A later call with
        several tokens starts the next prompt. `mlx_loop.generate` and the commands say it
        themselves.
        """
        announce(cache, seen(cache))

    def for_prompt(self, cache: Sequence[Any], length: int) -> Looped:
        """A view for one generation: of what it is fed with `cache`, the next `length` tokens are
        the prompt and all later ones generated, however they are split into calls.
        """
        view = copy.copy(self)
        view._prompt_end = seen(cache) + length
        return view

    def _spans(
        self, loop: ResolvedLoop, cache: list[Any] | None, length: int
    ) -> list[tuple[slice, How]]:
        """How the next `length` tokens pass."""
        if cache is None or not self.tells_tokens_apart:
            return [(slice(0, length), "looped")]
        end = self._prompt_end
        if end is None:
            end = prompt_end(cache, length, warns=loop.decode != "full")
        return spans(loop, seen(cache, length), length, end)

    # --- The forward pass ---

    def __call__(
        self, inputs: mx.array | None, cache: list[Any] | None = None, **kwargs: Any
    ) -> mx.array:
        """Tokens (batch, length), int -> logits (batch, length, vocab), model dtype.

        Args:
            inputs: None, where mlx-lm's model needs embeddings only.
            cache: one entry per layer, from mlx-lm's `make_prompt_cache(model)`; it is updated.
            kwargs: what else mlx-lm's model takes; arrays with the tokens along their second axis.

        Raises:
            UserError: the cache was made for other loop settings, or the layers are spread over a
                pipeline.
        """
        if cache is not None:
            histories.check_histories(self, cache)
        loop = None if self.is_unlooped else self._loop
        if loop is None:
            return _forward(self, inputs, cache, **kwargs)
        given = [value for value in (inputs, *kwargs.values()) if isinstance(value, mx.array)]
        length = max(array.shape[1] for array in given)
        outs = []
        for part, how in self._spans(loop, cache, length):
            tokens, rest = _part(inputs, part), {n: _part(v, part) for n, v in kwargs.items()}
            run = partial(self._run, tokens, cache, rest)
            if how == "gated":
                assert cache is not None
                outs.append(gated(self, tokens, cache, run, self._share))
            else:
                outs.append(run(how == "looped"))
            if self.stages is not None and len(outs) > 1:
                # Machines have to pass on the parts in the same order.
                mx.eval(outs)
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1)

    def _run(
        self, tokens: mx.array | None, cache: list[Any] | None, kwargs: dict[str, Any], loops: bool
    ) -> mx.array:
        walk = self.walk()
        if self.here is not None and (loops or histories.per_layer(self) > 1):
            self.run(cache).put_into(walk, loops)
        return walk.run(tokens, histories.faces(self, cache), **kwargs)

    def in_turn(self, tokens: mx.array, end: int | None = None) -> mx.array:
        """The residual stream after the layers, each computed before the next is called.

        What is computed in one go hears no Ctrl-C, and a long text would take many seconds of it.

        Args:
            tokens: (batch, length), int; all of them loop.
            end: after the layers before this one, the window among them; None: after all.

        Returns:
            (batch, length, hidden); `together.logits` makes logits of it.
        """
        walk, layers = self.walk(), range(len(self.layers) if end is None else end)
        results: dict[int, Any] = {}
        if self.here is not None:
            self.run(None, in_turn=True).put_into(walk)
        walk.in_turn(layers)
        walk.keep(layers[-1:], results)
        walk.end_after(layers[-1])
        walk.run(tokens, None)
        return stream(results[layers[-1]])

    def walk(self) -> Walk:
        """A forward pass of mlx-lm's own model, to put stand-ins into."""
        return Walk(self, _forward)

    def run(self, cache: list[Any] | None, **settings: Any) -> Run:
        """The loop, for one forward pass with `cache`; settings are those of `loop.Run`."""
        assert self._here is not None
        settings.setdefault("policy", histories.policy(self, cache))
        return Run(self, self._here, firings=self._firings, observer=self.observer, **settings)

    # --- Caches ---

    @property
    def make_cache(self) -> Callable[[], list[Any]]:
        """mlx-lm's hook of models that need caches of their own; absent where that is not so.

        Raises:
            UserError: `decode` is not `full`, and a function of mlx-lm's asks for a cache, which
                will not say where the prompt ends.
        """
        loop = None if self.is_unlooped or self._make_cache is not None else self._loop
        request = upstream.request()
        tells = loop is not None and (loop.prompt == "plain" or loop.gate is not None)
        if tells and request.drafts:
            raise UserError(
                "mlx-lm's speculative decoding feeds an answer like a prompt, several tokens at a "
                "time, and prompt and gate tell the two apart: use mlx_loop.generate's draft='self'"
            )
        if loop is not None and loop.decode != "full" and request.by_mlx_lm:
            raise UserError(
                f"mlx-lm's own functions do not say where the prompt ends, and decode="
                f"{loop.decode!r} needs to know: generate with mlx_loop.generate, or make the "
                "cache yourself and call model.begin_decode(cache) after the prompt, or set "
                "decode='full'"
            )
        if histories.per_layer(self) > 1:
            return lambda: self.new_cache(request.max_kv_size)
        return self._make_cache or super().make_cache  # type: ignore[misc]

    @make_cache.setter
    def make_cache(self, make: Callable[[], list[Any]]) -> None:
        self._make_cache = make

    @make_cache.deleter
    def make_cache(self) -> None:
        self._make_cache = None

    def new_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """An empty cache, one entry per layer.

        Args:
            max_kv_size: the most tokens that a layer keeps, mlx-lm's rotating cache; it keeps
                the first few and the latest. None: all.
        """
        native = self._make_cache or getattr(super(), "make_cache", None)
        entries = native() if native else [KVCache() for _ in self.layers]
        entries = limited(entries, max_kv_size)
        for i in histories.looped_entries(self):
            if len(histories.of_entry(self, entries, i)) == 1:
                entries[i] = repeated(entries[i], histories.per_layer(self))
        return entries


def _forward(
    model: Looped, tokens: mx.array | None, cache: Sequence[Any] | None, **kwargs: Any
) -> mx.array:
    """mlx-lm's own forward pass, of a view or of the model itself."""
    return super(Looped, model).__call__(tokens, cache=cache, **kwargs)  # type: ignore[misc]


def _part(value: Any, part: slice) -> Any:
    return value[:, part] if isinstance(value, mx.array) else value
