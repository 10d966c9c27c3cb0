"""What is wrong with a checkpoint is one line that names the file or the tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

import mlx_loop
from mlx_loop import UserError
from mlx_loop.checkpoints.loading import DEMOS

GOLDEN = Path(__file__).parent / "data" / "golden" / "models"
QUANTISED = {"bits": 4, "group_size": 64}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "q"
    mlx_lm.convert(str(DEMOS["demo"]), str(path), quantize=True, q_bits=4)
    return path


@pytest.fixture
def packed(quantised, tmp_path):
    """A quantised checkpoint that a test may damage."""
    return Path(shutil.copytree(quantised, tmp_path / "packed"))


def line(folder, **arguments):
    with pytest.raises(UserError) as caught:
        mlx_loop.load_model(folder, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder, name, array):
    """Replace a tensor, or leave it out."""
    file = folder / "model.safetensors"
    weights = dict(mx.load(str(file)))
    del weights[name]
    mx.save_safetensors(str(file), weights if array is None else {**weights, name: array})


def configure(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize("quantize", [None, 4])
def test_a_missing_tensor_is_named(folder, quantize):
    change(folder, NAME, None)
    assert NAME in line(folder, quantize=quantize)


@pytest.mark.parametrize("quantize", [None, 4])
def test_a_wrong_shape_is_named(folder, quantize):
    change(folder, NAME, mx.zeros((64, 64)))
    message = line(folder, quantize=quantize)
    assert NAME in message
    assert "(64, 64)" in message


def test_a_truncated_shard_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is incomplete" in line(folder, quantize=4)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3]
)
def test_an_index_may_not_leave_the_folder(folder, name):
    index = {"weight_map": {NAME: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert repr(name) in line(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index" in line(folder)


def test_an_index_that_names_a_tensor_that_is_not_there(folder):
    index = {"weight_map": {"model.extra.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model.extra.weight" in line(folder)


@pytest.mark.parametrize(
    "section",
    [
        4,
        {},
        {"bits": 4},
        {"bits": "4", "group_size": 64},
        {**QUANTISED, "mode": "int4"},
        {**QUANTISED, "mode": []},
        {**QUANTISED, "lm_head": {"bits": "4"}},
    ],
)
def test_a_quantisation_that_says_too_little(packed, section):
    configure(packed, quantization=section, quantization_config=None)
    assert "must have bits, group_size" in line(packed)


@pytest.mark.parametrize(
    "asked", [{"quant_predicate": "mixed_4_6"}, {"q_mode": "nvfp4"}, {"q_mode": "mxfp8"}]
)
def test_what_mlx_lm_quantises_loads(asked, tmp_path):
    # Of mixed widths it writes no group size, which stands for the mode's own.
    mlx_lm.convert(str(DEMOS["demo"]), str(tmp_path / "q"), quantize=True, **asked)
    expected, text = mlx_lm.load(str(tmp_path / "q"))[0], mx.array([[5, 6, 7]])
    model = mlx_loop.load_model(tmp_path / "q")
    assert mx.array_equal(model.with_loop(None)(text), expected(text))


def test_two_sections_that_differ(packed):
    configure(packed, quantization_config={"bits": 8, "group_size": 64})
    assert "differ" in line(packed)


def test_widths_that_the_weights_do_not_have(packed):
    wrong = {"bits": 8, "group_size": 64}
    configure(packed, quantization=wrong, quantization_config=wrong)
    assert "says 8 bits in groups of 64" in line(packed)
    entry = {**QUANTISED, "model.layers.3.mlp.up_proj": {"bits": 3, "group_size": 64}}
    configure(packed, quantization=entry, quantization_config=entry)
    assert "3 bits in groups of 64 for model.layers.3.mlp.up_proj" in line(packed)


def test_a_section_without_quantised_weights_and_the_other_way_round(folder, packed):
    configure(folder, quantization=QUANTISED)
    assert "none of them are" in line(folder)
    configure(packed, quantization=None, quantization_config=None)
    assert "no quantization section" in line(packed)


def test_a_default_that_no_listed_matrix_needs_is_no_contradiction(packed):
    config = json.loads((packed / "config.json").read_text())
    names = [n.removesuffix(".scales") for n in mx.load(str(packed / "model.safetensors"))]
    section = {"bits": 2, "group_size": 64} | dict.fromkeys(names, config["quantization"])
    configure(packed, quantization=section, quantization_config=section)
    assert mlx_loop.load_model(packed)
