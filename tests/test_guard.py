"""The guard: which tokens fall back, what it costs when it is off, and how it is counted."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import relative_error, tokens
from mlx_lm.models.cache import make_prompt_cache

import mlx_loop.method.loop
from mlx_loop import Guard, LoopConfig, UserError
from mlx_loop.integrators import INTEGRATORS
from mlx_loop.method.guard import Count, integrate_guarded
from mlx_loop.method.integrate import integrate
from mlx_loop.presets import resolve

OPEN = Guard(growth=1e6, band=(0, 1e6))
X0 = mx.random.normal((1, 6, 8), key=mx.random.key(0))
# Each token is scaled by its own factor: f(x) = (c - 1) x.
FACTORS = mx.array([0.5, 0.9, 1.0, 1.1, 1.5, 3.0])[None, :, None]


def g(x, between=None):
    x = x * FACTORS
    return x if between is None else between(0, x)


def settings(**fields):
    return resolve(LoopConfig(**fields), "qwen3", 8)


def fired(config, guard):
    return integrate_guarded(g, X0, config, guard)[1].squeeze().tolist()


def test_the_residual_grows_by_the_factor_of_a_linear_map():
    # Naive passes: f(x_k) = c^k f(x_0), so over K = 4 it grows by c^3.
    config = settings(integrator="naive", loops=4)
    for limit in (0.5, 1.2, 1.4, 3.5, 30):
        expected = [c**3 > limit and c != 1 for c in (0.5, 0.9, 1.0, 1.1, 1.5, 3.0)]
        assert fired(config, Guard(limit, OPEN.band)) == expected


def test_the_norm_is_that_of_the_result_over_that_of_the_natural_pass():
    # Naive passes: |g^4(x0)| / |g(x0)| = c^3.
    config = settings(integrator="naive", loops=4)
    for low, high in ((0.2, 1.4), (0.8, 1), (0.01, 3.5)):
        expected = [not low <= c**3 <= high for c in (0.5, 0.9, 1.0, 1.1, 1.5, 3.0)]
        assert fired(config, Guard(OPEN.growth, (low, high))) == expected


def test_a_limit_whose_square_has_no_float32_is_never_reached():
    config = settings(integrator="naive", loops=4)
    assert fired(config, Guard(1e200, (0, 1e200))) == [False] * 6


def test_a_token_that_fires_takes_its_natural_pass_and_others_are_not_touched():
    config = settings(integrator="naive", loops=4)
    out, where = integrate_guarded(g, X0, config, Guard(1.2, OPEN.band))
    assert mx.array_equal(out, mx.where(where, g(X0), integrate(g, X0, config)))


def test_what_is_not_a_number_falls_back():
    def explode(x, between=None):
        explode.calls += 1
        return x * (float("nan") if explode.calls == 3 else 0.9)

    explode.calls = 0
    out, where = integrate_guarded(explode, X0, settings(integrator="naive", loops=3), OPEN)
    assert mx.all(where)
    assert mx.array_equal(out, X0 * 0.9)


@pytest.mark.parametrize("integrator", list(INTEGRATORS))
def test_a_guard_that_never_fires_changes_nothing(model, integrator):
    config = LoopConfig(integrator=integrator, loops=4)
    text = tokens(2, 9)
    plain = model.with_loop(config)(text)
    guarded = model.with_loop(LoopConfig(integrator=integrator, loops=4, guard=OPEN))(text)
    assert mx.array_equal(guarded, plain)


@pytest.mark.parametrize("scope", ["block", "layer"])
@pytest.mark.parametrize("policy", ["first", "own"])
def test_a_guard_that_always_fires_is_the_unlooped_model(one_of_each, scope, policy):
    always = Guard(growth=1e-30)
    loop = LoopConfig(loops=3, scope=scope, cache=policy, window=(2, 6), guard=always)
    looped, text = one_of_each.with_loop(loop), tokens(2, 9)
    found, expected = [], []
    for view, outs in ((looped, found), (one_of_each.with_loop(None), expected)):
        cache = make_prompt_cache(view)
        outs += [
            view(text[:, :6], cache=cache),
            *(view(text[:, i : i + 1], cache=cache) for i in (6, 7)),
        ]
    # float32, the same operations; only fused kernels may round differently.
    assert relative_error(mx.concatenate(found, 1), mx.concatenate(expected, 1)) < 1e-5
    firings, loops = looped.take_firings()
    assert firings == loops == 2 * 8 * (1 if scope == "block" else 4)


def test_without_a_guard_none_of_it_runs(model, monkeypatch):
    monkeypatch.setattr(mlx_loop.method.loop, "integrate_guarded", None)
    looped = model.with_loop(LoopConfig(loops=3))
    looped(tokens(1, 4), cache=make_prompt_cache(looped))
    assert looped.take_firings() == (0, 0)


def test_firings_are_counted_in_generation_and_read_once(model):
    looped = model.with_loop(LoopConfig(loops=3, guard=Guard(growth=1e-30)))
    cache = make_prompt_cache(looped)
    looped.for_prompt(cache, 5)(tokens(1, 5), cache=cache)
    looped(tokens(1, 7))  # No cache: this may be training in a compiled function.
    assert looped.take_firings() == (5, 5)
    assert looped.take_firings() == (0, 0)


def test_the_count_is_evaluated_with_the_state_and_holds_no_graph(tmp_path):
    count, out = Count(), mx.zeros((1, 2, 3))
    for _ in range(4):
        out = count.add(mx.array([[[True], [False]]]), out + 1)
    mx.eval(out)
    mx.export_to_dot(str(tmp_path / "graph.dot"), count._fired)
    assert "->" not in (tmp_path / "graph.dot").read_text()
    assert count.take() == (4, 8)


def test_json_and_text_round_trip():
    config = LoopConfig(loops=3, guard=Guard(1.25, (0.5, 2)))
    assert LoopConfig.from_json(config.to_json()) == config
    assert "guard 1.25,0.5:2" in str(config)
    assert config.to_dict()["guard"] == {"growth": 1.25, "band": [0.5, 2]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"growth": 0},
        {"growth": float("nan")},
        {"growth": "x"},
        {"band": (1.1, 2)},
        {"band": (0.5, 0.9)},
        {"band": (0.5,)},
        {"band": 1},
    ],
)
def test_wrong_limits_are_refused(wrong):
    (field,) = wrong
    with pytest.raises(UserError, match=f"{field}="):
        Guard(**wrong)


def test_a_guard_is_a_guard():
    for wrong in (True, 1.5, {"grow": 2}):
        with pytest.raises(UserError, match="guard="):
            LoopConfig(guard=wrong)
