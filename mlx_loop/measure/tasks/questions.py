"""Questions with expected answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import UserError
from ...generation.prefill import PREFILL_STEP
from ...generation.prompt import render
from ..results import Row
from .task import Answers, read_items

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
    step: int = PREFILL_STEP

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

    def told(self, item: Row, row: Row) -> tuple[str, str, str]:
        return item["messages"][-1]["content"], item["answer"], row["text"]


def is_right(question: Row, text: str) -> bool:
    """Exact match; an answer of the skill `fallback` needs only to begin as expected."""
    said = text.strip()
    if question.get("skill") == "fallback":
        return said.startswith(question["answer"])
    return said == question["answer"]


def read_questions(path: Path, limit: int | None) -> list[Row]:
    """Questions of a file like mlx_loop/demo/questions.jsonl, as `read_items` reads them."""
    form = (
        'a question: each line is {"messages": [{"role": "user", "content": "..."}], '
        '"answer": "..."}'
    )
    return read_items(path, limit, form, _parse)


def _parse(question: Any) -> Row:
    messages, answer = question["messages"], question["answer"]
    if not messages[-1]["content"] or not isinstance(answer, str):
        raise ValueError("empty message or answer")
    return {"messages": messages, "answer": answer, "skill": question.get("skill")}
