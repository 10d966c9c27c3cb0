"""A looped forward pass in two halves, for speculative decoding.

Up to the end of the first natural pass the plain and the looped model do the same. So the plain
model's pass over some tokens leaves what the looped one needs of them, and the looped one goes on
from there, over several tokens at once. All of it is for one sequence, a cache that can be
trimmed, and key/value policy `first` or `own`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ..method.cache import before, leaves, rewind, tokens_seen
from ..method.loop import Natural, parts
from ..method.policies import POLICIES
from ..method.routing import Frozen
from ..method.walk import Walk
from ..upstream import NOT_CAUSAL
from . import histories

if TYPE_CHECKING:
    from .looped import Looped


def untrimmable(cache: Sequence[Any]) -> str | None:
    """What in a cache cannot be cut back to any length; None: nothing."""
    for leaf in leaves(cache):
        if not isinstance(leaf, KVCache | QuantizedKVCache):
            return (
                f"a {type(leaf).__name__}, which cannot be trimmed (--max-kv-size, sliding windows "
                "and recurrent layers need it)"
            )
    return None


def obstacle(model: Looped, cache: Sequence[Any]) -> str | None:
    """Why a model cannot go in halves with a cache; None: it can."""
    if model.stages is not None:
        return "a pipeline, of which each machine has some layers"
    loop, found = model.loop, untrimmable(cache)
    if found or loop is None or model.is_unlooped:
        return found
    layers, nested = model.anatomy.layers, model.anatomy.nested
    # What several caches of a layer mean together, `policies.FirstSideBySide` does not know.
    together = POLICIES[loop.cache].side_by_side
    lists = together and any(nested[e] for i in loop.layers for e in layers[i].entries)
    several = lists or any(layer.results > 1 for layer in layers[: loop.layers[-1] + 1])
    unmasked = any(layers[i].entries and layers[i].mask is None for i in loop.layers)
    kinds = {layer.path[:-1] for layer in layers}
    if several or unmasked or len(kinds) > 1 or model.model_type in NOT_CAUSAL:
        return (
            f"the model type {model.model_type!r}, whose layers hand on more than a state and one "
            "cache each, or see later tokens"
        )
    return None


def plain(model: Looped, tokens: mx.array, cache: list[Any]) -> tuple[mx.array, Natural]:
    """The un-looped model's logits (1, length, vocab) of tokens (1, length), int.

    It writes their entries everywhere; those that are not the loop's are replaced by `looped`.
    """
    walk, natural = _remembering(model)
    return walk.run(tokens, histories.faces(model, cache)), natural


def enter(model: Looped, tokens: mx.array, cache: list[Any]) -> Natural:
    """As far as the end of the first natural pass; writes the entries up to there."""
    walk, natural = _remembering(model)
    walk.end_after(_first(model)[-1])
    walk.run(tokens, histories.faces(model, cache))
    return natural


def looped(model: Looped, tokens: mx.array, cache: list[Any], natural: Natural) -> mx.array:
    """The looped model's logits (1, length, vocab), as if each token had been fed alone.

    Args:
        tokens: (1, length), int, of which `natural` is the natural pass.
        cache: it holds the entries that this pass wrote.
    """
    loop, first = model.loop, _first(model)
    assert loop is not None
    past = (tokens_seen(cache) or 0) - tokens.shape[1]
    done = model.anatomy.entries(range(first.stop))
    rewind([cache[i] for i in range(len(cache)) if i not in done], past)
    # mlx-lm makes the masks and positions of tokens that come after `past` others.
    faces = list(histories.faces(model, cache) or [])
    real = {}
    for i in done:
        face = before(faces[i], past)
        real[id(face)], faces[i] = faces[i], face
    side_by_side = POLICIES[loop.cache].side_by_side
    kind = side_by_side or histories.policy(model, cache)
    run = model.run(
        cache,
        policy=lambda face, length: kind(real.get(id(face), face), length),
        natural=natural,
        past=past if side_by_side else None,
    )
    walk = model.walk()
    for i in range(first.start):
        walk.answer(i, natural.results[first.start - 1])
    run.put_into(walk)
    return walk.run(tokens, faces)


def _first(model: Looped) -> range:
    assert model.loop is not None
    return parts(model.loop)[0]


def _remembering(model: Looped) -> tuple[Walk, Natural]:
    walk, natural, first = model.walk(), Natural(), _first(model)
    assert model.loop is not None
    if model.loop.routing == "frozen":
        for i in first:
            where = model.anatomy.layers[i]
            if where.routers:
                natural.frozen[i] = Frozen(model.layers[i], where)
                walk.put(i, natural.frozen[i].natural)
    walk.keep(range(max(first.start - 1, 0), first.stop), natural.results)
    return walk, natural
