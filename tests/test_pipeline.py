"""Where a model is cut into stages, and what a stage makes of the loop settings.

Logits of a pipeline are those of test_several.
"""

import pytest
from conftest import make

from mlx_loop import LoopConfig, UserError
from mlx_loop.models.pipeline import into_stages
from mlx_loop.settings import Guard


class Group:
    """One of several machines."""

    def __init__(self, size, rank=0):
        self.size, self.rank = (lambda: size), (lambda: rank)


def staged(size, rank=0, **fields):
    model = make("qwen2")
    model.loop = LoopConfig(**fields)
    into_stages(model, Group(size, rank))
    return model


def test_the_first_machine_has_the_last_of_about_equal_stages():
    for rank, stage in ((0, range(6, 8)), (1, range(4, 6)), (2, range(2, 4)), (3, range(2))):
        model = staged(4, rank, window=(2, 4))
        assert model.stages.here == stage
        assert len(model.layers) == len(model.anatomy.layers) == len(stage)
        assert model.depth == len(model.whole.layers) == 8


@pytest.mark.parametrize(
    ("size", "window", "stages"),
    [
        (2, (0, 3), [(0, 4), (4, 8)]),
        (2, (3, 6), [(0, 3), (3, 8)]),
        (2, (1, 5), [(0, 5), (5, 8)]),
        (3, (2, 7), [(0, 2), (2, 7), (7, 8)]),
        (3, ((1, 4), (4, 7)), [(0, 4), (4, 7), (7, 8)]),
    ],
)
def test_no_cut_lies_in_a_window_that_loops_as_one(size, window, stages):
    found = staged(size, window=window).stages.all
    assert [(stage.start, stage.stop) for stage in found] == stages


def test_layers_that_loop_one_by_one_may_be_on_several_machines():
    for rank, window in ((1, (1, 4)), (0, (0, 3))):
        model = staged(2, rank, window=(1, 7), scope="layer", cache="own", loops=3)
        assert model.here.window == window
        assert model.loop.window == (1, 7)
        assert [type(entry).__name__ for entry in model.new_cache()].count("CacheList") == 3


def test_a_stage_without_a_window_does_not_loop():
    here, other = staged(2, 0, window=(4, 6)), staged(2, 1, window=(4, 6))
    assert here.here.window == (0, 2)
    assert other.here is None
    assert not other.is_unlooped


def test_a_window_that_is_cut_later_is_refused_and_told_what_fits():
    model = staged(2, window=(4, 6))
    with pytest.raises(UserError, match=r"\[3,5\).* within \[0,4\) or \[4,8\)"):
        model.with_loop(LoopConfig(window=(3, 5)))
    assert model.with_loop(LoopConfig(window=(3, 5), scope="layer")).here.window == (0, 1)


@pytest.mark.parametrize("field", [{"gate": "entropy:1"}, {"guard": Guard()}])
def test_what_one_machine_alone_would_know_is_refused(field):
    with pytest.raises(UserError, match=f"{next(iter(field))} does not work over a pipeline"):
        staged(2, window=(4, 6), **field)


def test_more_machines_than_places_to_cut_at_are_refused():
    with pytest.raises(UserError, match="4 machines are too many"):
        staged(4, window=(1, 7))


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_types_without_a_pipeline_are_refused(name):
    with pytest.raises(UserError, match="do not run as a pipeline"):
        into_stages(make(name), Group(2))
