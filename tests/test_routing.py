"""Frozen routing: the natural pass chooses the experts, later passes only run them."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import make, relative_error, tokens
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_loop import LoopConfig
from mlx_loop.routing import SORT_FROM, expert_changes, has_experts, with_frozen_routing

# (batch, length): below and above the number of (token, expert) pairs from which mlx-lm sorts.
SHAPES = [(1, 3), (2, 40)]


def states(shape, seed):
    return mx.array(np.random.default_rng(seed).normal(size=(*shape, 128)).astype(np.float32))


def mixture_layer(model):
    return next(layer for layer in model.layers if has_experts(layer, model.moe))


class ReplayedRouter:
    """mlx-lm's block derives everything from its router's output: so give it the old one."""

    def __init__(self, router):
        self.router, self.output = router, None

    def __call__(self, x):
        self.output = self.router(x) if self.output is None else self.output
        return self.output


@pytest.mark.parametrize("shape", SHAPES)
def test_later_passes_use_the_experts_and_weights_of_the_first(any_mixture, shape):
    layer, family = mixture_layer(any_mixture), any_mixture.moe
    frozen = with_frozen_routing(layer, family)[family.attribute]
    block = layer[family.attribute]
    replayed = ReplayedRouter(block[family.gate])
    first, second, third = (states(shape, seed) for seed in range(3))
    assert mx.array_equal(frozen(first), block(first))
    block[family.gate] = replayed
    try:
        block(first)
        for later in (second, third, first):
            assert relative_error(frozen(later), block(later)) < 1e-6
    finally:
        block[family.gate] = replayed.router
    assert relative_error(block(second), frozen(second)) > 1e-3


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_frozen_routing_is_exact_in_the_natural_pass(any_mixture, scope):
    text = tokens(2, 40)
    beta_1 = any_mixture.with_loop(
        LoopConfig(loops=3, beta=1.0, routing="frozen", scope=scope, window=(2, 6))
    )
    assert mx.array_equal(
        beta_1._walk(*walk(any_mixture, text), beta_1.loop, True), plain(any_mixture, text)
    )


def walk(model, text):
    return model.model.embed_tokens(text), None


def plain(model, text):
    h = model.model.embed_tokens(text)
    for layer, mask in zip(model.layers, model.masks(h, [None] * len(model.layers)), strict=True):
        h = layer(h, mask, None)
    return h


def count(arrays, names, folder):
    """How often each named operation stands in the graph of the arrays."""
    mx.export_to_dot(str(folder / "graph.dot"), *arrays)
    found = re.findall(r'label ?="(\w+)"', (folder / "graph.dot").read_text())
    return {name: found.count(name) for name in names}


@pytest.mark.parametrize("length", [1, 40])
def test_later_passes_choose_and_sort_nothing(any_mixture, tmp_path, length):
    names = ("ArgPartition", "ArgSort", "GatherMM")
    counts = {}
    for routing, loops in (("live", 1), ("live", 3), ("frozen", 3)):
        looped = any_mixture.with_loop(
            LoopConfig(loops=loops, routing=routing, scope="layer", window=(4, 6))
        )
        counts[routing, loops] = count([looped(tokens(1, length))], names, tmp_path)
    once, live, frozen = counts["live", 1], counts["live", 3], counts["frozen", 3]
    for name in ("ArgPartition", "ArgSort"):
        assert frozen[name] == once[name]
    assert live["ArgPartition"] > once["ArgPartition"]
    if length * 2 >= SORT_FROM:
        assert live["ArgSort"] > once["ArgSort"]
    assert frozen["GatherMM"] == live["GatherMM"] == once["GatherMM"] + 2 * 2 * 3


def test_a_dense_layer_among_experts_is_left_alone():
    model = make("qwen3_moe")
    assert not has_experts(model.layers[3], model.moe)
    assert with_frozen_routing(model.layers[3], model.moe) is model.layers[3]
    looped = model.with_loop(LoopConfig(window=(2, 6)))
    assert looped(tokens(1, 8)).shape == (1, 8, 320)


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
    block = mixture_layer(any_mixture)[any_mixture.moe.attribute]
    experts = sum(p.nbytes for _, p in tree_flatten(block[any_mixture.moe.experts].parameters()))
    assert peaks[8] - peaks[1] < experts / 2
