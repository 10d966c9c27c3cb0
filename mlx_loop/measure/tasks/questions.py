"""Questions with expected answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import UserError
from ...generation.prompt import render
from ..results import Row, read_text
from .task import Answers, spread

# Held-out questions for the demo checkpoints.
QUESTIONS = Path(__file__).parents[2] / "demo" / "questions.jsonl"


@dataclass(frozen=True)
class Questions(Answers):
    """An item is right, 1, or wrong, 0.

    Args:
        items: number in the file, messages, answer and skill.
        max_tokens: of an answer.
        template: more arguments for the chat template.
        system: the system message.
    """

    items: Sequence[Row]
    max_tokens: int = 64
    template: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    batch: int = 32

    score = "right"

    @classmethod
    def read(
        cls, path: Path, tokenizer: TokenizerWrapper, limit: int | None, **asked: Any
    ) -> Questions:
        """The questions of a file, asked as said.

        Raises:
            UserError: as `read_questions`, or the model has no chat template.
        """
        if not tokenizer.has_chat_template:
            raise UserError("--task needs a model with a chat template; --text works with any")
        return cls(read_questions(path, limit), **asked)

    def prompt(self, tokenizer: TokenizerWrapper, item: Row) -> list[int]:
        return render(tokenizer, item["messages"], self.system, self.template)

    def longest(self, item: Row) -> int:
        return self.max_tokens

    def judge(self, item: Row, text: str) -> Row:
        return {"right": int(is_right(item, text)), "text": text}


def is_right(question: Row, text: str) -> bool:
    """Exact match; an answer of the skill `fallback` needs only to begin as expected."""
    said = text.strip()
    if question.get("skill") == "fallback":
        return said.startswith(question["answer"])
    return said == question["answer"]


def read_questions(path: Path, limit: int | None) -> list[Row]:
    """Questions of a file like mlx_loop/demo/questions.jsonl, `limit` of them evenly spread.

    Raises:
        UserError: it cannot be read, or a line is not of that form.
    """
    items = []
    for number, line in enumerate(read_text(path).splitlines()):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            messages, answer = question["messages"], question["answer"]
            if not messages[-1]["content"] or not isinstance(answer, str):
                raise ValueError("empty message or answer")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"line {number + 1} of {path} is not a question: each line is "
                '{"messages": [{"role": "user", "content": "..."}], "answer": "..."}'
            ) from error
        skill = question.get("skill")
        items.append({"item": number, "messages": messages, "answer": answer, "skill": skill})
    return spread(items, limit, path)
