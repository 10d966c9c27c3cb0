"""A file or folder is whole, or as it was before."""

from __future__ import annotations

import errno

import pytest

from mlx_loop import UserError
from mlx_loop.files import whole_file, whole_folder


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "a.json"
    with whole_file(path) as scratch:
        scratch.write_text("new")
        assert not path.exists()
        assert scratch.suffix == ".json"
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "model"
    with whole_folder(path) as scratch:
        (scratch / "config.json").write_text("{}")
        assert not path.exists()
    assert (path / "config.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
@pytest.mark.parametrize(
    "failure",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[save]")],
)
def test_a_failure_leaves_the_old_and_nothing_half_written(tmp_path, whole, failure):
    path = tmp_path / "kept"
    path.write_text("old") if whole is whole_file else path.mkdir()
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError
    with pytest.raises(expected), whole(path, overwrite=True) as scratch:  # noqa: PT012
        (scratch if whole is whole_file else scratch / "part").write_text("half")
        raise failure
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert path.is_dir() or path.read_text() == "old"


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_nothing_is_overwritten_unasked(tmp_path, whole):
    path = tmp_path / "there"
    path.write_text("old")
    with pytest.raises(UserError, match="exists already"), whole(path):
        raise AssertionError("the block must not run")
    assert path.read_text() == "old"


def test_an_old_folder_is_replaced_when_asked(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("")
    with whole_folder(path, overwrite=True) as scratch:
        (scratch / "new").write_text("")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_written_to_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), whole_file(tmp_path / "file" / "a"):
        pass
