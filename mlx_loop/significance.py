"""Is a difference more than chance? Intervals and tests for paired outcomes; needs scipy.

Outcomes are paired: every setting answers the same items, so each is compared with the un-looped
model item by item. All intervals are 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import UserError

LEVEL = 0.05
RESAMPLES = 5000


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    interval = _stats().binomtest(right, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean; of paired differences, the paired one."""
    if len(set(values)) == 1:
        return values[0], values[0]
    interval = (
        _stats()
        .bootstrap((values,), _mean, n_resamples=RESAMPLES, method="percentile", rng=0, batch=500)
        .confidence_interval
    )
    return float(interval.low), float(interval.high)


def mcnemar(differences: Sequence[float]) -> float:
    """Two-sided exact McNemar test of right-or-wrong outcomes.

    Args:
        differences: for each item 1, 0 or -1: gained, the same, lost.
    """
    gained, lost = (sum(d == sign for d in differences) for sign in (1, -1))
    return 1.0 if gained == lost else float(_stats().binomtest(gained, gained + lost).pvalue)


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided paired permutation test that the mean is 0: exact, or of random sign flips."""
    if len(differences) < 2 or not any(differences):
        return 1.0
    test = _stats().permutation_test(
        (differences,),
        _mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        rng=0,
        batch=500,
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests at once. S. Holm, Scand. J. Statist. 6, 1979."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _mean(x: Any, axis: int) -> Any:
    return x.mean(axis=axis)


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError(
            "the statistics need scipy: install mlx-loop with its eval extra, pip install "
            "'mlx-loop[eval]'"
        ) from error
    return stats
