"""Identities, orders of convergence and invariances, on maps whose flow is known."""

from __future__ import annotations

import math
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error

from mlx_loop import LoopConfig, UserError
from mlx_loop.integrators import INTEGRATORS
from mlx_loop.method.integrate import NONLINEAR, integrate
from mlx_loop.method.kernels import token_norm
from mlx_loop.method.plan import compiled, is_natural, passes, plan, tableau
from mlx_loop.presets import resolve

CONSISTENT = ("naive", "euler", "anchored", "residual_scaled")


def config(integrator, loops, **settings):
    return resolve(LoopConfig(integrator=integrator, loops=loops, **settings), "qwen3", 12)


class Map:
    """x + f(x) as a window that counts its passes."""

    def __init__(self, f):
        self.f, self.count = f, 0

    def __call__(self, x, between=None):
        self.count += 1
        y = x + self.f(x)
        return y if between is None else between(0, y)


def run(f, x0, integrator, loops, **settings):
    return integrate(Map(f), x0, config(integrator, loops, **settings))


@pytest.fixture
def x0():
    return mx.array(np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32))


MATRIX = mx.array(np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32) * 0.1)


def smooth(x):
    return mx.tanh(x @ MATRIX)


@pytest.mark.parametrize(
    ("integrator", "order"),
    [("euler", 1), ("midpoint", 2), ("heun", 2), ("kutta3", 3), ("rk4", 4)],
)
@pytest.mark.parametrize("horizon", [0.5, 1, 2, 3])
def test_order_of_convergence(integrator, order, horizon):
    # x' = -x^2 flows to x / (1 + T x). In float64, so that rounding does not hide order 4.
    start = np.linspace(0.5, 2.0, 8).reshape(1, 1, 8) / horizon
    expected = start / (1 + horizon * start)
    errors = []
    for loops in (20, 40):
        settings = config(integrator, loops, horizon=horizon)
        errors.append(np.abs(_in_float64(settings, lambda x: x - x * x, start) - expected).max())
    assert INTEGRATORS[integrator].order == order
    # Between two finite step sizes the next order still shows a little.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def _in_float64(settings, g, x0):
    """The package's own plan, walked through in numpy's float64."""
    todo, states = plan(settings), {0: x0}

    def form(step):
        return sum(c * states[j] for c, j in zip(step.coefficients, step.states, strict=True))

    for i, stage in enumerate(todo.stages):
        states[2 * i] = form(stage)
        states[2 * i + 1] = g(states[2 * i])
    return form(todo.out)


@pytest.mark.parametrize("loops", [1, 2, 3, 7])
@pytest.mark.parametrize("name", [n for n in INTEGRATORS if n not in NONLINEAR])
def test_the_driver_agrees_with_the_tableau_it_runs(name, loops, x0):
    settings = config(name, loops)
    if name == "norm_stab":
        return
    step = tableau(settings)
    fs = []
    for row in step.a:
        fs.append(smooth(x0 + sum(float(a) * f for a, f in zip(row, fs, strict=True) if a)))
    expected = x0 + sum(float(b) * f for b, f in zip(step.weights, fs, strict=True))
    assert relative_error(run(smooth, x0, name, loops), expected) < 1e-5


@pytest.mark.parametrize("loops", [7, 8, 12])
@pytest.mark.parametrize("name", [n for n in INTEGRATORS if n not in NONLINEAR])
def test_a_long_plan_is_that_of_its_whole_tableau(name, loops):
    horizons = {"horizon": 2.0} if "horizon" in INTEGRATORS[name].reads else {}
    for settings in (config(name, loops), config(name, loops, **horizons)):
        assert plan(settings) == compiled(tableau(settings))


def test_the_longest_loop_is_planned_at_once():
    start = time.process_time()
    assert plan(config("rk4", 250)).passes == plan(config("heavy_ball", 1000)).passes == 1000
    assert time.process_time() - start < 5  # Elimination over the whole tableau takes minutes.


