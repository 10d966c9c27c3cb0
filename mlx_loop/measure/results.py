"""Files of results: JSON lines, appended as they come; what a file holds is not done again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..settings import LoopConfig

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

        A last line that was cut off, by a crash or a full disk, is removed.

        Raises:
            UserError: the file holds something else, or cannot be read or written.
        """
        try:
            text = path.read_text() if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if not whole and not text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(header) + "\n")
                return cls(path, {})
            try:
                first, *lines = map(json.loads, whole.splitlines())
                rows = {(key(line["loop"]), line["item"]): line for line in lines}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} holds no results: give --out another name") from error
            check_header(path, first, header)
            if len(whole) < len(text):
                path.write_text(whole)
            return cls(path, rows)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def add(self, loop: LoopConfig | None, row: Row) -> None:
        """Append one result."""
        line = {"loop": loop and loop.to_dict(), **row}
        self.rows[key(loop), row["item"]] = line
        if self.path is not None:
            append(self.path, line)

    def has(self, loop: LoopConfig | None, item: Row) -> bool:
        return (key(loop), item["item"]) in self.rows

    def of(self, loop: LoopConfig | None, item: Row) -> Row:
        return self.rows[key(loop), item["item"]]


def key(loop: LoopConfig | Row | None) -> str:
    """Loop settings as a text, the same for the same settings."""
    values = loop.to_dict() if isinstance(loop, LoopConfig) else loop
    return json.dumps(values, sort_keys=True)


def append(path: Path, line: Row) -> None:
    """Write one more line.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def read_lines(path: Path) -> list[Row]:
    """All lines of a file; one that was cut off at the end is left out.

    Raises:
        UserError: the file cannot be read.
    """
    text = read_text(path)
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from error


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


def read_text(path: Path) -> str:
    """What a file says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def fingerprint(path: Path) -> str:
    """SHA-256 of a text file."""
    return hashlib.sha256(read_text(path).encode()).hexdigest()
