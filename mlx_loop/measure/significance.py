"""Is a difference more than chance? Paired studies: the same problems under several settings.

The problem is the unit. Several answers to one problem (seeds) are averaged first, because they
are not independent: a test per answer overstates how sure one may be. Only numpy is needed; the
tests check everything against scipy, closed forms and simulated studies. Intervals are 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.05  # of all tests; one less it, of all intervals
POWER = 0.8  # with which `problems_needed` detects a difference
RESAMPLES = 10_000
EXACT_UP_TO = 500  # problems that differ; above, the normal approximation is as good

_normal = NormalDist()


@dataclass(frozen=True)
class Paired:
    """One setting against the baseline, over problems.

    Attributes:
        problems: how many there are.
        difference: mean score of the setting less that of the baseline.
        low, high: 95 % interval of the difference (`score_interval`).
        p: of the hypothesis that the setting changes nothing (`signed_rank_p`).
        needed: problems that would show this difference (`problems_needed`); None: none is seen.
    """

    problems: int
    difference: float
    low: float
    high: float
    p: float
    needed: int | None


def paired(scores: ArrayLike, baseline: ArrayLike, seed: int = 0, bounded: bool = True) -> Paired:
    """Compares the scores of a setting with the baseline's on the same problems.

    Args:
        scores, baseline: (problems,) or (problems, answers). The two may have different numbers of
            answers.
        seed: of the bootstrap.
        bounded: whether scores are from 0 to 1; losses have no bounds.

    Raises:
        ValueError: different numbers of problems, or none.
    """
    a, b = per_problem(scores), per_problem(baseline)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} problems are not pairs")
    differences = a - b
    low, high = score_interval(differences, seed, bounded)
    return Paired(
        problems=len(a),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p=signed_rank_p(differences),
        needed=problems_needed(differences),
    )


def per_problem(scores: ArrayLike) -> NDArray[np.float64]:
    """The mean score of each problem: (problems,) or (problems, answers) -> (problems,)."""
    array = np.asarray(scores, np.float64)
    return array.mean(axis=1) if array.ndim == 2 else array


def bootstrap_mean(values: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean; of paired differences, over problems.

    The percentiles are widened as Student's t is wider than the normal distribution (the
    "expanded percentile interval" of Hesterberg, What Teachers Should Know About the Bootstrap,
    The American Statistician 69, 2015), or few problems would look too certain.

    Args:
        values: (problems,).
    """
    found, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    if len(found) == 1:
        return float(found[0]), float(found[0])
    # Drawing n problems with replacement is drawing how often each value comes up.
    n = int(counts.sum())
    rng = np.random.default_rng(seed)
    chunk = max(1, 5_000_000 // len(found))
    means = np.concatenate(
        [
            rng.multinomial(n, counts / n, size=min(chunk, RESAMPLES - start)) @ found / n
            for start in range(0, RESAMPLES, chunk)
        ]
    )
    t = student_quantile(1 - LEVEL / 2, n - 1)
    tail = _normal.cdf(-math.sqrt(n / (n - 1)) * t)
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def score_interval(
    differences: ArrayLike, seed: int = 0, bounded: bool = True
) -> tuple[float, float]:
    """`bootstrap_mean` of differences of scores, each from -1 to 1 where they are bounded.

    Where all n pairs agree there is nothing to resample. Then it is the largest share of problems
    that may differ with none of n showing it: 1 - 0.05^(1/n) either way. A single difference
    without bounds says nothing of the next one.
    """
    d = np.asarray(differences, np.float64)
    if not bounded:
        return bootstrap_mean(d, seed) if len(d) > 1 else (-math.inf, math.inf)
    low, high = bootstrap_mean(d, seed)
    slack = 1 - LEVEL ** (1 / len(d)) if low == high else 0.0
    return max(low - slack, -1.0), min(high + slack, 1.0)


def signed_rank_p(differences: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, exact also with ties.

    Problems without a difference say nothing and are left out. If all differences are equally
    large, as with answers that are right or wrong, this *is* the exact McNemar test. With more than
    `EXACT_UP_TO` different ones of unequal size it is the normal approximation with the variance
    of the ties and a continuity correction.

    Args:
        differences: (problems,).
    """
    d = np.asarray(differences, np.float64)
    # Averages over seeds that are equal on paper may differ in the last bit.
    d = np.round(d[np.abs(d) > 1e-12], 12)
    if not len(d):
        return 1.0
    _, group, counts = np.unique(np.abs(d), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (2 * last - counts + 1)[group]  # twice the mid-ranks: whole numbers
    ranks //= np.gcd.reduce(ranks)
    total, positive = int(ranks.sum()), int(ranks[d > 0].sum())
    smaller = min(positive, total - positive)
    if len(counts) > 1 and len(d) > EXACT_UP_TO:
        sd = math.sqrt(float((ranks.astype(np.float64) ** 2).sum()) / 4)
        return min(1.0, 2 * _normal.cdf(min(0.0, (smaller + 0.5 - total / 2) / sd)))
    # The distribution of the sum of the positive ranks, each sign a fair coin.
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    for rank in ranks:
        chance[rank:] = (chance[rank:] + chance[:-rank]) / 2
        chance[:rank] /= 2
    return min(1.0, 2 * float(chance[: smaller + 1].sum()))


def problems_needed(differences: ArrayLike) -> int | None:
    """Problems with which a two-sided 5 % test shows a difference of this size with 80 % power.

    n = ((z_0.975 + z_0.8) sd / mean)^2, the normal approximation; None where the mean is 0. It
    takes the difference seen for the true one, so it is an order of magnitude.
    """
    d = np.asarray(differences, np.float64)
    if len(d) < 2 or abs(d.mean()) < 1e-12:
        return None
    z = _normal.inv_cdf(1 - LEVEL / 2) + _normal.inv_cdf(POWER)
    return max(2, math.ceil((z * d.std(ddof=1) / d.mean()) ** 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p: the chance of one false claim in all is at most the level (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for tests_before, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - tests_before) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def verdict(difference: float, adjusted_p: float) -> str:
    """What a report may claim: `better`, `worse` or `no detectable difference`."""
    if adjusted_p >= LEVEL:
        return "no detectable difference"
    return "better" if difference > 0 else "worse"


def mean_interval(scores: ArrayLike, seed: int = 0, bounded: bool = True) -> tuple[float, float]:
    """95 % interval of a mean score: Wilson's for right or wrong answers, else `score_interval`.

    Args:
        scores: (problems,) or (problems, answers).
        bounded: whether they are from 0 to 1.
    """
    means = per_problem(scores)
    if bounded and np.isin(means, (0.0, 1.0)).all():
        return wilson(int(means.sum()), len(means))
    low, high = score_interval(means, seed, bounded)
    return max(low, 0.0) if bounded else low, high


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    z = _normal.inv_cdf(1 - LEVEL / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, at least 0.5 of the probability.

    Exact for 1 and 2 degrees of freedom, else the series around the normal quantile (Abramowitz
    and Stegun, 26.7.5); of the 97.5 % quantile at 3 degrees it is 0.13 % off, from 6 on 0.002 %.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        x = 2 * probability - 1
        return x * math.sqrt(2 / (1 - x * x))
    z, v = _normal.inv_cdf(probability), float(degrees)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / v**i for i, term in enumerate(terms))
