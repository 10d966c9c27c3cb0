"""How an mlx-lm model is built: where its layers are, how it calls them, what they hand on.

Nothing here is a list of model types. One forward pass of two tokens is made, lazily and without
a loop, and watched: that says of every layer which argument is the residual stream, which cache
it uses, what else it gets from earlier layers, and where its router is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, make_prompt_cache

from ..errors import UserError
from ..settings import ResolvedLoop
from ..upstream import EXPERTS, BaseCache, position
from .policies import POLICIES

Path = tuple[str | int, ...]
"""The names that lead from a model to one of its modules, and numbers of places in lists."""

Arguments = dict[int | str, Any]
"""Arguments of a call: those by position under their number, the others under their name."""

M = TypeVar("M")

# What a mixture of experts calls the module that chooses among them.
ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class Layer:
    """One of a model's layers, and how the forward pass calls it.

    Args:
        path: from the model to it.
        state: the argument that is the residual stream.
        mask: the argument that is the attention mask of several tokens; None: it has none.
        results: how many things it returns; the first, or only one, is the residual stream.
        feeds: arguments that are another result of an earlier layer, as (layer, place in tuple).
        entries: numbers of the cache entries that it uses.
        routers: paths from the layer to the routers of its experts.
        is_plain: whether it gets no other array than state and mask, and returns the state alone.
    """

    path: Path
    state: int | str
    mask: int | str | None
    results: int
    feeds: Mapping[int | str, tuple[int, int]]
    entries: tuple[int, ...]
    routers: tuple[Path, ...]
    is_plain: bool


@dataclass(frozen=True)
class Anatomy:
    """A model's layers, in the order in which they run.

    Args:
        nested: of each cache entry, whether it is a list of caches even without a loop.
        counts_tokens: whether the cache says how many tokens it has seen.
    """

    layers: tuple[Layer, ...]
    nested: tuple[bool, ...]
    counts_tokens: bool

    def entries(self, window: range) -> list[int]:
        """The cache entries that layers of a window write: nobody before them uses those."""
        earlier = {entry for layer in self.layers[: window.start] for entry in layer.entries}
        used = {entry for i in window for entry in self.layers[i].entries}
        return sorted(used - earlier)

    @property
    def mixes_experts(self) -> bool:
        """Whether any layer chooses among experts."""
        return any(layer.routers for layer in self.layers)

    def check_loop(self, loop: ResolvedLoop) -> None:
        """Refuse complete settings that cannot be honoured.

        Raises:
            UserError: says which, and why.
        """
        for window in loop.windows:
            self._check_window(loop, window)
        if loop.decode != "full" and not self.counts_tokens:
            raise UserError(
                f"decode={loop.decode!r} does not work with this model, whose cache does not count "
                "tokens: use decode='full'"
            )

    def _check_window(self, loop: ResolvedLoop, window: range) -> None:
        layers = self.layers
        if len({layers[i].path[:-1] for i in window}) > 1:
            raise UserError(
                f"window={loop.window} is not valid: its layers are of two kinds, the later ones "
                f"with the keys of an earlier one; stay on one side of "
                f"{next(i for i in window if layers[i].path[:-1] != layers[window[0]].path[:-1])}"
            )
        # In layer scope a layer hands on what its last pass made, else a natural pass has.
        extra = POLICIES[loop.cache].extra_pass
        inside = window[:-1] if loop.scope == "block" and extra else range(0)
        for layer in layers[window.stop :]:
            source = next((m for m, _ in layer.feeds.values() if m in inside), None)
            if source is not None:
                raise UserError(
                    f"cache={loop.cache!r} does not work with window={loop.window}: a later layer "
                    f"uses the keys of layer {source}, which are those of its natural pass; use "
                    "cache='first' or 'own', or another window"
                )


# --- Views with other layers ---


class StandIn:
    """Takes a layer's place in a forward pass. It looks like the layer; calls go elsewhere."""

    def __init__(self, layer: Any, call: Callable[..., Any]):
        self._layer, self._call = layer, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # Some models look at the type of a layer to choose its mask.
        return type(self._layer)


def with_layers(model: M, places: Mapping[Path, Any]) -> M:
    """A view of `model` with other modules at some places.

    It shares all the rest, and no array is copied.
    """
    view = copy.copy(model)
    copied: dict[Path, Any] = {(): view}
    for path, module in places.items():
        for depth in range(1, len(path)):
            if path[:depth] not in copied:
                above = copied[path[: depth - 1]]
                copied[path[:depth]] = above[path[depth - 1]] = copy.copy(above[path[depth - 1]])
        copied[path[:-1]][path[-1]] = module
    return view


def find(module: Any, wanted: Callable[[Any], bool], path: Path = ()) -> dict[Path, Any]:
    """The outermost modules in a module for which `wanted` holds, by path."""
    found: dict[Path, Any] = {}
    items: Any = enumerate(module) if isinstance(module, list) else module.items()
    for key, child in items:
        place = (*path, key)
        if isinstance(child, nn.Module) and wanted(child):
            found[place] = child
        elif isinstance(child, nn.Module | list):
            found |= find(child, wanted, place)
    return found


def layer_paths(model: Any) -> list[Path]:
    """The path to each of a model's layers, in order."""
    ids = {id(layer): i for i, layer in enumerate(model.layers)}
    found = find(model, lambda module: id(module) in ids)
    return sorted(found, key=lambda path: ids[id(found[path])])


def at(module: Any, path: Path) -> Any:
    """The module at a path."""
    for key in path:
        module = module[key]
    return module