@pytest.mark.parametrize(("name", "loops"), [("anchored", 1001), ("rk4", 251), (None, 10**60)])
def test_more_passes_than_anybody_wants_are_refused(name, loops):
    with pytest.raises(UserError, match="1000 passes"):
        LoopConfig(integrator=name, loops=loops)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("loops", [1, 2, 5])
def test_anchored_is_the_runge_kutta_method_of_the_paper(loops, beta):
    settings = config("anchored", loops, beta=beta)
    weights = [float(w) for w in tableau(settings).weights]
    s = 1 / loops
    assert weights == pytest.approx([beta + (1 - beta) * s] + [(1 - beta) * s] * (loops - 1))


@pytest.mark.parametrize("name", CONSISTENT)
@pytest.mark.parametrize("beta", [0.1, 0.3, 0.7, 1 / 3])
def test_one_loop_is_the_natural_pass_to_the_bit(name, beta, x0):
    x0 = x0.astype(mx.bfloat16)
    assert is_natural(config(name, 1, beta=beta))
    assert mx.array_equal(run(smooth, x0, name, 1, beta=beta), Map(smooth)(x0))


def test_anchored_with_beta_1_is_the_natural_pass_and_costs_one(x0):
    settings = config("anchored", 6, beta=1.0)
    assert is_natural(settings)
    assert passes(settings) == 1
    assert mx.array_equal(integrate(Map(smooth), x0, settings), Map(smooth)(x0))


@pytest.mark.parametrize("horizon", [0.5, 2.0])
@pytest.mark.parametrize("loops", [1, 3, 6])
def test_a_horizon_by_its_definition(loops, horizon, x0):
    x, natural = x0, x0 + smooth(x0)
    for _ in range(loops):
        x = x + horizon / loops * smooth(x)
    assert relative_error(run(smooth, x0, "euler", loops, horizon=horizon), x) < 1e-5
    for beta in (-0.5, 0.5, 1.5):
        found = run(smooth, x0, "anchored", loops, beta=beta, horizon=horizon)
        assert relative_error(found, beta * natural + (1 - beta) * x) < 1e-5


def test_only_a_horizon_of_1_is_the_natural_pass_at_one_loop():
    assert is_natural(config("euler", 1, horizon=1))
    assert not is_natural(config("euler", 1, horizon=2))
    assert passes(config("anchored", 6, horizon=2.0)) == 6


def test_anchored_with_beta_0_is_euler(x0):
    assert mx.array_equal(run(smooth, x0, "anchored", 4, beta=0.0), run(smooth, x0, "euler", 4))


def test_euler_with_two_loops_is_ema_with_alpha_a_half(x0):
    assert mx.array_equal(run(smooth, x0, "euler", 2), run(smooth, x0, "ema", 2, alpha=0.5))


def test_ema_with_alpha_1_and_input_anchor_with_alpha_1_are_naive(x0):
    naive = run(smooth, x0, "naive", 3)
    for name in ("ema", "input_anchor"):
        assert mx.array_equal(run(smooth, x0, name, 3, alpha=1.0), naive)


def test_ema_takes_one_alpha_per_loop(x0):
    x = x0
    for alpha in (0.9, 0.5, 0.1):
        x = x + alpha * smooth(x)
    assert relative_error(run(smooth, x0, "ema", 3, alpha=(0.9, 0.5, 0.1)), x) < 1e-6


def test_heavy_ball_without_momentum_is_ema(x0):
    ball = run(smooth, x0, "heavy_ball", 4, alpha=0.3, momentum=0.0)
    assert mx.array_equal(ball, run(smooth, x0, "ema", 4, alpha=0.3))


def test_heavy_ball_by_its_definition(x0):
    x, before = x0, x0
    for _ in range(4):
        x, before = x + 0.4 * smooth(x) + 0.3 * (x - before), x
    assert relative_error(run(smooth, x0, "heavy_ball", 4, alpha=0.4, momentum=0.3), x) < 1e-6


