"""Checkpoints load as they are published, and what is wrong with one is one clear line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import tokens
from huggingface_hub import constants
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_lm_load_model

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.models import supported
from mlx_loop.screens.cli import main

GOLDEN = Path(__file__).parent / "data" / "golden" / "models"


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "checkpoint"))


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_the_preset_of_the_size_is_the_default(folder):
    assert mlx_loop.load_model(folder).loop == mlx_loop.load_model(folder, loop=LoopConfig()).loop


def test_weights_are_those_of_mlx_lm(folder):
    found = dict(tree_flatten(mlx_loop.load_model(folder).parameters()))
    expected = dict(tree_flatten(mlx_lm_load_model(folder)[0].parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_settings_in_config_json_are_used_and_may_be_overridden(folder):
    change_config(folder, loop={"loops": 6, "window": [2, 5]})
    assert mlx_loop.load_model(folder).loop.loops == 6
    assert mlx_loop.load_model(folder).loop.window == (2, 5)
    assert mlx_loop.load_model(folder, loop=None).loop is None
    assert mlx_loop.load_model(folder, loop=LoopConfig(loops=2)).loop.window == (3, 7)


def test_a_quantised_checkpoint_loads_as_mlx_lm_makes_it(tmp_path):
    mlx_lm.convert(
        str(DEMOS["demo"]), str(tmp_path / "q"), quantize=True, q_bits=8, q_group_size=32
    )
    model = mlx_loop.load_model(tmp_path / "q", loop=LoopConfig(loops=1))
    plain, _ = mlx_lm_load_model(tmp_path / "q")
    text = tokens(1, 8)
    assert mx.array_equal(model(text), plain(text))
    model.loop = LoopConfig(loops=3)
    assert not mx.array_equal(model(text), plain(text))


@pytest.mark.parametrize("model_type", ["mistral", "llama"])
def test_mistral_is_a_llama(tmp_path, model_type):
    folder = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "checkpoint"))
    change_config(folder, model_type=model_type)
    model = mlx_loop.load_model(folder)
    assert model.checkpoint.config["model_type"] == model_type
    assert model(tokens(1, 4)).shape == (1, 4, 320)


def test_dtype(folder):
    for dtype in ("float32", "float16", "bfloat16"):
        model = mlx_loop.load_model(folder, dtype=dtype)
        assert {p.dtype for _, p in tree_flatten(model.parameters())} == {getattr(mx, dtype)}
    with pytest.raises(UserError, match="dtype='int8'"):
        mlx_loop.load_model(folder, dtype="int8")


def line_of(load):
    """The message of the error that `load` raises, which must be a single line."""
    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_says_what_may_be_given():
    message = line_of(lambda: mlx_loop.load("./nowhere"))
    assert "no folder ./nowhere" in message
    assert "demo" in message


def test_an_unknown_repository_says_where_it_was_looked_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "Hugging Face hub" in line_of(lambda: mlx_loop.load("nobody/no-such-model"))


def test_a_file_is_not_a_folder(folder):
    assert "is a file" in line_of(lambda: mlx_loop.load(folder / "config.json"))


def test_a_model_type_that_mlx_lm_does_not_have_names_those_near_it(folder):
    change_config(folder, model_type="qwen33")
    message = line_of(lambda: mlx_loop.load(folder))
    assert "'qwen33'" in message
    assert "near it are qwen3" in message
    assert {"llama", "mistral", "kimi_k2", "gemma3_text"} < set(supported())


def test_a_model_that_brings_its_own_code_is_refused(folder):
    change_config(folder, model_file="model.py")
    (folder / "model.py").write_text("raise SystemExit('this must not run')")
    assert "model.py" in line_of(lambda: mlx_loop.load_model(folder))


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    for size in (100, 50_000):
        weights.write_bytes((GOLDEN / "qwen3" / "model.safetensors").read_bytes()[:size])
        assert "incomplete" in line_of(lambda: mlx_loop.load_model(folder))


def test_missing_weights_and_missing_shards(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002" in line_of(lambda: mlx_loop.load_model(folder))
    (folder / "model.safetensors").unlink()
    assert "weights are missing" in line_of(lambda: mlx_loop.load_model(folder))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "qwen3"}'])
def test_a_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    assert str(folder) in line_of(lambda: mlx_loop.load_model(folder))


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in line_of(lambda: mlx_loop.load_model(folder))


def test_weights_that_do_not_fit_the_config(folder):
    change_config(folder, num_hidden_layers=11)
    assert str(folder) in line_of(lambda: mlx_loop.load_model(folder))


def test_saved_settings_that_are_wrong(folder):
    for loop in ({"loops": 0}, {"loop": 3}, {"window": [5, 40]}, 3):
        change_config(folder, loop=loop)
        line_of(lambda: mlx_loop.load_model(folder))


def test_a_checkpoint_without_a_tokenizer(folder):
    assert "tokenizer" in line_of(lambda: mlx_loop.load(folder))
    assert mlx_loop.load_model(folder) is not None


def test_importing_the_package_is_quick_and_quiet():
    heavy = "{'mlx_lm', 'mlx.core', 'transformers'}"
    code = f"import mlx_loop, sys; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_unknown_attributes_are_errors():
    with pytest.raises(AttributeError, match="nothing"):
        mlx_loop.nothing  # noqa: B018


def test_adapters(folder, tmp_path):
    rng = np.random.default_rng(0)
    settings = {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    arrays = {
        f"model.layers.{i}.self_attn.q_proj.lora_{ab}": mx.array(rng.normal(size=shape))
        for i in range(10)
        for ab, shape in (("a", (64, 2)), ("b", (2, 64)))
    }
    mx.save_safetensors(str(adapters / "adapters.safetensors"), arrays)
    (adapters / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 10, "lora_parameters": settings})
    )
    text = tokens(1, 6)
    adapted = mlx_loop.load_model(folder, adapter_path=str(adapters))
    assert not mx.allclose(adapted(text), mlx_loop.load_model(folder)(text))
    assert "no-adapters" in line_of(
        lambda: mlx_loop.load_model(folder, adapter_path=str(tmp_path / "no-adapters"))
    )


@pytest.mark.parametrize("command", [["plan"], ["generate", "-p", "hi", "--model"]])
@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_answer_comes_at_once(
    command, offline, monkeypatch, capsys, tmp_path
):
    """Nothing is tried again and again, and the line says what is the matter."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # Nobody listens there.
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to try again"))
    assert main([*command, "nobody/no-such-model"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("HF_HUB_OFFLINE" if offline else "check the network") in said
