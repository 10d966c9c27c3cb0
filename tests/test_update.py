"""The arithmetic of one update."""

from __future__ import annotations

import sys
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error

from mlx_loop.method.kernels import Anderson, Rescale, combine, token_norm, update

module = sys.modules["mlx_loop.method.kernels.update"]


def states(count, dtype, shape=(2, 5, 48)):
    rng = np.random.default_rng(0)
    return [mx.array(rng.normal(size=shape)).astype(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_combine_accumulates_in_float32_and_keeps_the_dtype(dtype, count):
    ys = states(count, dtype)
    cs = np.linspace(-0.5, 1.1, count)
    exact = sum(c * np.array(y.astype(mx.float32), np.float64) for c, y in zip(cs, ys, strict=True))
    out = combine(cs.tolist(), ys)
    assert out.dtype == dtype
    # One rounding to the dtype, and float32 sums.
    spacing = {mx.float32: 1e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    assert np.abs(np.array(out.astype(mx.float32)) - exact).max() <= spacing * np.abs(exact).max()


def test_a_step_that_changes_nothing_is_the_state_itself():
    x, y = states(2, mx.bfloat16)
    assert combine((0.0, 1.0), (x, y)) is y


def test_rescale_sets_each_tokens_norm():
    (x,) = states(1, mx.float32)
    ends = mx.array(np.random.default_rng(1).uniform(1, 3, (2, 5, 2)).astype(np.float32))
    out = update((1,), (x,), rescale=Rescale(0.25, ends)).out
    target = 0.75 * ends[..., :1] + 0.25 * ends[..., 1:]
    np.testing.assert_allclose(token_norm(out), target, rtol=1e-5)
    cosine = mx.sum(x * out, -1, keepdims=True) / (token_norm(x) * target)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)


def test_rescale_leaves_a_zero_token_zero():
    zeros = mx.zeros((1, 2, 8))
    out = update((1,), (zeros,), rescale=Rescale(0, mx.ones((1, 2, 2)))).out
    assert mx.array_equal(out, zeros)


def test_norms_are_measured_in_the_same_update():
    x, gx = states(2, mx.bfloat16)
    found = update((0.5, 0.5), (x, gx), measure=[(1, 0), (-1, 1)])
    assert mx.array_equal(found.out, combine((0.5, 0.5), (x, gx)))
    residual = token_norm(gx.astype(mx.float32) - x.astype(mx.float32))
    expected = mx.concatenate([token_norm(x), residual], axis=-1)
    np.testing.assert_allclose(found.norms, expected, rtol=1e-6)


def test_measured_and_given_norms_rescale_alike():
    ys = states(2, mx.float32)
    ends = mx.concatenate([token_norm(y) for y in ys], axis=-1)
    measured = update((0.3, 0.7), ys, measure=[(1, 0), (0, 1)], rescale=Rescale(0.4))
    given = update((0.3, 0.7), ys, rescale=Rescale(0.4, ends))
    assert relative_error(measured.out, given.out) < 1e-6
    np.testing.assert_allclose(measured.norms, ends, rtol=1e-6)


# Every kind of update, as a function of three states.
KINDS = {
    "linear": lambda use, *y: update((0.2, 0.5, 0.3), y, use_kernel=use),
    "aitken": lambda use, *y: update("aitken", y, use_kernel=use),
    "anderson": lambda use, *y: update(Anderson(0.7), (*y, y[0] * y[1]), use_kernel=use),
    "rescaled": lambda use, *y: update(
        (0.2, 0.5, 0.3), y, measure=[(1, 0, 0), (0, 1, 0)], rescale=Rescale(0.4), use_kernel=use
    ),
    "measured": lambda use, *y: update((0.2, 0.5, 0.3), y, measure=[(-1, 1, 0)], use_kernel=use),
}


def test_the_twin_is_one_graph_for_every_shape():
    kind = KINDS["rescaled"]
    kind(False, *states(3, mx.float32))
    with mock.patch.object(mx, "rsqrt", side_effect=AssertionError("traced again")):
        for shape in ((1, 1, 48), (3, 7, 48), (2, 5, 20)):
            ys = states(3, mx.float32, shape)
            target = 0.6 * token_norm(ys[0]) + 0.4 * token_norm(ys[1])
            np.testing.assert_allclose(token_norm(kind(False, *ys).out), target, rtol=1e-5)


@pytest.fixture
def kernels_on_host():
    """The kernel's side of the dispatcher, with the twin in the place of the GPU's function."""

    def on_host(variant, backend, *arrays):
        return module.twin(variant)(*arrays)

    module._kernel.cache_clear()
    with mock.patch.object(module, "_on_any_rank", on_host):
        yield
    module._kernel.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_have_the_derivatives_of_the_twin(kind, kernels_on_host):
    ys = states(3, mx.float32)
    (probe,) = states(1, mx.float32)

    def loss(use, *y):
        found = KINDS[kind](use, *y)
        extra = [x for x in found[1:] if x is not None]
        return mx.sum(found.out * probe) + sum(mx.sum(x) for x in extra)

    gradients = [mx.grad(loss, argnums=(1, 2, 3))(use, *ys) for use in (True, False)]
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 1e-6
    tangents = [
        mx.jvp(lambda *y, use=use: KINDS[kind](use, *y).out, ys, [probe] * 3)[1][0]
        for use in (True, False)
    ]
    assert relative_error(*tangents) < 1e-6


def test_the_gradient_is_that_of_the_formula():
    # Central differences in float32 of a loss of about 10: a step of 1e-2 balances truncation and
    # rounding at about 1e-3 of the gradient's size.
    ys = states(3, mx.float32)
    (probe,) = states(1, mx.float32)

    def loss(x):
        return mx.sum(KINDS["rescaled"](None, x, *ys[1:]).out * probe)

    (direction,) = states(1, mx.float32)
    slope = mx.sum(mx.grad(loss)(ys[0]) * direction)
    step = 1e-2 * direction
    difference = (loss(ys[0] + step) - loss(ys[0] - step)) / 2e-2
    assert relative_error(slope, difference) < 5e-3


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_map_over_any_axis(kind, use, kernels_on_host):
    ys = states(3, mx.float32, (4, 2, 5, 48))
    expected = mx.stack([KINDS[kind](False, ys[0][i], ys[1][i], ys[2][0]).out for i in range(4)])
    moved = mx.moveaxis(ys[1], 0, 2)
    mapped = mx.vmap(lambda *y: KINDS[kind](use, *y).out, in_axes=(0, 2, None))
    assert relative_error(mapped(ys[0], moved, ys[2][0]), expected) < 1e-6
