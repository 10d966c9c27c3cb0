"""Inside a loop: numbers by hand on a linear map, and the words for them."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import make, relative_error, tokens

from mlx_loop import LoopConfig, UserError
from mlx_loop.measure.comparison import kl
from mlx_loop.measure.trace import Loop, Pass, State, trace
from mlx_loop.method.routing import expert_changes


class Scaling(nn.Module):
    """A layer that multiplies the state by c: g(x) = c^n x for a window of n."""

    def __init__(self, c):
        super().__init__()
        self._c = c

    def __call__(self, x, mask, cache):
        return self._c * x


def linear(c, width=2):
    """A model whose layers [2, 2 + width) together multiply by c."""
    model = make("qwen3")
    layers = list(model.layers)
    layers[2 : 2 + width] = [Scaling(c ** (1 / width)) for _ in range(width)]
    model.model.layers = layers
    return model


def traced(c, **settings):
    model = linear(c)
    model.loop = LoopConfig(window=(2, 4), **settings)
    return trace(model, [5, 6, 7])


def close(values, expected):
    """float32: a few roundings of each quantity."""
    assert values == pytest.approx([expected] * len(values), rel=1e-4)


@pytest.mark.parametrize("c", [0.5, 0.9, 1.5])
@pytest.mark.parametrize("loops", [2, 4])
def test_euler_on_a_linear_map(c, loops):
    # f(x) = (c - 1) x, so x_k = r^k x_0 with r = 1 + (c - 1)/K, and g contracts by c.
    (loop,) = traced(c, loops=loops, integrator="euler").loops
    r = 1 + (c - 1) / loops
    assert len(loop.passes) == loops
    for k, one in enumerate(loop.passes):
        close(one.residual, abs(c - 1) * r**k / c)
        close(one.before.norm, r**k / c)
        close(one.before.cosine, 1)
        if k:
            close(one.contraction, c)
        else:
            assert all(map(math.isnan, one.contraction))
    close(loop.growth, r ** (loops - 1))
    close(loop.result.norm, r**loops / c)


def test_anchored_and_naive_on_a_linear_map():
    c, loops = 0.8, 3
    (anchored,) = traced(c, loops=loops, integrator="anchored", beta=0.25).loops
    close(anchored.result.norm, (0.25 * c + 0.75 * (1 + (c - 1) / loops) ** loops) / c)
    (naive,) = traced(c, loops=loops, integrator="naive").loops
    close(naive.result.norm, c ** (loops - 1))
    close(naive.growth, c ** (loops - 1))


def test_rk4_has_a_row_for_each_stage():
    (loop,) = traced(0.8, loops=2, integrator="rk4").loops
    assert len(loop.passes) == 8
    # Stage 1 of the first step is x0 + f(x0)/4.
    close(loop.passes[1].before.norm, (1 - 0.2 / 4) / 0.8)


def test_layer_scope_has_a_loop_for_each_layer():
    loops = traced(0.81, loops=2, integrator="euler", scope="layer").loops
    assert [loop.layers for loop in loops] == [[2], [3]]
    for loop in loops:
        close(loop.passes[1].contraction, 0.9)


def test_steps_that_are_lost_in_rounding_give_no_contraction():
    (loop,) = traced(1 + 1e-7, loops=3, integrator="euler").loops
    assert all(math.isnan(x) for one in loop.passes for x in one.contraction)


@pytest.mark.parametrize(
    ("c", "settings", "verdict"),
    [
        (0.7, {"integrator": "euler"}, "converging"),
        (1.01, {"integrator": "euler"}, "drifting"),
        (1.5, {"integrator": "euler"}, "diverging"),
        (1.5, {"integrator": "naive"}, "diverging"),
        # The residual shrinks, but the state leaves the natural pass far behind.
        (0.7, {"integrator": "naive"}, "drifting"),
    ],
)
def test_verdicts(c, settings, verdict):
    assert traced(c, loops=4, **settings).verdict == verdict


def test_one_pass_supports_no_verdict_and_what_is_not_a_number_diverges():
    state = State([1.0], [1.0], [0.0])
    assert Loop([2], [None], state, [1.0]).verdict == "no verdict"
    assert Loop([2], [None] * 2, state, [math.nan]).verdict == "diverging"


@pytest.mark.parametrize(("contraction", "verdict"), [(0.9, "converging"), (1.1, "drifting")])
def test_a_map_that_drives_states_apart_is_not_called_converging(contraction, verdict):
    state = State([1.0], [1.0], [0.0])
    last = Pass(state, [0.5], [contraction], None)
    assert Loop([2], [None, last], state, [0.5]).verdict == verdict


def test_a_last_step_that_is_lost_in_rounding_is_said_in_words():
    state = State([1.0], [1.0], [0.0])
    loop = Loop([2], [None, Pass(state, [0.5], [math.nan], None)], state, [0.5])
    assert "contraction lost in rounding in the last pass" in loop.reason


def test_the_lens_is_the_models_head():
    model = make("qwen3")
    model.loop = LoopConfig(loops=2, window=(2, 4))
    (loop,) = trace(model, list(range(5, 75))).loops  # More than one chunk of tokens.
    text, results, walk = mx.arange(5, 75)[None], {}, model.walk()
    walk.keep([1, 3], results)
    walk.run(text, None)
    head = model.model
    before, natural = (head.embed_tokens.as_linear(head.norm(results[i])) for i in (1, 3))
    # float32.
    assert relative_error(mx.array(loop.passes[0].before.lens_kl), kl(natural, before)[0]) < 1e-4
    assert max(loop.passes[1].before.lens_kl) > 0


def test_tracing_leaves_the_model_as_it_was(one_of_each):
    looped, text = one_of_each.with_loop(LoopConfig(loops=3)), tokens(1, 6)
    before = looped(text)
    trace(looped, text[0].tolist())
    assert looped.observer is None
    assert mx.array_equal(looped(text), before)


@pytest.mark.parametrize("settings", [{}, {"scope": "layer"}, {"integrator": "uniform"}])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_a_trace_computes_one_layer_at_a_time(model_type, settings, monkeypatch):
    # Ctrl-C is heard between evaluations; of a long prompt a layer is what takes long.
    model = make(model_type)
    model.loop = LoopConfig(loops=3, window=(2, 4), **settings)
    called, at_once, evaluate = [], [], mx.eval
    kind = type(model.layers[0])
    call = kind.__call__

    def counted(layer, *args, **kwargs):
        called.append(layer)
        return call(layer, *args, **kwargs)

    def noted(*arrays):
        at_once.append(len(called))
        called.clear()
        evaluate(*arrays)

    monkeypatch.setattr(kind, "__call__", counted)
    monkeypatch.setattr(mx, "eval", noted)
    trace(model, [5, 6, 7])
    assert sum(at_once) >= 4 + 2 * 2
    assert max(at_once) == 1


def test_experts_that_changed_are_those_of_expert_changes(any_mixture):
    looped, text = any_mixture.with_loop(LoopConfig(loops=3, scope="layer")), tokens(1, 8)
    changes = expert_changes(looped, text)
    for loop in trace(looped, text[0].tolist()).loops:
        found = [one.experts_changed for one in loop.passes]
        (layer,) = loop.layers
        assert found == ([0.0, *changes[layer]] if layer in changes else [None] * 3)


def test_what_cannot_be_traced():
    model = make("qwen3")
    with pytest.raises(UserError, match="off"):
        trace(model, [1, 2])
    model.loop = LoopConfig(loops=2)
    with pytest.raises(UserError, match="empty"):
        trace(model, [])
