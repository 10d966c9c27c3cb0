"""A model in stages of whole layers, one on each of several machines.

mlx-lm hands the residual stream from stage to stage. Within a stage a loop is what it is on one
machine, so stages are cut where no loop lies; layers that loop one by one can be cut anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import UserError
from ..method.anatomy import Anatomy, at
from ..settings import ResolvedLoop, interval
from ..upstream import Pipeline

if TYPE_CHECKING:
    from .looped import Looped


@dataclass(frozen=True)
class Stages:
    """The layers of each machine, from the bottom up, and those of this one."""

    all: Sequence[range]
    here: range


def into_stages(model: Looped, group: mx.distributed.Group) -> None:
    """Leave this machine's layers of a lazy model; the first machine has the last ones.

    Raises:
        UserError: mlx-lm has no pipeline for this type, or its caches would not keep in step, or
            there are fewer places to cut at than needed.
    """
    whole = model.whole
    holder, caches = at(model, whole.layers[0].path[:-2]), model.with_loop(None).new_cache()
    plain = all(layer.entries == (i,) and not layer.feeds for i, layer in enumerate(whole.layers))
    if not isinstance(holder, Pipeline) or not plain or len(set(map(type, caches))) > 1:
        raise UserError(
            f"models of the type {model.model_type!r} do not run as a pipeline: leave --pipeline "
            "(pipeline=True) out to split each layer"
        )
    stages = _stages(group.size(), len(whole.layers), model.loop)
    holder.pipeline(group, [len(stage) for stage in reversed(stages)])
    model.stages = Stages(stages, stages[group.size() - 1 - group.rank()])
    # Now it is that of the stage.
    model.loop = model.loop


def _stages(machines: int, layers: int, loop: ResolvedLoop | None) -> list[range]:
    """About equally many layers for each machine, cut where no loop lies."""
    windows = _uncut(loop)
    places = [i for i in range(1, layers) if not any(w.start < i < w.stop for w in windows)]
    if len(places) < machines - 1:
        raise UserError(
            f"{machines} machines are too many for a pipeline of {layers} layers: there are "
            f"{len(places)} places to cut it at, none of them in a window that loops as one"
        )
    cuts = [0]
    for i in range(1, machines):
        # As many places are left as there are cuts to come.
        later = [place for place in places if place > cuts[-1]]
        later = later[: len(later) - (machines - 1 - i)]
        cuts.append(min(later, key=lambda place: abs(place - i * layers / machines)))
    return [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], layers], strict=True)]


def _uncut(loop: ResolvedLoop | None) -> Sequence[range]:
    return loop.windows if loop is not None and loop.scope == "block" else ()


def check(loop: ResolvedLoop, stages: Sequence[range]) -> None:
    """Refuse settings that a pipeline of such stages cannot honour.

    Raises:
        UserError: says which, and what fits.
    """
    for name in ("gate", "guard"):
        if getattr(loop, name) is not None:
            raise UserError(f"{name} does not work over a pipeline: leave it out, or --pipeline")
    cut = [w for w in _uncut(loop) if not any(set(w) <= set(stage) for stage in stages)]
    if cut:
        fit = " or ".join(interval((stage.start, stage.stop)) for stage in stages)
        raise UserError(
            f"window={interval((cut[0].start, cut[0].stop))} is cut by this pipeline: it has to "
            f"lie within {fit}; start again with it, or use scope='layer'"
        )


def part(anatomy: Anatomy, stage: range) -> Anatomy:
    """A stage's layers, numbered from its first, and so are the caches."""
    layers = [replace(anatomy.layers[i], entries=(number,)) for number, i in enumerate(stage)]
    nested = tuple(anatomy.nested[i] for i in stage)
    return Anatomy(tuple(layers), nested, anatomy.counts_tokens)


def loop_of(loop: ResolvedLoop, stage: range) -> ResolvedLoop | None:
    """The settings with the windows as far as they are a stage's; None: none is."""
    parts = [range(max(w.start, stage.start), min(w.stop, stage.stop)) for w in loop.windows]
    pairs = tuple((p.start - stage.start, p.stop - stage.start) for p in parts if p)
    return replace(loop, window=pairs if len(pairs) > 1 else pairs[0]) if pairs else None
