"""Loop settings are checked when they are made, and survive JSON."""

from __future__ import annotations

import dataclasses

import pytest

from mlx_loop import LoopConfig, UserError
from mlx_loop.integrators import INTEGRATORS
from mlx_loop.settings import INTEGRATOR_FIELDS

WRONG = [
    ("window", (3, 3)),
    ("window", (4, 2)),
    ("window", (-1, 2)),
    ("window", (1, 2, 3)),
    ("window", 4),
    ("window", "15:19"),
    ("window", (0.2, 1.5)),
    ("window", (0, 0.5)),
    ("loops", 0),
    ("loops", -1),
    ("loops", 2.0),
    ("loops", True),
    ("integrator", "rk5"),
    ("beta", 2.1),
    ("beta", -1.1),
    ("window", ((1, 3), (2, 4))),
    ("window", ((3, 4), (1, 2))),
    ("window", ((1, 2), (0.5, 0.6))),
    ("window", ((1, 2), 3)),
    ("window", ((1, 2, 3),)),
    ("window", ()),
    ("prompt", "short"),
    ("prompt", None),
    ("gate", "entropy"),
    ("gate", "entropy:0"),
    ("gate", "surprise:1.0"),
    ("gate", 1.0),
    ("horizon", 0),
    ("horizon", 17),
    ("horizon", "long"),
    ("beta", float("nan")),
    ("beta", "half"),
    ("scope", "window"),
    ("routing", "fixed"),
    ("norm", "none"),
    ("cache", "middle"),
    ("decode", "never"),
    ("decode", -1),
    ("decode", 1.5),
    ("alpha", 0),
    ("alpha", 2.5),
    ("alpha", (0.5, 0)),
    ("momentum", 1),
    ("memory", 0),
    ("damping", 0),
    ("weights", (0.5, 0.6)),
    ("weights", ()),
    ("weights", "ab"),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_one_line_with_field_value_and_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=f"^{field}=") as caught:
        LoopConfig(**{field: value})
    message = str(caught.value)
    assert repr(value) in message
    assert f"{field} must be" in message
    assert "\n" not in message


HUGE = 10**400  # A whole number that is no float.


@pytest.mark.parametrize("field", ["beta", "horizon", "alpha", "momentum", "damping"])
def test_a_number_that_is_no_float_is_refused(field):
    with pytest.raises(UserError, match=f"^{field}=1000.*{field} must be"):
        LoopConfig(**{field: HUGE})


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": (HUGE,)},
        {"weights": (0, HUGE)},
        {"weights": (10**308, 10**308)},
        {"guard": {"growth": HUGE}},
        {"guard": {"band": (0, HUGE)}},
    ],
)
def test_numbers_that_are_no_floats_are_refused(values):
    with pytest.raises(UserError, match="must be"):
        LoopConfig(**values)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("loops", {"integrator": "aitken", "loops": 3}),
        ("norm", {"integrator": "norm_stab", "norm": "interpolated"}),
        ("alpha", {"integrator": "ema", "loops": 3, "alpha": (0.5, 0.5)}),
        ("alpha", {"integrator": "heavy_ball", "alpha": (0.5, 0.5)}),
        ("weights", {"loops": 2, "weights": (0.5, 0.5)}),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(field, settings):
    with pytest.raises(ValueError, match=f"^{field}="):
        LoopConfig(**settings)


def test_it_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoopConfig().loops = 3


@pytest.mark.parametrize(
    "config",
    [
        LoopConfig(),
        LoopConfig(window=(15, 19), loops=3, integrator="anchored", beta=0.5, decode=64),
        LoopConfig(window=(0.4, 0.55), integrator="ema", loops=2, alpha=(0.5, 0.25)),
        LoopConfig(window=(0.0, 1.0), integrator="poly_blend", loops=2, weights=(0.5, 0.2, 0.3)),
        LoopConfig(scope="layer", routing="frozen", norm="interpolated", cache="own"),
    ],
)
def test_json_round_trip(config):
    assert LoopConfig.from_json(config.to_json()) == config


def test_an_unknown_key_and_bad_json_are_refused():
    with pytest.raises(ValueError, match=r"unknown loop setting 'loop'.*loops"):
        LoopConfig.from_dict({"loop": 3})
    with pytest.raises(ValueError, match="not valid JSON"):
        LoopConfig.from_json("{")
    with pytest.raises(ValueError, match="JSON object"):
        LoopConfig.from_json("[1]")


def test_lists_are_as_good_as_tuples_and_hashable_afterwards():
    assert hash(LoopConfig(window=[1, 2])) == hash(LoopConfig(window=(1, 2)))


def test_every_special_field_belongs_to_an_integrator_and_none_is_forgotten():
    assert all(INTEGRATOR_FIELDS.values())
    assert {name for i in INTEGRATORS.values() for name in i.reads} == {
        "horizon",
        *INTEGRATOR_FIELDS,
    }


def test_a_horizon_is_refused_where_the_integrator_has_none():
    with pytest.raises(ValueError, match="horizon must be set to 1 with integrator 'naive'"):
        LoopConfig(integrator="naive", horizon=2)
    assert LoopConfig().to_dict() == {}
    assert LoopConfig(horizon=2.0).to_dict() == {"horizon": 2.0}


def test_one_window_in_a_list_is_that_window():
    assert LoopConfig(window=[[4, 8]]) == LoopConfig(window=(4, 8))
    several = LoopConfig(window=[[4, 8], [8, 9]])
    assert several.windows == (range(4, 8), range(8, 9))
    assert several.layers == [4, 5, 6, 7, 8]
    assert str(several).startswith("?, ? loops of [4,8)+[8,9)")
    assert LoopConfig.from_json(several.to_json()) == several


def test_it_prints_as_one_readable_line():
    text = str(LoopConfig(window=(15, 19), loops=3, integrator="anchored", beta=0.5))
    assert text == "anchored, 3 loops of [15,19), beta 0.5"


@pytest.mark.parametrize("digits", [61, 400, 6000])
def test_a_number_of_many_digits_is_one_short_line(digits):
    for make in (
        lambda: LoopConfig(loops=10**digits),
        lambda: LoopConfig.from_json(f'{{"loops": {"9" * digits}}}'),
    ):
        with pytest.raises(UserError) as found:
            make()
        assert len(str(found.value)) < 300
