"""A file or folder is whole, or as it was before."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mlx_loop import UserError, files
from mlx_loop.files import alone, whole_file, whole_folder


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


# --- The moment of replacing ---


def old(path):
    path.mkdir()
    (path / "old").write_text("")


def whole(path):
    """What the folder is: all of the old one, all of the new one, or neither."""
    names = sorted(file.name for file in path.iterdir()) if path.exists() else None
    return {("old",): "old", ("a", "b"): "new"}.get(tuple(names or ()), names)


def replace(path):
    with whole_folder(path, overwrite=True) as scratch:
        (scratch / "a").write_text("new")
        (scratch / "b").write_text("new")


def test_what_came_meanwhile_is_kept(tmp_path):
    path = tmp_path / "kept"
    with pytest.raises(UserError, match="came into being"), whole_folder(path) as scratch:  # noqa: PT012
        (scratch / "new").write_text("")
        old(path)
    assert whole(path) == "old"
    with pytest.raises(UserError, match="came into being"), whole_file(tmp_path / "f") as scratch:  # noqa: PT012
        scratch.write_text("new")
        (tmp_path / "f").write_text("other")
    assert (tmp_path / "f").read_text() == "other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "kept"]


def test_of_two_runs_to_one_place_the_second_is_refused(tmp_path):
    for whole_one in (whole_folder, whole_file):
        path = tmp_path / whole_one.__name__
        with (
            suppress(UserError),  # The first one makes nothing.
            whole_one(path, overwrite=True) as scratch,
            pytest.raises(UserError, match="another run is writing"),
            whole_one(path, overwrite=True),
        ):
            raise AssertionError("the block must not run")
        assert not scratch.exists()


def test_a_file_that_grows_is_one_runs_alone(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    with alone(path):
        assert path.read_bytes() == b""
        with pytest.raises(UserError, match="another run is writing"), alone(path):
            raise AssertionError("the block must not run")
    with alone(path):  # The first run has ended.
        pass
    with pytest.raises(UserError, match="cannot write"), alone(tmp_path):
        raise AssertionError("the block must not run")


def test_what_keeps_nothing_is_no_file_to_write(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(UserError, match="give the name of a file"), whole_file(path, True):
            raise AssertionError("the block must not run")


def test_a_refused_old_folder_is_looked_at_again_before_it_goes(tmp_path):
    path = tmp_path / "model"
    old(path)

    def check(folder):
        if (folder / "precious").exists():
            raise UserError("precious")

    with pytest.raises(UserError, match="precious"), whole_folder(path, True, check) as scratch:  # noqa: PT012
        (scratch / "new").write_text("")
        (path / "precious").write_text("")
    assert (path / "precious").exists()


def test_what_a_killed_run_left_is_put_back_and_removed(tmp_path):
    path, part = tmp_path / "model", tmp_path / ".model.part"
    (part / "new").mkdir(parents=True)
    old(part / "old")
    (part / "litter.txt").write_text("")
    with pytest.raises(UserError, match="exists already"), whole_folder(path):
        raise AssertionError("the block must not run")
    assert whole(path) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    replace(path)
    assert whole(path) == "new"


def test_a_link_stays_and_what_it_stands_for_is_replaced(tmp_path):
    old(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert whole(tmp_path / "real") == "new"


@pytest.mark.parametrize("name", ["", ".", "a" * 300, "a" * 252, "file/x"])
@pytest.mark.parametrize("whole_one", [whole_folder, whole_file])
def test_a_name_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch, whole_one, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError), whole_one(Path(name)):
        raise AssertionError("the block must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


CALLS = ["rename", "replace", "link", "fsync", "open", "mkdir", "_swap"]


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_any_step_may_fail(tmp_path, monkeypatch, name, number, error, swaps):
    """The old or the new folder is there, whole; nothing else is."""
    path, count = tmp_path / "model", 0
    old(path)

    def fail(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number + 1:
            raise error
        return real(*args, **kwargs)

    if not swaps:
        monkeypatch.setattr(files, "_swap", lambda *_: _raise(OSError(errno.ENOSYS, "none")))
    where = files if name == "_swap" else os
    real = getattr(where, name)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        with suppress(UserError, KeyboardInterrupt):
            replace(path)
    assert whole(path) in ("old", "new")
    assert whole(path) == "new" or count > number
    replace(path)
    assert whole(path) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def _raise(error):
    raise error


def test_the_program_may_die_between_any_two_steps(tmp_path):
    """As a kill would, with and without an exchange at once; then the next run goes on."""
    code = (
        "import os, sys; from pathlib import Path; from mlx_loop import files\n"
        "path, name, number, swaps = sys.argv[1:]\n"
        "def none(*_): raise OSError(38, 'none')\n"
        "if swaps == 'no': files._swap = none\n"
        "real, count = getattr(os, name), 0\n"
        "def die(*a, **k):\n"
        "    global count; count += 1\n"
        "    if count == int(number): os._exit(9)\n"
        "    return real(*a, **k)\n"
        "setattr(os, name, die)\n"
        "with files.whole_folder(Path(path), overwrite=True) as new:\n"
        "    (new / 'a').write_text('new'); (new / 'b').write_text('new')\n"
    )
    for swaps, name, number in [("no", "rename", 1), ("no", "rename", 2), ("yes", "fsync", 4)]:
        path = tmp_path / f"{swaps}{name}{number}"
        old(path)
        done = subprocess.run([sys.executable, "-c", code, path, name, str(number), swaps])
        assert done.returncode == 9
        with suppress(UserError), whole_folder(path):
            pass  # Any next run puts the old one back, if it was between two places.
        assert whole(path) in ("old", "new")
        replace(path)
        assert not list(tmp_path.glob(".*.part"))
