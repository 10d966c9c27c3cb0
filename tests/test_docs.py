"""The pages find each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path for folder in (".", "docs", "benchmarks/results") for path in (ROOT / folder).glob("*.md")
) + sorted((ROOT / "docs").glob("*/*.md"))


def targets(page: Path) -> set[Path]:
    """The files of the repository that a page points to, in text and pictures."""
    words = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text())
    names = {(link or picture).partition("#")[0] for link, picture in words}
    return {(page.parent / name).resolve() for name in names if name and "://" not in name}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    assert [str(path.relative_to(ROOT)) for path in targets(page) if not path.exists()] == []


def test_the_index_lists_every_page():
    index = ROOT / "docs" / "index.md"
    assert set((ROOT / "docs").rglob("*.md")) - {index} <= targets(index)


def test_every_picture_is_shown():
    shown = {path for page in PAGES for path in targets(page)}
    pictures = {path for end in ("png", "svg") for path in (ROOT / "docs").rglob(f"*.{end}")}
    assert pictures <= shown
