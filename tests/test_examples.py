"""The examples and the notebook run as they stand, on the demo model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[dict]:
    """The cells of a kind, in order."""
    found = json.loads(notebook.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Files that an example writes do not stay, and no picture asks for a screen."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_runs(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_is_read_in_one_go(script):
    assert len(script.read_text().splitlines()) <= 40


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(notebook, capsys):
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(notebook, "code"), 1):
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    out = capsys.readouterr().out
    assert "42" in out
    assert "anchored drifting" in out
    assert "naive drifting" in out
    assert names["axis"].has_data()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_its_outputs(notebook):
    assert [c for c in cells(notebook, "code") if c["outputs"] or c["execution_count"]] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_links_to_files(notebook):
    for cell in cells(notebook, "markdown"):
        for link in "".join(cell["source"]).split("](")[1:]:
            assert (EXAMPLES / link.partition(")")[0]).exists()
