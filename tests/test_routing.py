"""Frozen routing: the natural pass chooses the experts, later passes only run them."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import make, relative_error, tokens
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.trainer import grad_checkpoint
from reference import plain

from mlx_loop import LoopConfig
from mlx_loop.method.anatomy import at
from mlx_loop.method.routing import Frozen, expert_changes

# (batch, length): below and above the number of (token, expert) pairs from which mlx-lm sorts.
SHAPES = [(1, 3), (2, 40)]


def states(shape, seed):
    return mx.array(np.random.default_rng(seed).normal(size=(*shape, 128)).astype(np.float32))


def mixture(model):
    """The first layer with experts, and where its router is."""
    i = next(i for i, where in enumerate(model.anatomy.layers) if where.routers)
    return model.layers[i], model.anatomy.layers[i]


class ReplayedRouter:
    """mlx-lm's block derives everything from its router's output: so give it the old one."""

    def __init__(self, router):
        self.router, self.output = router, None

    def __call__(self, x):
        self.output = self.router(x) if self.output is None else self.output
        return self.output


@pytest.mark.parametrize("shape", SHAPES)
def test_later_passes_use_the_experts_and_weights_of_the_first(any_mixture, shape):
    layer, where = mixture(any_mixture)
    frozen = Frozen(layer, where)
    ((*path, name),) = where.routers
    block, first, second = at(layer, path), *(states(shape, seed) for seed in range(2))
    assert mx.array_equal(frozen.natural(first, None), layer(first, None))
    replayed = ReplayedRouter(block[name])
    block[name] = replayed
    try:
        layer(first, None)
        for later in (second, first):
            assert mx.array_equal(frozen.later()(later, None), layer(later, None))
    finally:
        block[name] = replayed.router
    assert relative_error(layer(second, None), frozen.later()(second, None)) > 1e-3


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_frozen_routing_is_exact_in_the_natural_pass(any_mixture, scope):
    text = tokens(2, 40)
    # All three passes are made, and the natural one is the result.
    weights = (0.0, 1.0, 1e-38, -1e-38)
    looped = any_mixture.with_loop(
        LoopConfig(
            window=(2, 6),
            loops=3,
            integrator="poly_blend",
            weights=weights,
            routing="frozen",
            scope=scope,
        )
    )
    assert relative_error(looped(text), plain(any_mixture)(text)) < 1e-6


def count(arrays, names, folder):
    """How often each named operation stands in the graph of the arrays."""
    mx.export_to_dot(str(folder / "graph.dot"), *arrays)
    found = re.findall(r'label ?="(\w+)"', (folder / "graph.dot").read_text())
    return {name: found.count(name) for name in names}


@pytest.mark.parametrize("length", [1, 40])
def test_later_passes_have_no_router_product(any_mixture, tmp_path, length):
    names = ("Matmul", "AddMM", "GatherMM")
    products = {}
    for routing in ("live", "frozen"):
        looped = any_mixture.with_loop(
            LoopConfig(loops=3, routing=routing, scope="layer", window=(4, 6))
        )
        products[routing] = count([looped(tokens(1, length))], names, tmp_path)
    assert products["frozen"]["GatherMM"] == products["live"]["GatherMM"]
    saved = sum(products["live"].values()) - sum(products["frozen"].values())
    # Two later passes over two layers.
    assert saved == 2 * 2


def test_a_dense_layer_among_experts_is_left_alone():
    model = make("qwen3_moe")
    assert [i for i, where in enumerate(model.anatomy.layers) if not where.routers] == [3]
    looped = model.with_loop(LoopConfig(window=(2, 6), routing="frozen"))
    assert looped(tokens(1, 8)).shape == (1, 8, 320)


def test_gradients_are_right_with_checkpointing_too(any_mixture):
    # mlx-lm's --grad-checkpoint sees of a layer nothing but its parameters.
    model = make(any_mixture.model_type)
    looped = model.with_loop(LoopConfig(loops=3, window=(6, 8), routing="frozen"))
    router = at(model.layers[7], model.anatomy.layers[7].routers[0])
    text = tokens(1, 6, seed=1)

    def loss(weight):
        router.weight = weight
        return mx.mean(looped(text).astype(mx.float32) ** 2)

    at_weight = router.weight
    plainly = mx.grad(loss)(at_weight)
    call = type(model.layers[7]).__call__
    try:
        grad_checkpoint(model.layers[7])
        found = mx.grad(loss)(at_weight)
    finally:
        type(model.layers[7]).__call__ = call
    assert relative_error(found, plainly) < 1e-5
    # Along the gradient, with a step so small that no token changes its experts.
    direction, step = found / mx.linalg.norm(found), 1e-3
    finite = (loss(at_weight + step * direction) - loss(at_weight - step * direction)) / (2 * step)
    # A central difference in float32.
    assert relative_error(finite, mx.sum(found * direction)) < 3e-2


def test_freezing_leaves_no_trace_in_the_model(any_mixture):
    text = tokens(1, 40)
    before = any_mixture(text)
    any_mixture.with_loop(LoopConfig(routing="frozen"))(text)
    expert_changes(any_mixture.with_loop(LoopConfig(window=(4, 6))), text)
    assert mx.array_equal(any_mixture(text), before)


def test_each_token_is_routed_when_it_is_first_seen(any_mixture):
    # Under `own` a token's logits do not depend on what it was fed together with.
    text = tokens(1, 40)
    looped = any_mixture.with_loop(LoopConfig(cache="own", window=(2, 6)))
    assert looped.loop.routing == "frozen"
    whole, cache = looped(text), make_prompt_cache(looped)
    parts = [looped(text[:, a:b], cache=cache) for a, b in ((0, 36), (36, 37), (37, 40))]
    assert relative_error(mx.concatenate(parts, axis=1), whole) < 1e-4


def test_expert_changes(any_mixture):
    looped = any_mixture.with_loop(LoopConfig(loops=3, window=(4, 6)))
    changes = expert_changes(looped, tokens(2, 40))
    assert changes.keys() == {4, 5}
    assert all(
        len(shares) == 2 and 0 <= min(shares) <= max(shares) <= 1 for shares in changes.values()
    )
    assert max(max(shares) for shares in changes.values()) > 0
    # A step of almost no length changes no set.
    still = any_mixture.with_loop(
        LoopConfig(loops=3, window=(4, 6), integrator="ema", alpha=1e-6, scope="block")
    )
    assert max(max(shares) for shares in expert_changes(still, tokens(2, 40)).values()) == 0


def test_no_expert_weight_is_copied(any_mixture):
    text = tokens(1, 40)
    peaks = {}
    for loops in (1, 8):
        looped = any_mixture.with_loop(LoopConfig(loops=loops, window=(4, 6)))
        mx.eval(looped(text))
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(looped(text))
        peaks[loops] = mx.get_peak_memory()
    # What more loops keep alive are states of a few tokens, much less than any layer's experts.
    layer, _ = mixture(any_mixture)
    experts = sum(p.nbytes for _, p in tree_flatten(layer.parameters()) if p.ndim == 3)
    assert peaks[8] - peaks[1] < experts / 2
