"""Intervals and tests, against values worked out by hand or by brute force."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest

from mlx_loop import UserError
from mlx_loop.significance import bootstrap_mean, holm, mcnemar, sign_flips, wilson


def test_wilson_solves_its_own_quadratic():
    z = 1.959964
    for right, count in ((0, 10), (7, 10), (90, 96)):
        for edge in wilson(right, count):
            spread = z**2 * edge * (1 - edge) / count
            assert (right / count - edge) ** 2 == pytest.approx(spread, abs=1e-7)


def test_mcnemar_counts_only_items_that_changed():
    # 1 gained, 5 lost: 2 P(X <= 1), X of 6 fair coins.
    differences = [1] + [-1] * 5 + [0] * 100
    assert mcnemar(differences) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar([0] * 5) == mcnemar([1, -1]) == 1


def test_sign_flips_are_all_sign_flips_of_few_values():
    values = [0.1, 0.2, 0.4, -0.05, 0.3]
    total = abs(sum(values))
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    assert sign_flips(values) == pytest.approx(sum(s >= total - 1e-12 for s in sums) / 32)
    assert sign_flips([0.0] * 4) == sign_flips([0.3]) == 1


def test_the_bootstrap_has_the_normal_width_for_many_values():
    values = np.random.default_rng(0).normal(1, 2, 2000).tolist()
    low, high = bootstrap_mean(values)
    # 5000 resamples: the width is known to about 2 %.
    assert high - low == pytest.approx(2 * 1.96 * 2 / math.sqrt(2000), rel=0.08)
    assert low < 1 < high
    assert bootstrap_mean([0.5] * 3) == (0.5, 0.5)


def test_holm_steps_down_and_never_decreases():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_without_scipy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match="eval"):
        wilson(1, 2)
