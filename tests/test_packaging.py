"""What the package says of itself: its dependencies, its types, its files."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "mlx_loop").rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def modules_of(requirements: Iterable[str]) -> set[str]:
    """The module of each requirement; all but one are called as their distributions."""
    names = (re.match(r"[\w.-]+", line) for line in requirements)
    modules = {name[0].lower().replace("-", "_") for name in names if name}
    return {"markdown_it" if name == "markdown_it_py" else name for name in modules}


NEEDED = modules_of(PROJECT["dependencies"])
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = modules_of(EXTRAS["eval"] + EXTRAS["serve"])


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The top-level modules that statements import, but for Python's and our own."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"mlx_loop"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_declared(path):
    tree = ast.parse(path.read_text())
    assert imported(ast.walk(tree)) <= NEEDED | OPTIONAL


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_optional_is_imported_only_when_it_is_asked_for(path):
    assert imported(ast.parse(path.read_text()).body) <= NEEDED


def test_every_dependency_is_imported():
    used = set().union(*(imported(ast.walk(ast.parse(path.read_text()))) for path in MODULES))
    assert used >= NEEDED


def test_the_package_has_types():
    assert (ROOT / "mlx_loop" / "py.typed").exists()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_what_a_source_distribution_holds_is_there():
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [name for name in included if not (ROOT / name).exists()] == []


def test_the_changelog_knows_the_version():
    version = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "mlx_loop" / "__init__.py").read_text(), re.M
    )
    assert version
    assert f"## [{version[1]}] - " in (ROOT / "CHANGELOG.md").read_text()