def test_input_anchor_by_its_definition(x0):
    x = x0
    for _ in range(4):
        x = 0.4 * (x + smooth(x)) + 0.6 * x0
    assert relative_error(run(smooth, x0, "input_anchor", 4, alpha=0.4), x) < 1e-6


def test_poly_blend_by_its_definition(x0):
    powers = [x0]
    for _ in range(3):
        powers.append(powers[-1] + smooth(powers[-1]))
    weights = (0.1, 0.2, 0.3, 0.4)
    expected = sum(w * p for w, p in zip(weights, powers, strict=True))
    assert relative_error(run(smooth, x0, "poly_blend", 3, weights=weights), expected) < 1e-6


def test_residual_scaled_by_its_definition(x0):
    x = x0
    for _ in range(4):
        x = x + smooth(x)
    assert relative_error(run(smooth, x0, "residual_scaled", 4), x0 + (x - x0) / 4) < 1e-6


def test_norm_stab_keeps_the_norm_at_window_entry(x0):
    out = run(smooth, x0, "norm_stab", 4)
    np.testing.assert_allclose(token_norm(out), token_norm(x0), rtol=1e-5)
    x = x0
    for _ in range(4):
        x = x + 0.5 * smooth(x)
        x = x * token_norm(x0) / token_norm(x)
    assert relative_error(out, x) < 1e-5


def test_uniform_passes_on_running_means(x0):
    first = x0 + smooth(x0)
    second = (first + first + smooth(first)) / 2
    third = (2 * second + second + smooth(second)) / 3
    assert relative_error(run(smooth, x0, "uniform", 3), third) < 1e-6


def test_uniform_averages_at_every_layer(x0):
    def layers(x, between=None):
        for i in range(2):
            x = x + smooth(x + i)
            x = x if between is None else between(i, x)
        return x

    means, x = [mx.zeros_like(x0)] * 2, x0
    for loop in range(1, 4):
        for i in range(2):
            means[i] = means[i] + (x + smooth(x + i) - means[i]) / loop
            x = means[i]
    assert relative_error(integrate(layers, x0, config("uniform", 3)), x) < 1e-6


def test_anderson_solves_a_linear_problem_in_as_many_steps_as_it_has_dimensions():
    # f(x) = A (x* - x) in 3 dimensions: Anderson with full memory is GMRES, exact at step 4.
    rng = np.random.default_rng(0)
    a = mx.array((np.eye(3) + 0.3 * rng.normal(size=(3, 3))).astype(np.float32))
    solution = mx.array(rng.normal(size=(1, 2, 3)).astype(np.float32))
    out = run(lambda x: (solution - x) @ a, mx.zeros((1, 2, 3)), "anderson", 4, memory=3)
    assert relative_error(out, solution) < 1e-4


def test_anderson_by_least_squares(x0):
    # The definition, token by token, with numpy's least squares in float64.
    f = lambda x: np.tanh(x @ np.array(MATRIX, np.float64))  # noqa: E731
    expected = np.empty(x0.shape)
    for index in np.ndindex(x0.shape[:2]):
        xs, d = [np.array(x0, np.float64)[index]], 0.7
        fs = []
        for k in range(5):
            fs.append(f(xs[-1]))
            step = d * fs[-1]
            if k:
                m = min(2, k)
                dx = np.stack([xs[-i] - xs[-i - 1] for i in range(1, m + 1)], -1)
                df = np.stack([fs[-i] - fs[-i - 1] for i in range(1, m + 1)], -1)
                c = np.linalg.lstsq(df, fs[-1], rcond=None)[0]
                step = step - (dx + d * df) @ c
            xs.append(xs[-1] + step)
        expected[index] = xs[-1]
    found = run(smooth, x0, "anderson", 5, memory=2, damping=0.7)
    assert relative_error(found, expected.astype(np.float32)) < 1e-4


