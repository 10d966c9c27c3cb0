"""`mlx_loop models`: what the cache holds, whether it loops, and deleting no more than was said."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from huggingface_hub import constants

from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.screens.cli import main

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with a model that loops, one that does not, and half of one.

    All have a revision of one name, as copies of a repository do.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("some--demo", "some--whisper", "some--half"):
        repo = tmp_path / "hub" / f"models--{name}"
        for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
            (repo / folder).mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(DEMOS["demo"] / file, repo / "blobs" / file)
            os.symlink(f"../../blobs/{file}", repo / "snapshots" / COMMIT / file)
    config = tmp_path / "hub" / "models--some--whisper" / "blobs" / "config.json"
    config.write_text(json.dumps({"model_type": "whisper"}))
    (tmp_path / "hub" / "models--some--half" / "snapshots" / COMMIT / "model.safetensors").unlink()
    return tmp_path / "hub"


def repos(cache):
    return sorted(path.name for path in cache.iterdir())


def test_the_list_says_what_loops_and_why_not(cache, capsys):
    assert main(["models"]) == 0
    header, demo, half, whisper = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "size", "loops"]
    assert demo.split()[0] == "some/demo"
    assert demo.split()[2:] == ["yes"]
    assert "no: " in half
    assert "weights are missing" in half
    assert "no: model type 'whisper'" in whisper


@pytest.mark.parametrize(("answer", "deleted"), [("y", True), ("n", False), ("", False)])
def test_rm_asks_and_deletes_that_model_and_nothing_else(
    cache, answer, deleted, monkeypatch, capsys
):
    before = repos(cache)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert main(["models", "rm", "some/demo"]) == 0
    gone = ["models--some--demo"] if deleted else []
    assert sorted([*repos(cache), *gone]) == before
    assert ("deleted" if deleted else "kept") in capsys.readouterr().out


def test_what_cannot_be_deleted_is_not_called_deleted(cache, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr("builtins.input", lambda question: "y")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert main(["models", "rm", "some/demo"]) == 2
    out, err = capsys.readouterr()
    assert "could not be deleted" in err
    assert "\ndeleted" not in out


def test_nobody_there_to_ask_keeps_the_model(cache, monkeypatch):
    def ended(question):
        raise EOFError

    before = repos(cache)
    monkeypatch.setattr("builtins.input", ended)
    assert main(["models", "rm", "some/demo"]) == 0
    assert repos(cache) == before


def test_a_misspelt_model_is_not_the_one_near_it(cache, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("it asks"))
    assert main(["models", "rm", "some/dmo"]) == 2
    assert "did you mean some/demo?" in capsys.readouterr().err


def test_a_cache_that_is_not_there_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert main(["models"]) == 0
    assert "no model in" in capsys.readouterr().out
    assert main(["models", "rm", "some/demo"]) == 2
    assert not (tmp_path / "none").exists()
