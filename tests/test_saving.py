"""A saved model is the same model: looped here, and un-looped in plain mlx-lm."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import mlx.core as mx
import mlx_lm
import pytest
from conftest import make, tokens
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.checkpoints.loading import DEMOS


@pytest.fixture(scope="module")
def demo():
    return mlx_loop.load("demo")


@pytest.mark.parametrize(
    "loop",
    [LoopConfig(loops=6, window=(3, 7), cache="own"), LoopConfig(integrator="rk4", loops=2), None],
)
def test_round_trip_is_exact(demo, tmp_path, loop):
    model, tokenizer = demo
    model = model.with_loop(loop)
    mlx_loop.save(tmp_path / "saved", model, tokenizer)
    loaded, again = mlx_loop.load(tmp_path / "saved")
    text = tokens(1, 12)
    assert loaded.loop == model.loop
    assert mx.array_equal(loaded(text), model(text))
    assert again.encode("What is 12 + 30?") == tokenizer.encode("What is 12 + 30?")


def test_plain_mlx_lm_loads_it_unlooped(demo, tmp_path):
    model, tokenizer = demo
    mlx_loop.save(tmp_path / "saved", model.with_loop(LoopConfig(loops=6)), tokenizer)
    plain, _ = mlx_lm.load(str(tmp_path / "saved"))
    text = tokens(1, 12)
    assert type(plain).__module__ == "mlx_lm.models.qwen3"
    assert mx.array_equal(plain(text), model.with_loop(None)(text))


def test_config_json_keeps_its_model_type_and_gains_a_loop_section(demo, tmp_path):
    model, tokenizer = demo
    mlx_loop.save(tmp_path / "saved", model.with_loop(LoopConfig(loops=6)), tokenizer)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    original = json.loads((DEMOS["demo"] / "config.json").read_text())
    assert config["model_type"] == original["model_type"]
    assert config["loop"]["loops"] == 6
    assert "model_file" not in config
    assert (tmp_path / "saved" / "generation_config.json").exists()


def test_an_existing_folder_is_kept_unless_overwriting_is_allowed(demo, tmp_path):
    model, tokenizer = demo
    (tmp_path / "saved").mkdir()
    with pytest.raises(UserError, match="exists already"):
        mlx_loop.save(tmp_path / "saved", model, tokenizer)
    mlx_loop.save(tmp_path / "saved", model, tokenizer, overwrite=True)
    assert mlx_loop.load(tmp_path / "saved")


def test_too_little_disk_is_noticed_before_anything_is_written(demo, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(UserError, match="GB are free"):
        mlx_loop.save(tmp_path / "saved", *demo)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_nothing_behind(demo, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[save_safetensors] Failed to write")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(UserError, match="cannot write"):
        mlx_loop.save(tmp_path / "saved", *demo)
    assert not list(tmp_path.iterdir())


def test_adapters_must_be_fused_first(tmp_path):
    model, tokenizer = mlx_loop.load("demo")
    settings = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    linear_to_lora_layers(model, 2, settings)
    with pytest.raises(UserError, match="fuse"):
        mlx_loop.save(tmp_path / "saved", model, tokenizer)


def test_a_model_that_was_not_loaded_cannot_be_saved(tmp_path):
    with pytest.raises(UserError, match="loaded"):
        mlx_loop.save(tmp_path / "saved", make("qwen3"))