def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a call under their names."""
    return {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]


def apply(layer: Any, arguments: Arguments) -> Any:
    """Call `layer` with arguments as `bind` gave them."""
    positional = [value for name, value in arguments.items() if isinstance(name, int)]
    return layer(*positional, **{n: v for n, v in arguments.items() if isinstance(n, str)})


def stream(found: Any) -> mx.array:
    """The residual stream in what a layer returned."""
    return found if isinstance(found, mx.array) else found[0]


def with_stream(found: Any, state: mx.array) -> Any:
    """What a layer returned, with another residual stream in it."""
    return state if isinstance(found, mx.array) else (state, *found[1:])


# --- Watching a forward pass ---


def survey(model: Any, forward: Callable[..., Any]) -> Anatomy:
    """Watch one lazy forward pass.

    Args:
        forward: (model, tokens, cache) -> logits, mlx-lm's own forward pass.

    Raises:
        UserError: the layers cannot be iterated; says why.
    """
    paths = layer_paths(model)
    cache = make_prompt_cache(model)
    calls: list[tuple[int, Arguments, Any]] = []

    def watched(i: int, layer: Any) -> StandIn:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = layer(*args, **kwargs)
            calls.append((i, bind(args, kwargs), found))
            return found

        return StandIn(layer, call)

    places = {paths[i]: watched(i, layer) for i, layer in enumerate(model.layers)}
    try:
        forward(with_layers(model, places), mx.zeros((1, 2), mx.int32), cache)
    except Exception as error:
        raise _cannot(model, f"its own forward pass fails, {error}") from error
    if [i for i, *_ in calls] != list(range(len(model.layers))):
        reason = "runs its layers several times" if calls else "reaches into its layers"
        raise _cannot(model, f"its own forward pass {reason}")
    numbers = {id(entry): i for i, entry in enumerate(cache)}
    layers = [_layer(model, i, paths[i], calls, numbers) for i in range(len(calls))]
    nested = tuple(isinstance(entry, CacheList) for entry in cache)
    return Anatomy(tuple(layers), nested, any(position(entry) is not None for entry in cache))


def _cannot(model: Any, reason: str) -> UserError:
    return UserError(f"the model type {model.model_type!r} cannot loop: {reason}")


def _layer(
    model: Any,
    i: int,
    path: Path,
    calls: Sequence[tuple[int, Arguments, Any]],
    numbers: Mapping[int, int],
) -> Layer:
    _, arguments, found = calls[i]
    for value in arguments.values():
        if not _can_be_given_again(value):
            raise _cannot(model, f"its layers share a {type(value).__name__} that they change")
    feeds = {}
    for name, value in arguments.items():
        sources = _sources(value, calls[:i])
        if sources:
            feeds[name] = sources[0]
            is_new = sources[0][0] == i - 1 > 0
            if is_new and isinstance(value, mx.array) and value.shape == stream(found).shape:
                raise _cannot(model, "its layers hand on more than the residual stream")
    used = [numbers[id(value)] for value in arguments.values() if id(value) in numbers]
    state = _state(model, calls, i)
    mask = next((name for name, value in arguments.items() if _is_mask(value)), None)
    others = [value for name, value in arguments.items() if name not in (state, mask)]
    return Layer(
        path=path,
        state=state,
        mask=mask,
        results=1 if isinstance(found, mx.array) else len(found),
        feeds=feeds,
        entries=tuple(used),
        routers=tuple(_routers(model.layers[i])),
        is_plain=isinstance(found, mx.array)
        and not any(isinstance(value, mx.array | tuple | list) for value in others),
    )


def _state(model: Any, calls: Sequence[tuple[int, Arguments, Any]], i: int) -> int | str:
    """The argument that is what the layer before returned; of the first, as of the second."""
    _, arguments, _ = calls[i]
    if i == 0:
        arrays = [name for name, value in arguments.items() if isinstance(value, mx.array)]
        return _state(model, calls, 1) if len(calls) > 1 else arrays[0]
    before = stream(calls[i - 1][2])
    for name, value in arguments.items():
        if value is before:
            return name
    raise _cannot(model, "something happens to the residual stream between its layers")


def _sources(value: Any, calls: Sequence[tuple[int, Arguments, Any]]) -> list[tuple[int, int]]:
    """The earlier results, beside the residual stream, that an argument is."""
    if not isinstance(value, mx.array | tuple | list):
        return []
    return [
        (i, place)
        for i, _, found in calls
        if not isinstance(found, mx.array)
        for place, result in enumerate(found)
        if place and value is result
    ]


def _is_mask(value: Any) -> bool:
    return value == "causal" if isinstance(value, str) else getattr(value, "dtype", 0) == mx.bool_


def _can_be_given_again(value: Any) -> bool:
    """Whether a layer can be called again with the same value and finds it unchanged."""
    if isinstance(value, tuple | list):
        return all(map(_can_be_given_again, value))
    return value is None or isinstance(value, mx.array | int | float | str | BaseCache | nn.Module)


def _routers(module: nn.Module, path: Path = ()) -> Iterator[Path]:
    """Paths to the modules that choose among experts beside them."""
    for name, child in module.items():
        if not isinstance(child, nn.Module):
            continue
        if name in ROUTERS and _has_experts(module):
            yield (*path, name)
        else:
            yield from _routers(child, (*path, name))


def _has_experts(module: nn.Module) -> bool:
    in_one_array = any(isinstance(m, EXPERTS) for m in module.modules())
    return in_one_array or isinstance(module.get("experts"), list)
