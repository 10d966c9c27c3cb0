"""What is measured. A task is a class in a file of its own (`task.py` says what it has)."""

from .questions import Questions
from .task import Task, named
from .text import Text

__all__ = ["FROM_FILES", "Task", "named", "split_name"]

# Tasks that are read from a file, `--task KIND:FILE`.
FROM_FILES: dict[str, type[Task]] = {"questions": Questions, "text": Text}


def split_name(name: str) -> tuple[str, str]:
    """The kind and the file of `KIND:FILE`; a file alone holds questions."""
    kind, colon, file = name.partition(":")
    return (kind, file) if colon and kind in FROM_FILES else ("questions", name)
