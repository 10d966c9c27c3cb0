"""Pictures: what they need, and what they are called."""

from __future__ import annotations

import sys

import pytest

from mlx_loop import UserError
from mlx_loop.measure.plots import save


def test_pictures_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        save(tmp_path / "a.png", lambda pyplot: None)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"\.png"):
        save(tmp_path / "a.txt", lambda pyplot: None)
