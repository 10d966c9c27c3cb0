"""What is measured. A task is a class in a file of its own (`task.py` says what it has)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import UserError
from ...foreign import path_of
from .choices import ChatChoices, Choices
from .questions import QUESTIONS, Questions
from .task import Task, joined, named
from .text import Text

__all__ = [
    "FROM_FILES",
    "Task",
    "files_of",
    "joined",
    "kind_of",
    "named",
    "read_tasks",
    "split_name",
    "split_names",
]

# Tasks that are read from a file, `--task KIND:FILE`.
FROM_FILES: dict[str, type[Task]] = {
    "questions": Questions,
    "text": Text,
    "choices": Choices,
    "chat_choices": ChatChoices,
}


def split_name(name: str) -> tuple[str, str]:
    """The kind and the file of `KIND:FILE`; a file alone holds questions."""
    kind, colon, file = name.partition(":")
    return (kind, file) if colon and kind in FROM_FILES else ("questions", name)


def split_names(names: str) -> list[str]:
    """Each name in `KIND:FILE,KIND:FILE`; other commas belong to the files."""
    return re.split(rf",\s*(?=(?:{'|'.join(FROM_FILES)}):)", names)


def kind_of(names: Sequence[str]) -> str:
    """The kind of all of several names.

    Raises:
        UserError: they are of several kinds.
    """
    kinds = list(dict.fromkeys(split_name(name)[0] for name in names))
    if len(kinds) > 1:
        raise UserError(f"--task takes files of one kind, not of {' and '.join(kinds)}")
    return kinds[0]


def files_of(names: Sequence[str]) -> list[Path]:
    """The files that names stand for; `demo` alone is the questions that ship with mlx_loop."""
    if list(names) == ["demo"]:
        return [QUESTIONS]
    return [path_of(split_name(name)[1]) for name in names]


def read_tasks(
    names: Sequence[str], tokenizer: TokenizerWrapper, limit: int | None, **asked: Any
) -> Task:
    """The tasks of files of one kind, as one; arguments as in `Task.read`."""
    kind = FROM_FILES[kind_of(names)]
    tasks = [kind.read(path, tokenizer, limit, **asked) for path in files_of(names)]
    return tasks[0] if len(tasks) == 1 else joined(list(map(named, tasks, names)))
