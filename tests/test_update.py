"""The arithmetic of one update."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_loop.kernels import Rescale, RMSNorm, combine, token_norm, update


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
