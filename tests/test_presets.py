"""Fields that are left out take the preset of the model's kind and size."""

from __future__ import annotations

import pytest

from mlx_loop import LoopConfig
from mlx_loop.integrators import INTEGRATORS
from mlx_loop.presets import default_window, resolve
from mlx_loop.settings import INTEGRATOR_FIELDS


def resolved(num_layers=36, model_type="qwen3", mixes_experts=False, **settings):
    return resolve(LoopConfig(**settings), model_type, num_layers, mixes_experts)


@pytest.mark.parametrize(
    ("model_type", "num_layers", "window"),
    [("qwen3", 36, (15, 19)), ("qwen3_moe", 48, (22, 26)), ("llama", 32, (13, 17))],
)
def test_windows_that_are_known_to_be_good(model_type, num_layers, window):
    assert resolved(num_layers, model_type).window == window


@pytest.mark.parametrize("num_layers", range(1, 130))
def test_the_window_fits_any_depth(num_layers):
    start, stop = default_window(num_layers)
    assert 0 <= start < stop <= num_layers
    if num_layers >= 3:
        assert start >= 1
        assert stop <= num_layers - 1
    if num_layers >= 6:
        assert stop - start == 4
        # Half a layer of rounding, and a quarter where a very shallow model leaves no choice.
        assert abs((start + stop) / 2 - 0.47 * num_layers) <= 0.75


def test_presets_of_dense_models_and_of_mixtures():
    dense = resolved()
    assert dense == LoopConfig(
        window=(15, 19),
        loops=3,
        integrator="anchored",
        beta=0.5,
        scope="block",
        routing="live",
        norm="free",
        cache="first",
        decode="full",
    )
    mixture = resolved(mixes_experts=True)
    assert (mixture.scope, mixture.routing) == ("layer", "frozen")


def test_what_is_given_stays():
    given = {"loops": 6, "beta": 0.25, "scope": "layer", "cache": "own", "decode": 64}
    preset = resolved(**given)
    assert {name: getattr(preset, name) for name in given} == given


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_an_integrator_has_its_own_fields_and_no_others(integrator):
    preset = resolved(integrator=integrator, beta=0.3)
    for field, users in INTEGRATOR_FIELDS.items():
        assert (getattr(preset, field) is not None) == (integrator in users)
    assert resolve(preset, "qwen3", 36) == preset


@pytest.mark.parametrize(
    ("fractions", "num_layers", "window"),
    [
        ((0.4, 0.5), 36, (14, 18)),
        ((0.0, 1.0), 36, (0, 36)),
        ((0.5, 0.51), 12, (6, 7)),
        ((0.99, 1.0), 4, (3, 4)),
        (((0.1, 0.2), (0.5, 0.6)), 20, ((2, 4), (10, 12))),
    ],
)
def test_a_window_may_be_fractions_of_the_depth(fractions, num_layers, window):
    assert resolved(num_layers, window=fractions).window == window


def test_a_window_outside_the_model_is_refused():
    with pytest.raises(ValueError, match=r"window=\(30, 40\).*36 layers"):
        resolved(window=(30, 40))


def test_several_windows_may_not_meet_once_they_are_layers():
    with pytest.raises(ValueError, match="does not overlap"):
        resolved(4, window=((0.0, 0.05), (0.06, 0.1)))
