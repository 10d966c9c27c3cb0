"""Files and folders that are whole or not there at all.

What is made stands in a scratch folder beside its place, `.NAME.part`, until it is whole. One run
at a time has it, by a lock that ends with the run; what a killed run left there, the next removes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .errors import UserError

# What the name of something that came meanwhile is refused with.
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
# Exchange two names: (function, argument for the folder of a name, flag).
_SWAP = {"linux": ("renameat2", (-100,), 2), "darwin": ("renamex_np", (), 2)}


@contextmanager
def whole_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    It has the same ending. Whatever goes wrong, `path` is as it was before.

    Raises:
        UserError: `path` exists and may not be overwritten, it cannot be written, or another run
            is writing it.
    """
    check_file(path, overwrite)
    with _scratch(path) as (folder, path):
        new = folder / path.name
        yield new
        _to_disk(new)
        if overwrite:
            os.replace(new, path)
        else:
            _link(new, path)


@contextmanager
def whole_folder(
    path: Path, overwrite: bool = False, check: Callable[[Path], None] = lambda old: None
) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    Args:
        check: raises UserError for an old folder that may not be replaced.

    Raises:
        UserError: as `whole_file`.
    """
    check_new(path, overwrite)
    if path.exists():
        check(path)
    with _scratch(path) as (folder, path):
        check_new(path, overwrite)  # A killed run's old folder may be back.
        new, old = folder / "new", folder / "old"
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            _to_disk(file)
        _to_disk(new)
        if overwrite and path.exists():
            check(path)
            _exchange(new, path, old)
        else:
            # Nothing but an empty folder gives way to it.
            os.rename(new, path)


def _link(new: Path, path: Path) -> None:
    """Give a file its name; unlike renaming, this never takes it from one that came meanwhile."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # A file system without links.
        check_new(path, overwrite=False)
        os.rename(new, path)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Put `new` in the place of `path`, at once where the file system can."""
    try:
        _swap(new, path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise


def _swap(one: Path, other: Path) -> None:
    name, folder, flag = _SWAP.get(sys.platform, ("", (), 0))
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    names = [part for path in (one, other) for part in (*folder, os.fsencode(path))]
    if function is None:
        raise OSError(errno.ENOSYS, name)
    if function(*names, flag):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def check_space(folder: Path, path: Path, size: int) -> None:
    """Refuse to begin what the disk of `folder` has no room for.

    Args:
        folder: where it will be; it need not be there yet.
        path: what the user called it.
        size: bytes.

    Raises:
        UserError: too little is free.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(
            f"{path} needs {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are free on that disk"
        )


def check_new(path: Path, overwrite: bool, otherwise: str = "remove it first") -> None:
    """Refuse to begin what would overwrite something unasked, or cannot be written at all.

    Args:
        otherwise: what to do for one who wants this name.

    Raises:
        UserError: `path` exists and not `overwrite`, or nothing can be made there.
    """
    try:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already: choose another name, or {otherwise}")
        for name in (path, _part(path)):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(name)  # Not the longest of names.
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {folder} is not a folder that may be written to")


def check_file(path: Path, overwrite: bool = True) -> None:
    """As `check_new`, for a file. UserError: also where a folder or device has that name."""
    check_new(path, overwrite)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no file that keeps anything"
        raise UserError(f"cannot write {path}: it is {what}; give the name of a file")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Have a file that grows for this run alone; it is made if it is not there.

    Raises:
        UserError: another run has it, or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    try:
        _lock(handle, path)
        yield
    finally:
        os.close(handle)


def _to_disk(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _scratch(path: Path) -> Iterator[tuple[Path, Path]]:
    """An empty folder beside what `path` stands for, and that, without links."""
    with ExitStack() as stack:
        try:
            real = path.resolve()
            real.parent.mkdir(parents=True, exist_ok=True)
            folder = _part(real)
            stack.enter_context(_locked(folder, path))
            _clear(folder, real)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            yield folder, real
            _to_disk(real.parent)
        except (OSError, RuntimeError) as error:  # MLX reports a full disk as a RuntimeError.
            if isinstance(error, OSError) and error.errno in _TAKEN:
                raise UserError(f"{path} came into being meanwhile, and is kept") from error
            raise UserError(f"cannot write {path}: {error}") from error


def _part(path: Path) -> Path:
    return path.parent / f".{path.name}.part"


@contextmanager
def _locked(folder: Path, path: Path) -> Iterator[None]:
    while True:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle, path)
        except UserError:
            os.close(handle)
            raise
        if folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder)):
            break
        os.close(handle)  # The run that had it has removed it.
    try:
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    """Have what `handle` opens until it is closed, where the file system has locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another run is writing {path}: wait for it, or choose another name"
        ) from None
    except OSError:  # A file system without locks.
        pass


def _clear(folder: Path, path: Path) -> None:
    """Remove what a killed run left; the old folder goes back to its place if that is empty."""
    old = folder / "old"
    if old.exists() and not path.exists():
        os.rename(old, path)
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
