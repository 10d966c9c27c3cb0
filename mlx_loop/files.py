"""Files and folders that are whole or not there at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def whole_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    It has the same ending. Whatever goes wrong, `path` is as it was before.

    Raises:
        UserError: `path` exists and may not be overwritten, or it cannot be written.
    """
    check_new(path, overwrite)
    with _scratch(path) as folder:
        yield folder / path.name
        (folder / path.name).replace(path)


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    Raises:
        UserError: as `whole_file`.
    """
    check_new(path, overwrite)
    with _scratch(path) as folder:
        new, old = folder / "new", folder / "old"
        new.mkdir()
        yield new
        if path.exists():
            path.replace(old)
        new.replace(path)


def check_space(folder: Path, path: Path, size: int) -> None:
    """Refuse to begin what the disk of `folder` has no room for.

    Args:
        path: what the user called it.
        size: bytes.

    Raises:
        UserError: too little is free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{path} needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on that disk"
        )


def check_new(path: Path, overwrite: bool, otherwise: str = "remove it first") -> None:
    """Refuse to begin what would overwrite something unasked.

    Args:
        otherwise: what to do for one who wants this name.

    Raises:
        UserError: `path` exists and not `overwrite`.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another name, or {otherwise}")


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield folder
    except (OSError, RuntimeError) as error:  # MLX reports a full disk as a RuntimeError.
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
