"""The card of a saved folder, and how it reaches the hub."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import HfApi, ModelCard, ModelInfo, constants
from mlx_lm.utils import compute_bits_per_weight

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.checkpoints.card import base_model, write_card
from mlx_loop.checkpoints.loading import DEMOS, open_checkpoint
from mlx_loop.screens.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("card") / "tiny"
    options = ["--q-bits", "4", "--q-recipe", "window8", "--loops", "5"]
    assert main(["quantize", "--model", "demo", "--mlx-path", str(path), *options]) == 0
    return path


def test_a_card_says_what_how_and_how_to_run(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "mlx"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "mit"  # As the checkpoint it was made from.
    for words in ("# tiny", "window8, 4 bits", "5.779", "5 loops", "mlx_lm.chat --model tiny"):
        assert words in card.text
    assert mlx_loop.load(folder)[0].loop.loops == 5


def test_a_card_names_no_package_page_that_is_not_there(folder):
    text = (folder / "README.md").read_text()
    assert "pypi.org" not in text
    assert "pip install" not in text


def test_a_card_names_the_base_model_and_its_licence(tmp_path):
    """As the card of the folder does that the model was made from."""
    shutil.copytree(DEMOS["demo"], tmp_path / "made")
    data = "base_model: Qwen/Qwen3-4B\nlicense: other\nlicense_name: l\nlicense_link: https://l.l"
    (tmp_path / "made" / "README.md").write_text(f"---\n{data}\n---\n# A model\n")
    model = open_checkpoint(tmp_path / "made")
    write_card(tmp_path, model, "saved")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("Qwen/Qwen3-4B", "other")
    assert "| base model | [Qwen/Qwen3-4B](https://huggingface.co/Qwen/Qwen3-4B) |" in card.text
    assert "| licence | [l](https://l.l) |" in card.text


def test_the_licence_is_asked_of_the_hub_where_only_the_weights_were_downloaded(
    tmp_path, monkeypatch
):
    path = tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / "0"
    shutil.copytree(DEMOS["demo"], path, ignore=shutil.ignore_patterns("README.md"))
    model = open_checkpoint(path)
    info = ModelInfo(id="Qwen/Qwen3-4B", cardData={"license": "apache-2.0"})
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo, timeout: info)
    write_card(tmp_path, model, "saved")
    assert "| licence | apache-2.0 |" in (tmp_path / "README.md").read_text()

    def offline(self, repo, timeout):
        raise ConnectionError

    monkeypatch.setattr(HfApi, "model_info", offline)
    write_card(tmp_path, model, "saved")
    text = (tmp_path / "README.md").read_text()
    assert "| base model | [Qwen/Qwen3-4B]" in text
    assert "| licence | not known here" in text


def test_saving_writes_a_card_too(tmp_path):
    model, tokenizer = mlx_loop.load("demo", loop=LoopConfig(loops=4), quantize=8)
    mlx_loop.save(tmp_path / "saved", model, tokenizer)
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "4 loops" in text
    assert f"{compute_bits_per_weight(model):.3f}, scales" in text


def test_the_base_model_is_read_from_the_hubs_cache(tmp_path):
    path = tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / "0"
    shutil.copytree(DEMOS["demo"], path)
    assert base_model(open_checkpoint(path)) == "Qwen/Qwen3-4B"
    assert base_model(open_checkpoint(DEMOS["demo"])) is None


def test_upload_sends_the_folder_and_a_card_with_the_repositorys_name(folder, monkeypatch, capsys):
    calls = {}
    for name in ("create_repo", "upload_folder", "upload_file"):
        monkeypatch.setattr(HfApi, name, lambda self, name=name, **kw: calls.update({name: kw}))
    assert main(["upload", "--path", str(folder), "--upload-repo", "someone/tiny-looped"]) == 0
    assert "https://huggingface.co/someone/tiny-looped" in capsys.readouterr().out
    assert calls["upload_folder"]["folder_path"] == folder
    card = calls["upload_file"]["path_or_fileobj"].decode()
    assert "# someone/tiny-looped" in card
    assert "--model someone/tiny-looped" in card
    assert "--model tiny" not in card


def test_what_cannot_be_uploaded_is_one_line(tmp_path, capsys):
    shutil.copytree(DEMOS["demo"], tmp_path / "plain")
    assert main(["upload", "--path", str(tmp_path / "plain"), "--upload-repo", "a/b"]) == 2
    assert "no card of mlx_loop" in capsys.readouterr().err
    assert main(["upload", "--path", str(tmp_path / "none"), "--upload-repo", "a/b"]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_repository_name_that_the_hub_refuses(folder, capsys):
    assert main(["upload", "--path", str(folder), "--upload-repo", "a/b/c"]) == 2
    assert "a/b/c" in capsys.readouterr().err


def test_an_upload_without_a_network_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # Nobody listens there.
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert main(["upload", "--path", str(folder), "--upload-repo", "a/b"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "check the network" in said
