"""The histories in a model's cache: one for each layer, or one for each evaluation of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlx_lm.models.cache import CacheList

from ..errors import UserError
from ..method.plan import passes
from ..method.policies import POLICIES, Own, Policy

if TYPE_CHECKING:
    from .looped import Looped


def per_layer(model: Looped) -> int:
    """Histories that each layer of the window keeps."""
    loop = model.here
    return 1 if loop is None or not POLICIES[loop.cache].per_pass else passes(loop)


def looped_entries(model: Looped) -> list[int]:
    """The cache entries with a history per evaluation."""
    if model.here is None or per_layer(model) == 1:
        return []
    found = {e for window in model.here.windows for e in model.anatomy.entries(window)}
    return sorted(found)


def of_entry(model: Looped, cache: Sequence[Any], i: int) -> Sequence[Any]:
    """The histories in a cache entry."""
    entry = cache[i]
    if isinstance(entry, CacheList) and (
        not model.anatomy.nested[i] or isinstance(entry.caches[0], CacheList)
    ):
        return entry.caches
    return (entry,)


def faces(model: Looped, cache: Sequence[Any] | None) -> list[Any] | None:
    """What mlx-lm's forward pass gets for a cache: of several histories the first."""
    if cache is None or per_layer(model) == 1:
        return cache  # type: ignore[return-value]
    return [of_entry(model, cache, i)[0] for i in range(len(cache))]


def policy(model: Looped, cache: Sequence[Any] | None) -> Callable[[Any, int], Policy]:
    """(what a layer gets as its cache, number of tokens) -> its key/value policy."""
    assert model.loop is not None
    kind, count = POLICIES[model.loop.cache], per_layer(model)
    if not issubclass(kind, Own):
        return kind
    looped, shown = looped_entries(model), faces(model, cache) or []
    known: dict[int, Sequence[Any]] = {id(face): (face,) * count for face in shown}
    known |= {id(shown[i]): of_entry(model, cache, i) for i in looped if cache is not None}

    def own(face: Any, length: int) -> Policy:
        # A cache that is not the model's is mlx-lm's own for one pass, and empty.
        fresh = [face, *(copy.deepcopy(face) for _ in range(count - 1))]
        return kind(face, length, known.get(id(face)) or fresh)

    return own


def check_histories(model: Looped, cache: Sequence[Any]) -> None:
    """Refuse a cache that does not hold the histories that the settings need."""
    looped, count = looped_entries(model), per_layer(model)
    if not looped and not any(isinstance(entry, CacheList) for entry in cache):
        return
    for i in range(len(cache)):
        needed = count if i in looped else 1
        found = len(of_entry(model, cache, i))
        if found != needed:
            raise UserError(
                f"this cache was made for other loop settings: entry {i} has {found} "
                f"{'history' if found == 1 else 'histories'} in it and needs {needed}; make a "
                "new one with mlx_lm's make_prompt_cache(model)"
            )
