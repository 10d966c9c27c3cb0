"""Intervals and tests of paired studies, against scipy, closed forms and simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_loop.measure import significance
from mlx_loop.measure.significance import (
    bootstrap_mean,
    holm,
    mean_interval,
    paired,
    problems_needed,
    score_interval,
    signed_rank_p,
    student_quantile,
    verdict,
    wilson,
)

STUDIES = 1000


@pytest.fixture
def few_resamples(monkeypatch):
    """A thousand studies do not need the resolution of one."""
    monkeypatch.setattr(significance, "RESAMPLES", 1000)


def right_or_wrong(rng, n, gained, lost):
    """Differences of n problems: shares of them become right, or wrong."""
    u = rng.random(n)
    return (u < gained).astype(float) - ((u >= gained) & (u < gained + lost))


def partly_right(rng, n, gain):
    """Differences of n scores that are multiples of a quarter; the problems differ in hardness."""
    ease = rng.uniform(0.2, 0.7, n)
    return (rng.binomial(4, ease + gain, n) - rng.binomial(4, ease, n)) / 4


def test_p_of_right_or_wrong_is_the_exact_mcnemar_test():
    stats = pytest.importorskip("scipy.stats")
    for gained, lost in ((0, 1), (3, 3), (9, 2), (40, 61), (700, 600)):
        differences = [1] * gained + [-1] * lost + [0] * 50
        expected = stats.binomtest(gained, gained + lost).pvalue
        assert signed_rank_p(differences) == pytest.approx(expected, rel=1e-9)


def test_p_without_ties_is_wilcoxons_exact_test():
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 4, 20, 60):
        d = np.random.default_rng(n).normal(0.3, 1, n)
        assert signed_rank_p(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, rel=1e-9)


def test_p_with_ties_counts_every_pattern_of_signs():
    d = np.array([1, -1, 2, 2, 2, -3, 4, 4]) / 4
    ranks = np.array([1.5, 1.5, 4, 4, 4, 6, 7.5, 7.5])
    signs = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
    sums = signs @ ranks
    seen = ranks[d < 0].sum()
    assert signed_rank_p(d) == pytest.approx(2 * (sums <= seen).mean())


def test_many_differences_take_the_normal_approximation_and_agree(monkeypatch):
    d = partly_right(np.random.default_rng(3), 700, 0.03)
    approximate = signed_rank_p(d)
    monkeypatch.setattr(significance, "EXACT_UP_TO", 1000)
    assert approximate == pytest.approx(signed_rank_p(d), rel=0.02)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng: right_or_wrong(rng, 100, 0.15, 0.10), 0.05),
        (lambda rng: right_or_wrong(rng, 300, 0.05, 0.05), 0.0),
        (lambda rng: right_or_wrong(rng, 40, 0.30, 0.10), 0.2),
        (lambda rng: partly_right(rng, 60, 0.1), 0.1),
    ],
)
def test_interval_covers_the_truth_in_93_to_97_of_100_studies(draw, truth):
    rng = np.random.default_rng(7)
    intervals = [score_interval(draw(rng), seed) for seed in range(STUDIES)]
    assert 0.93 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.97


def test_of_studies_without_an_effect_at_most_5_in_100_claim_one():
    rng = np.random.default_rng(8)
    false_claims = 0
    for _ in range(STUDIES):
        # Six settings over one baseline, so that their tests hang together as in a real study.
        ease = rng.uniform(0.2, 0.9, 120)
        baseline = rng.random(120) < ease
        settings = [(rng.random(120) < ease).astype(float) - baseline for _ in range(6)]
        adjusted = holm([signed_rank_p(d) for d in settings])
        false_claims += any(
            verdict(d.mean(), p) != "no detectable difference"
            for d, p in zip(settings, adjusted, strict=True)
        )
    assert false_claims <= 0.05 * STUDIES


def test_seeds_are_averaged_within_the_problem():
    rng = np.random.default_rng(9)
    scores, baseline = rng.random((30, 4)) < 0.6, rng.random((30, 8)) < 0.5
    assert paired(scores, baseline) == paired(scores.mean(axis=1), baseline.mean(axis=1))
    # The same answers counted again are no new evidence.
    assert paired(np.tile(scores, 5), baseline).p == pytest.approx(paired(scores, baseline).p)


def test_problems_needed_give_the_promised_power():
    rng = np.random.default_rng(10)
    n = problems_needed(np.repeat([1.0, -1.0, 0.0], (20, 8, 72)))
    shown = [signed_rank_p(right_or_wrong(rng, n, 0.2, 0.08)) <= 0.05 for _ in range(STUDIES)]
    # An exact test on whole numbers is a little below the nominal level, so its power is too.
    assert 0.75 <= np.mean(shown) <= 0.85
    assert problems_needed([1.0, -1.0, 0.0]) is None


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_pairs_that_all_agree_leave_room_for_what_was_not_seen():
    low, high = score_interval(np.zeros(50))
    assert (1 - high) ** 50 == pytest.approx(0.05)
    assert low == -high
    result = paired(np.ones(50), np.ones(50))
    assert (result.p, result.needed) == (1.0, None)
    assert verdict(result.difference, result.p) == "no detectable difference"


def test_intervals_of_shares_are_wilsons():
    stats = pytest.importorskip("scipy.stats")
    for k, n in ((0, 9), (5, 9), (300, 300)):
        expected = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert mean_interval([1.0] * 5 + [0.0] * 4) == wilson(5, 9)


def test_the_bootstrap_has_the_normal_width_for_many_values():
    values = np.random.default_rng(0).normal(1, 2, 2000)
    low, high = bootstrap_mean(values)
    # 10 000 resamples: the width is known to about 1 %.
    assert high - low == pytest.approx(2 * 1.96 * 2 / math.sqrt(2000), rel=0.05)
    assert low < 1 < high
    assert bootstrap_mean([0.5] * 3) == (0.5, 0.5)


def test_quantiles_of_students_t():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 6, 30, 1000):
        expected = stats.t.ppf(0.975, degrees)
        assert student_quantile(0.975, degrees) == pytest.approx(expected, rel=2e-3)


def test_unequal_numbers_of_problems_are_no_pairs():
    with pytest.raises(ValueError, match="not pairs"):
        paired([1.0, 0.0], [1.0])
    assert math.isclose(paired([1.0, 0.0], [0.0, 0.0]).difference, 0.5)
