"""Speed beside the un-looped model, as mlx_lm.benchmark measures it."""

from __future__ import annotations

import pytest

import mlx_loop
from mlx_loop.measure.bench import bench
from mlx_loop.measure.comparison import distinct
from mlx_loop.screens.cli import main


@pytest.mark.parametrize("batch", [1, 2])
def test_every_view_runs_once_a_trial_and_generates_all_that_was_asked(batch, monkeypatch):
    model, tokenizer = mlx_loop.load("demo")
    views = distinct(model, [2])
    calls: list[tuple[int | None, int]] = []
    call = type(model).__call__

    def watched(self, inputs, *args, **kwargs):
        calls.append((self.loop and self.loop.loops, inputs.size))
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", watched)
    trials = list(bench(views, tokenizer, 5, 3, batch, 2, 2048))
    assert [len(speeds) for speeds in trials] == [2, 2]
    assert all(value > 0 for speeds in trials for speed in speeds for value in vars(speed).values())
    # A run to warm up and two trials, each of the prompt and all tokens but the last: mlx-lm is
    # one token ahead where it generates alone.
    for loops in (None, 2):
        fed = sum(size for of, size in calls if of == loops) / batch / 3
        assert fed in (5 + 2, 5 + 3)


def test_the_table_has_each_setting_and_its_ratio(capsys):
    assert main(["bench", "--loops", "2,3", "-p", "4", "-g", "2", "-n", "2"]) == 0
    done = capsys.readouterr()
    header, plain, two, three, conditions = done.out.splitlines()
    assert header.split()[:2] == ["setting", "cost"]
    assert "[" not in plain
    assert two.startswith("anchored, K = 2  +33% layer passes")
    assert two.count("[") == three.count("[") == 2
    assert "4 prompt tokens, 2 generated, batch 1, 2 trials" in conditions
    assert done.err.count("Trial 2, ") == 3


def test_nothing_to_compare_is_an_error(capsys):
    assert main(["bench", "--loops", "1"]) == 2
    assert "2 or more" in capsys.readouterr().err
