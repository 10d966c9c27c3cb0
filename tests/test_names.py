"""Names of settings: they tell them apart."""

from __future__ import annotations

from mlx_loop import Guard, LoopConfig
from mlx_loop.measure.names import names

BASE = {"window": [4, 8], "integrator": "anchored", "beta": 0.5, "cache": "first"}


def test_names_tell_settings_apart():
    loops = [
        LoopConfig.from_dict({**BASE, "loops": k, "cache": c})
        for k, c in ((2, "first"), (3, "own"))
    ]
    assert names([None, *loops]) == [
        "no loop",
        "anchored, cache first, K = 2",
        "anchored, cache own, K = 3",
    ]


def test_titles_name_what_differs():
    more = LoopConfig(loops=6, integrator="euler", window=(2, 4))
    base = LoopConfig(loops=3, integrator="euler", window=(2, 4))
    assert names([None, base, more], brief=True) == [
        "no loop",
        "3 loops",
        "6 loops",
    ]
    other = LoopConfig(loops=3, integrator="anchored", beta=0.5, window=(2, 5))
    assert names([None, base, other], brief=True)[1:] == [
        "[2,4), euler",
        "[2,5), anchored, beta 0.5",
    ]


def test_a_setting_with_a_guard_has_another_name():
    plain, guarded = (LoopConfig(integrator="naive", loops=2, guard=g) for g in (None, Guard()))
    assert names([plain, guarded]) == ["naive, K = 2", "naive, guard 1.5,0.8:1.2, K = 2"]
