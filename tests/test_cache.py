"""Looping leaves mlx-lm's caches as the key/value policies say, whatever their kind."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import tokens
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)
from reference import Reference, doubled_window, plain

from mlx_loop import LoopConfig, UserError
from mlx_loop.generation.prompt import reads_quantised_cache
from mlx_loop.method.cache import leaves, repeated

KINDS = {
    "full": KVCache,
    "quantised": lambda: QuantizedKVCache(group_size=32, bits=8),
    "rotating": lambda: RotatingKVCache(max_size=12, keep=4),
    "left-padded batch": lambda: BatchKVCache([2, 0]),
    "rotating batch": lambda: BatchRotatingKVCache(12, [2, 0]),
}
# Prompts and chunks, then single tokens, past the point where the rotating caches are full.
CALLS = (7, 1, 1, 5, 1, 1, 1, 1, 3, 1, 1)


def skip_unless_possible(model, kind):
    if kind == "quantised" and not reads_quantised_cache(model):
        pytest.skip("mlx-lm's own model does not read quantised keys and values")


def feed(model, cache, calls=CALLS, batch=2):
    """Logits (batch, total, vocab) of random tokens fed in calls of the given lengths."""
    text = tokens(batch, sum(calls))
    outs, at = [], 0
    for length in calls:
        outs.append(model(text[:, at : at + length], cache=cache))
        mx.eval(outs[-1], [entry.state for entry in cache])
        at += length
    return mx.concatenate(outs, axis=1)


@pytest.mark.parametrize(
    ("policy", "scope"), [("first", "block"), ("first", "layer"), ("last", "layer")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_rewinding_equals_a_fresh_copy_for_every_pass(one_of_each, kind, policy, scope):
    skip_unless_possible(one_of_each, kind)
    looped = one_of_each.with_loop(
        LoopConfig(window=(2, 5), loops=3, routing="live", beta=0.3, cache=policy, scope=scope)
    )
    found = feed(looped, [KINDS[kind]() for _ in looped.layers])
    cache = [KINDS[kind]() for _ in looped.layers]
    expected = feed(Reference(plain(looped), looped.loop), cache)
    # Tokens 0 and 1 of a left-padded row are padding.
    assert mx.array_equal(found[:, 2:], expected[:, 2:])


@pytest.mark.parametrize("kind", KINDS)
def test_own_with_naive_loops_is_the_model_with_its_window_twice(one_of_each, kind):
    skip_unless_possible(one_of_each, kind)
    looped = one_of_each.with_loop(
        LoopConfig(
            window=(2, 5), loops=2, integrator="naive", cache="own", scope="block", routing="live"
        )
    )
    cache = [KINDS[kind]() for _ in looped.layers]
    cache[2:5] = [repeated(entry, 2) for entry in cache[2:5]]
    found = feed(looped, cache)
    double = doubled_window(one_of_each, (2, 5))
    expected = feed(double, [KINDS[kind]() for _ in double.layers])
    assert mx.array_equal(found[:, 2:], expected[:, 2:])


def test_first_keeps_the_entries_that_the_natural_pass_wrote(model):
    looped = model.with_loop(LoopConfig(window=(2, 6), loops=3, cache="first"))
    cache, plain = looped.new_cache(), model.with_loop(None).new_cache()
    text = tokens(1, 9)
    looped(text, cache=cache)
    model(text, cache=plain)
    # Up to the end of the window the natural pass is the plain model's.
    for entry, other in zip(cache[:6], plain[:6], strict=True):
        assert mx.array_equal(entry.keys[..., :9, :], other.keys[..., :9, :])
        assert mx.array_equal(entry.values[..., :9, :], other.values[..., :9, :])
    assert not mx.array_equal(cache[6].keys[..., :9, :], plain[6].keys[..., :9, :])


def test_positions_line_up_with_an_unlooped_cache(model):
    for policy in ("first", "last", "own"):
        looped = model.with_loop(LoopConfig(loops=3, integrator="rk4", cache=policy))
        cache = looped.new_cache()
        feed(looped, cache, batch=1)
        assert {leaf.offset for leaf in leaves(cache)} == {sum(CALLS)}


def test_a_cache_made_for_other_settings_is_refused(model):
    own = model.with_loop(LoopConfig(loops=3, cache="own"))
    for wrong in (
        model,
        model.with_loop(LoopConfig()),
        own.with_loop(LoopConfig(loops=2, cache="own")),
    ):
        with pytest.raises(UserError, match="make a new one"):
            wrong(tokens(1, 3), cache=own.new_cache())
    with pytest.raises(UserError, match="make a new one"):
        own(tokens(1, 3), cache=model.new_cache())


def test_own_costs_a_history_per_evaluation_in_the_window_only(model):
    caches = {}
    for policy in ("first", "own"):
        looped = model.with_loop(LoopConfig(window=(2, 6), loops=3, cache=policy))
        caches[policy] = looped.new_cache()
        looped(tokens(1, 20), cache=caches[policy])
    sizes = {policy: sum(entry.nbytes for entry in cache) for policy, cache in caches.items()}
    assert sizes["own"] == sizes["first"] * (8 + 4 * 2) / 8
