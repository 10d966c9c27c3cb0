"""A prompt-cache file knows the model and the loop settings it was made with."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from importlib import import_module

import mlx.core as mx
import pytest
from conftest import tokens

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.screens.cli import main


@pytest.fixture(scope="module")
def model():
    return mlx_loop.load_model("demo")


def filled(model, length=9):
    cache = mlx_loop.make_prompt_cache(model)
    model(tokens(1, length), cache=cache)
    return cache


@pytest.mark.parametrize(
    "loop",
    [None, LoopConfig(), LoopConfig(cache="own", loops=4), LoopConfig(cache="last", scope="layer")],
)
def test_a_cache_comes_back_as_it_was(model, tmp_path, loop):
    looped = model.with_loop(loop)
    cache = filled(looped)
    path = tmp_path / "cache.safetensors"
    mlx_loop.save_prompt_cache(path, cache, looped, {"note": "kept"})
    loaded, metadata = mlx_loop.load_prompt_cache(path, model.with_loop(loop))
    assert metadata == {"note": "kept"}
    more = tokens(1, 1, seed=1)
    assert mx.array_equal(looped(more, cache=loaded), looped(more, cache=cache))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (LoopConfig(loops=6), "loops 3, now 6"),
        (LoopConfig(beta=0.25), "beta 0.5, now 0.25"),
        (LoopConfig(window=(2, 6)), "window"),
        (LoopConfig(cache="last"), "cache first, now last"),
        (LoopConfig(integrator="euler"), "integrator anchored, now euler"),
        (None, "loops 3, now off"),
    ],
)
def test_other_loop_settings_are_refused_and_named(model, tmp_path, other, difference):
    path = tmp_path / "cache.safetensors"
    mlx_loop.save_prompt_cache(path, filled(model), model)
    with pytest.raises(UserError, match=difference):
        mlx_loop.load_prompt_cache(path, model.with_loop(other))


def test_another_model_is_refused(model, tmp_path):
    path = tmp_path / "cache.safetensors"
    mlx_loop.save_prompt_cache(path, filled(model), model)
    other = mlx_loop.load_model("demo")
    checkpoint = other.checkpoint
    other.checkpoint = replace(checkpoint, config={**checkpoint.config, "hidden_size": 64})
    with pytest.raises(UserError, match="another model"):
        mlx_loop.load_prompt_cache(path, other)


def test_a_missing_and_a_broken_file_and_another_kind_of_file(model, tmp_path):
    with pytest.raises(UserError, match="no prompt cache"):
        mlx_loop.load_prompt_cache(tmp_path / "none.safetensors", model)
    path = tmp_path / "cache.safetensors"
    mlx_loop.save_prompt_cache(path, filled(model), model)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole"):
        mlx_loop.load_prompt_cache(path, model)
    mx.save_safetensors(str(path), {"a": mx.zeros(3)})
    with pytest.raises(UserError, match="not a whole"):
        mlx_loop.load_prompt_cache(path, model)


def test_an_empty_cache_is_not_saved(model, tmp_path):
    with pytest.raises(UserError, match="empty"):
        mlx_loop.save_prompt_cache(
            tmp_path / "c.safetensors", mlx_loop.make_prompt_cache(model), model
        )


def test_saving_again_replaces_the_file_in_one_step(model, tmp_path):
    path = tmp_path / "cache.safetensors"
    mlx_loop.save_prompt_cache(path, filled(model), model)
    mlx_loop.save_prompt_cache(path, filled(model, 20), model)
    cache, _ = mlx_loop.load_prompt_cache(path, model)
    assert cache[0].offset == 20
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_beginning_of_a_plain_prompt_fits_every_setting_that_leaves_it_plain(model, tmp_path):
    path = tmp_path / "cache.safetensors"
    view = model.with_loop(LoopConfig(loops=4, prompt="plain"))
    cache = mlx_loop.make_prompt_cache(view)
    view.for_prompt(cache, 10)(tokens(1, 9), cache=cache)
    mlx_loop.save_prompt_cache(path, cache, view, holds_no_answer=True)
    for loop in (LoopConfig(loops=6, window=(2, 4), prompt="plain"), LoopConfig(loops=1), None):
        other = model.with_loop(loop)
        loaded, _ = mlx_loop.load_prompt_cache(path, other)
        alone, text = mlx_loop.make_prompt_cache(other), tokens(1, 9)
        other.for_prompt(alone, 10)(text, cache=alone)
        more = tokens(1, 1, seed=1)
        assert mx.array_equal(
            other.for_prompt(loaded, 1)(more, cache=loaded),
            other.for_prompt(alone, 1)(more, cache=alone),
        )
    for loop in (LoopConfig(loops=4), LoopConfig(loops=4, prompt="plain", cache="last")):
        with pytest.raises(UserError, match="--loop-prompt plain"):
            mlx_loop.load_prompt_cache(path, model.with_loop(loop))


def test_too_little_disk_is_noticed_before_the_prompt_is_processed(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    generation = import_module("mlx_lm.generate")
    monkeypatch.setattr(generation, "generate_step", lambda *_, **__: pytest.fail("too late"))
    file = tmp_path / "new" / "cache.safetensors"
    words = ["cache_prompt", "--prompt", "What is 12 + 30?", "--prompt-cache-file", str(file)]
    assert main(words) == 2
    assert "GB are free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
