"""Quantised in memory, from disk to disk or by mlx-lm: the same numbers, in little memory."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import tokens
from mlx_lm.utils import compute_bits_per_weight
from mlx_lm.utils import load_model as mlx_lm_load_model

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.checkpoints.loading import DEMOS, open_checkpoint
from mlx_loop.checkpoints.memory import bits_per_weight, weights_bytes
from mlx_loop.checkpoints.quantise import (
    MODES,
    WIDTHS,
    Quantization,
    choose,
    parameters,
    quantised_bytes,
)
from mlx_loop.screens.cli import main

GOLDEN = Path(__file__).parent / "data" / "golden" / "models"
MATRIX = mx.array(np.random.default_rng(0).normal(size=(3, 32, 128)), mx.bfloat16)


def convert(source, folder, *options, status=0):
    assert main(["quantize", "--model", str(source), "--mlx-path", str(folder), *options]) == status
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "checkpoint"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bytes_are_those_that_mlx_allocates(mode, group_size):
    for bits in WIDTHS:
        try:
            params = Quantization(bits, group_size, mode).params
        except UserError:
            continue
        arrays = mx.quantize(MATRIX, **params)
        mx.eval(arrays)
        assert quantised_bytes(MATRIX.shape, 2, params) == sum(a.nbytes for a in arrays)


@pytest.mark.parametrize("name", DEMOS)
def test_streamed_and_loaded_are_the_same_model_and_mlx_lms(tmp_path, name):
    folder = convert(DEMOS[name], tmp_path / "q", "--q-bits", "4", "--q-recipe", "window8")
    streamed = mlx_loop.load_model(folder)
    quantization = Quantization(4, recipe="window8")
    loaded = mlx_loop.load_model(name, quantize=quantization)
    assert streamed.loop == loaded.loop
    assert streamed.checkpoint.config["quantization"] == loaded.checkpoint.config["quantization"]
    found, expected = parameters(streamed), parameters(loaded)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[n], expected[n]) for n in expected)
    text = tokens(1, 6)
    assert mx.array_equal(streamed(text), loaded(text))
    plain, _ = mlx_lm_load_model(folder)
    if streamed.anatomy.mixes_experts:
        plain.set_dtype(mx.float32)
    assert mx.array_equal(plain(text), streamed.with_loop(None)(text))


def test_weights_are_those_of_mlx_lm_convert(tmp_path):
    convert(DEMOS["demo-moe"], tmp_path / "ours", "--q-bits", "3")
    mlx_lm.convert(str(DEMOS["demo-moe"]), str(tmp_path / "theirs"), quantize=True, q_bits=3)
    found, expected = (
        mx.load(str(tmp_path / who / "model.safetensors")) for who in ("ours", "theirs")
    )
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / w / index).read_text()) for w in ("ours", "theirs"))
    assert ours == theirs


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_a_mode_loads_and_saves_exactly(checkpoint, tmp_path, mode):
    model = mlx_loop.load_model(checkpoint, quantize=Quantization(mode=mode))
    mlx_loop.save(tmp_path / "saved", model)
    again = mlx_loop.load_model(tmp_path / "saved")
    assert mx.array_equal(again(tokens(1, 5)), model(tokens(1, 5)))
    assert model.model.layers[0].mlp.up_proj.mode == mode


def test_the_window_has_eight_bits_and_the_rest_what_was_asked():
    model = open_checkpoint(DEMOS["demo"], LoopConfig(window=(3, 6)))
    chosen = choose(model, Quantization(2, recipe="window8"))
    for path, params in chosen.items():
        in_window = any(f"layers.{i}." in path for i in (3, 4, 5))
        assert params["bits"] == (8 if in_window else 2)
    with pytest.raises(UserError, match="needs a loop"):
        choose(model.with_loop(None), Quantization(2, recipe="window8"))


def test_bits_per_weight_are_counted_as_mlx_lm_does():
    model = open_checkpoint(DEMOS["demo-mla"])
    chosen = choose(model, Quantization(5, 32))
    found = bits_per_weight(model, chosen)
    loaded = mlx_loop.load_model("demo-mla", quantize=Quantization(5, 32), dtype="bfloat16")
    assert found == pytest.approx(compute_bits_per_weight(loaded))


def test_rows_of_no_whole_groups_stay_as_they_are(checkpoint):
    mlp = mlx_loop.load_model(checkpoint, quantize=Quantization(4, 128)).model.layers[0].mlp
    assert isinstance(mlp.down_proj, nn.QuantizedLinear)  # Rows of 128.
    assert isinstance(mlp.up_proj, nn.Linear)  # Rows of 64.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, "2, 3, 4, 5, 6, 8"),
        ({"group_size": 48}, "32, 64, 128"),
        ({"mode": "int4"}, "mxfp4"),
        ({"mode": "mxfp4", "bits": 8}, "use 4"),
        ({"recipe": "best"}, "window8"),
        ({"recipe": "budget"}, "need each other"),
        ({"bits_per_weight": 4.5}, "need each other"),
        ({"recipe": "budget", "bits_per_weight": 4.5, "mode": "nvfp4"}, "affine"),
    ],
)
def test_what_mlx_does_not_have_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        Quantization(**options)


def test_what_is_quantised_cannot_be_quantised_again(tmp_path):
    folder = convert(DEMOS["demo"], tmp_path / "q")
    with pytest.raises(UserError, match="quantised already"):
        mlx_loop.load_model(folder, quantize=4)


def synthetic(folder, layers=24, hidden=256):
    """A dense checkpoint in its published layout whose largest matrix is a small part of it."""
    config = json.loads((DEMOS["demo"] / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    config |= {"vocab_size": 256, "layer_types": ["full_attention"] * layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    cls, args_class = mlx_loop.models.get_classes(config)
    model = cls(args_class.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), parameters(model))
    return folder


def test_memory_stays_near_the_quantised_size(tmp_path):
    source = synthetic(tmp_path / "source")
    model = open_checkpoint(source)
    full, quantised = weights_bytes(model), weights_bytes(model, choose(model, Quantization(4)))
    del model
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = mlx_loop.load_model(source, quantize=4)
    loading = mx.get_peak_memory() - before
    # 15 % is what was promised; the largest matrix is 4 % of the quantised size.
    assert quantised <= loading < 1.15 * quantised
    assert mx.get_active_memory() - before == pytest.approx(quantised, rel=0.01)
    del model
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    convert(source, tmp_path / "q")
    assert mx.get_peak_memory() - before < 0.5 * full


def test_shards_are_written_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_loop.checkpoints.saving.SHARD_BYTES", 300_000)
    source = synthetic(tmp_path / "source", layers=4, hidden=128)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    folder = convert(source, tmp_path / "q", "--q-bits", "8")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    # A shard, and two matrices before and after.
    assert mx.get_peak_memory() - before < 300_000 + 4 * 4 * 128 * 128 * 2
    plain, _ = mlx_lm_load_model(folder)
    expected = mlx_loop.load_model(source, quantize=8, loop=None)
    assert mx.array_equal(plain(tokens(1, 3)), expected(tokens(1, 3)))


def test_dry_run_writes_nothing(tmp_path, capsys):
    convert(DEMOS["demo"], tmp_path / "q", "--dry-run", "--q-recipe", "window8", "--q-bits", "2")
    said = " ".join(capsys.readouterr().out.split())
    assert "28 matrices in 8 bits" in said
    assert "nothing is written" in said
    assert not list(tmp_path.iterdir())


def test_an_old_folder_is_replaced_only_by_force(tmp_path, capsys):
    convert(DEMOS["demo"], tmp_path / "q")
    convert(DEMOS["demo"], tmp_path / "q", status=2)
    assert "--force" in capsys.readouterr().err
    convert(DEMOS["demo"], tmp_path / "q", "--force", "--q-bits", "8")
    assert mlx_loop.load_model(tmp_path / "q").checkpoint.config["quantization"]["bits"] == 8


def program(source, folder, *options):
    return [
        *(sys.executable, "-m", "mlx_loop.screens.cli", "quantize", "--q-mode", "mxfp4"),
        *("--model", str(source), "--mlx-path", str(folder), *options),
    ]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_while_writing_it_leaves_no_model(tmp_path, signum):
    source = synthetic(tmp_path / "source", layers=12)
    run = subprocess.Popen(program(source, tmp_path / "q"), stderr=subprocess.PIPE, text=True)
    while not (scratch := list(tmp_path.glob(".q.part/new/README.md"))) and run.poll() is None:
        time.sleep(0.01)
    assert scratch, run.stderr.read()
    run.send_signal(signum)
    _, said = run.communicate(timeout=60)
    assert "Traceback" not in said
    assert not (tmp_path / "q").exists()
    if signum == signal.SIGKILL:
        # Nothing can clean up then, but without config.json nothing takes it for a model.
        with pytest.raises(UserError, match=r"config\.json"):
            mlx_loop.load_model(scratch[0].parent)
    else:
        assert run.returncode == 128 + signum
        assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    def little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    done = subprocess.run(
        program(DEMOS["demo"], tmp_path / "q"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=little_room,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
    assert not list(tmp_path.iterdir())


def test_nan_weights_are_named(checkpoint):
    file = checkpoint / "model.safetensors"
    weights = dict(mx.load(str(file)))
    name = "model.layers.3.mlp.up_proj.weight"
    weights[name] = mx.where(mx.arange(weights[name].shape[1]) == 5, math.nan, weights[name])
    mx.save_safetensors(str(file), weights)
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.up_proj holds NaN"):
        mlx_loop.load_model(checkpoint, quantize=Quantization(4, 32))


def test_budget_spends_what_was_asked(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("What is 12 + 30?")
    options = ["--bits-per-weight", "4.2", "--calibration", str(text)]
    folder = convert(DEMOS["demo"], tmp_path / "q", *options)
    said = capsys.readouterr().out
    model, _ = mlx_lm_load_model(folder)
    found = compute_bits_per_weight(model)
    assert found == pytest.approx(4.2, abs=0.05)
    assert f"{found:.3f} bits per weight" in " ".join(said.split())
    widths = {m.bits for _, m in model.named_modules() if hasattr(m, "bits")}
    assert len(widths) > 1
    convert(DEMOS["demo"], tmp_path / "no", "--bits-per-weight", "9", "--dry-run", status=2)
    assert "8.51 with 8" in capsys.readouterr().err.replace("\n", " ")