def test_anderson_at_a_fixed_point_stays_there(x0):
    assert mx.array_equal(run(mx.zeros_like, x0, "anderson", 4), x0)


def test_aitken_is_exact_for_an_alternating_linear_map_and_never_exceeds_a_naive_step(x0):
    # g(x) = -x/2 in each coordinate: delta-squared finds the fixed point 0 at once.
    out = run(lambda x: -1.5 * x, x0, "aitken", 2)
    assert mx.abs(out).max() < 1e-6
    moved = mx.abs(run(smooth, x0, "aitken", 2) - x0)
    assert mx.all(moved <= mx.abs(smooth(x0)) + 1e-6)


def test_aitken_takes_the_naive_step_where_the_second_difference_is_zero(x0):
    out = run(lambda x: mx.full(x.shape, 0.25), x0, "aitken", 2)
    assert relative_error(out, x0 + 0.25) < 1e-6


@pytest.mark.parametrize("name", INTEGRATORS)
@pytest.mark.parametrize("loops", [2, 4])
def test_passes_is_how_often_g_runs_and_the_table_says_so(name, loops, x0):
    settings, g = config(name, loops), Map(smooth)
    integrate(g, x0, settings)
    assert g.count == passes(settings) == loops * INTEGRATORS[name].passes_per_loop


@pytest.mark.parametrize("name", INTEGRATORS)
def test_tokens_do_not_see_each_other(name, x0):
    whole = run(smooth, x0, name, 4)
    parts = mx.concatenate([run(smooth, x0[:, i : i + 1], name, 4) for i in range(3)], axis=1)
    assert relative_error(parts, whole) < 1e-5


@pytest.mark.parametrize("name", INTEGRATORS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_dtype_is_kept(name, dtype, x0):
    assert run(lambda x: 0.1 * x, x0.astype(dtype), name, 4).dtype == dtype


def test_every_integrator_is_a_tableau_or_a_function_and_has_a_source():
    assert {name for name, i in INTEGRATORS.items() if i.tableau is None} == set(NONLINEAR)
    assert all(integrator.source for integrator in INTEGRATORS.values())


@pytest.mark.parametrize("name", [n for n in INTEGRATORS if n != "norm_stab"])
def test_interpolated_norm_at_one_loop_changes_nothing(name, x0):
    loops = 2 if name == "aitken" else 1
    free, interpolated = (run(smooth, x0, name, loops, norm=n) for n in ("free", "interpolated"))
    assert mx.array_equal(free, interpolated)


@pytest.mark.parametrize("loops", [2, 3, 5])
@pytest.mark.parametrize("name", ["naive", "euler", "anchored", "ema", "heavy_ball", "rk4"])
def test_interpolated_norm_rescales_every_iterate_but_the_last(name, loops, x0):
    start, end = token_norm(x0), token_norm(x0 + smooth(x0))
    entered = []

    def f(x):
        entered.append(token_norm(x))
        return smooth(x)

    run(f, x0, name, loops, norm="interpolated")
    stages = INTEGRATORS[name].passes_per_loop
    for k in range(loops):
        expected = start + (end - start) * k / loops
        np.testing.assert_allclose(entered[k * stages], expected, rtol=1e-4)


def test_interpolated_anchored_by_its_definition(x0):
    natural, x, loops, beta = x0 + smooth(x0), x0, 4, 0.3
    for k in range(1, loops + 1):
        x = x + smooth(x) / loops
        if k < loops:
            start, end = token_norm(x0), token_norm(natural)
            x = x * (start + (end - start) * k / loops) / token_norm(x)
    expected = beta * natural + (1 - beta) * x
    found = run(smooth, x0, "anchored", loops, beta=beta, norm="interpolated")
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("loops", [2, 8, 16])
def test_euler_and_anchored_keep_few_states_however_many_loops(loops):
    for name in ("euler", "anchored", "ema", "rk4"):
        todo = plan(config(name, loops))
        assert max(len(stage.states) for stage in (*todo.stages, todo.out)) <= 5
