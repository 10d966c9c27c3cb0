"""The order of the rooms: what is lower knows nothing of what is higher."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlx_loop"
ROOMS = ["method", "models", "generation", "checkpoints", "measure", "screens"]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def room(parts: tuple[str, ...]) -> int:
    """The floor that a module of the package is on; 0: it is above all rooms, and below none."""
    return ROOMS.index(parts[0]) + 1 if parts and parts[0] in ROOMS else 0


def imported(path: Path) -> list[tuple[str, ...]]:
    """The modules of the package that a file imports, wherever in it."""
    here = path.relative_to(PACKAGE).parts[:-1]
    return [
        (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_up(path):
    floor = room(path.relative_to(PACKAGE).parts)
    assert floor, "a folder that is no room"
    assert [parts for parts in imported(path) if room(parts) > floor] == []


def test_what_is_above_the_rooms_needs_none_of_them():
    for path in PACKAGE.glob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert [parts for parts in imported(path) if room(parts)] == [], path.name
