"""Files of results: JSON lines, appended as they come; what a file holds is not done again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import several
from ..errors import UserError
from ..foreign import from_json, read_text, to_json
from ..settings import LoopConfig, is_number

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """A file of results: a line that says what was measured, then a line for each result.

    Args:
        path: None: they are kept nowhere else.
    """

    path: Path | None
    rows: dict[tuple[str, Any], Row]

    @classmethod
    def open(cls, path: Path, header: Row) -> Results:
        """The results in `path`, which is made if it is not there.

        Of several machines the first one has the file, and all know what is in it.

        A first or last line that was cut off, by a crash or a full disk, is removed, and a line
        that is no result is left alone: what it may have held is measured again.

        Raises:
            UserError: the file holds something else, or cannot be read or written.
        """
        found = several.from_first(lambda: _open(path, header))
        rows = {(key(row["loop"]), row["item"]): row for row in found}
        return cls(path if several.is_first() else None, rows)

    def add(self, loop: LoopConfig | None, row: Row) -> None:
        """Append one result."""
        line = {"loop": loop and loop.to_dict(), **row}
        self.rows[key(loop), row["item"]] = line
        if self.path is not None:
            append(self.path, line)

    def has(self, loop: LoopConfig | None, item: Row, numbers: Iterable[str] = ()) -> bool:
        """Whether there is a result of an item, and these numbers are in it."""
        row = self.rows.get((key(loop), item["item"]))
        return row is not None and all(map(is_number, map(row.get, numbers)))

    def of(self, loop: LoopConfig | None, item: Row) -> Row:
        return self.rows[key(loop), item["item"]]


def _open(path: Path, header: Row) -> list[Row]:
    first = to_json(header) + "\n"
    with writing(path):
        text = read_text(path) if path.exists() else ""
        if first.startswith(text) and text != first:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(first.encode())
            return []
        found = parsed(text)
        check_header(path, next(found, None), header)
        if cut_off := text[text.rfind("\n") + 1 :]:
            os.truncate(path, path.stat().st_size - len(cut_off.encode()))
        return [row for row in found if _is_result(row)]


def _is_result(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("loop", 0), dict | None):
        return False
    return isinstance(row.get("item"), str | int)


def key(loop: LoopConfig | Row | None) -> str:
    """Loop settings as a text, the same for the same settings."""
    values = loop.to_dict() if isinstance(loop, LoopConfig) else loop
    return json.dumps(values, sort_keys=True)


def append(path: Path, line: Row) -> None:
    """Write one more line, or nothing of it.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path), path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        cut_off = file.read(1) not in (b"", b"\n")
        written = b"\n" * cut_off + to_json(line).encode() + b"\n"
        try:
            while written:
                written = written[file.write(written) :]
        except BaseException:
            file.truncate(size)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def parsed(text: str) -> Iterator[Any]:
    """The value of each whole line; None: it is not JSON."""
    for line in text.split("\n")[:-1]:
        try:
            yield from_json(line, "")
        except UserError:
            yield None


def read_lines(path: Path) -> Iterator[Any]:
    """The value of each whole line of a file; none where there is no file.

    Raises:
        UserError: the file cannot be read.
    """
    return parsed(read_text(path) if path.exists() else "")


def read_rows(path: Path, *numbers: str) -> list[Row]:
    """The lines of a file that have loop settings and these numbers, NaN too; none without a file.

    Raises:
        UserError: the file cannot be read.
    """
    return [
        row
        for row in read_lines(path)
        if isinstance(row, dict)
        and isinstance(row.get("loop", 0), dict | None)
        and all(isinstance(row.get(n), float) or is_number(row.get(n)) for n in numbers)
    ]


def check_header(path: Path, found: Any, header: Row) -> None:
    """Refuse a file whose first line says that something else was measured; null is not said."""
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no results: give --out another name")
    either = [*header, *(name for name in found if name not in header)]
    differing = [name for name in either if found.get(name) != header.get(name)]
    if differing:
        raise UserError(
            f"{path} holds results of another {' and '.join(differing)}: give --out another name"
        )


def fingerprint(path: Path) -> str:
    """SHA-256 of a text file."""
    return hashlib.sha256(read_text(path).encode()).hexdigest()
