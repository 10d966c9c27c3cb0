"""What is measured. A task is a class in a file of its own (`task.py` says what it has)."""

import re

from .choices import ChatChoices, Choices
from .questions import Questions
from .task import Task, joined, named
from .text import Text

__all__ = ["FROM_FILES", "Task", "joined", "named", "split_name", "split_names"]

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
