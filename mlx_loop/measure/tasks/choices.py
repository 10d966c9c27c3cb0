"""Questions with choices: which one does the model think the likeliest?

As in lm-evaluation-harness, whose `acc` and `acc_norm` are here `right` and `right_per_character`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import UserError
from ...generation.prefill import PREFILL_STEP
from ...generation.prompt import encode, render
from ...models.looped import Looped
from ..likelihood import log_likelihoods
from ..outcome import GOLDEN
from ..results import Row
from .task import TOGETHER, Found, Score, Task, place, read_items


@dataclass(frozen=True)
class Choices(Task):
    """`Question: ...`, a line `Answer:`, and each choice after a space; no chat template.

    Args:
        items: number in the file, choices, number of the right one, and token ids: of the prompt,
            and of each choice after it (`endings`).
    """

    items: Sequence[Row]
    batch: int = 8
    step: int = PREFILL_STEP

    reads: ClassVar[Sequence[str]] = ("batch", "step")
    score = "right"
    beside: ClassVar[Sequence[Score]] = (
        Score("right_per_character", "right, log-likelihood per character"),
        Score("log_p", "log-probability of the right choice", "nats"),
        Score("log_p_among", "log-probability of the right choice among the choices", "nats"),
    )

    @classmethod
    def read(
        cls, path: Path, tokenizer: TokenizerWrapper, limit: int | None, **asked: Any
    ) -> Choices:
        """The questions of a file, asked as said.

        Raises:
            UserError: as `read_choices`, or a choice adds no token to its prompt.
        """
        task = cls([], **{name: asked[name] for name in cls.reads if name in asked})
        items = []
        for item in read_choices(path, limit):
            prompt = task.tokens(tokenizer, item["question"])
            # As in the harness: what comes after as many tokens as the prompt has by itself.
            endings = [
                task.tokens(tokenizer, item["question"], choice)[len(prompt) :]
                for choice in item["choices"]
            ]
            if not all(endings):
                raise UserError(f"line {item['item'] + 1} of {path}: a choice adds no token")
            items.append(item | {"prompt": prompt, "endings": endings})
        return replace(task, items=items)

    def tokens(
        self, tokenizer: TokenizerWrapper, question: str, choice: str | None = None
    ) -> list[int]:
        """Token ids of the prompt, or of prompt and choice."""
        text = f"Question: {question}\nAnswer:"
        return encode(tokenizer, text if choice is None else f"{text} {choice}")

    def batches(self) -> Iterator[Sequence[Row]]:
        """Questions of about one length, which need little padding.

        The order of the batches has nothing to do with length, so that those which are done when
        somebody stops are like the others.
        """
        items = sorted(self.items, key=lambda item: len(item["prompt"]))
        starts = range(0, len(items), self.batch)
        for start in sorted(starts, key=lambda start: start // self.batch * GOLDEN % 1):
            yield items[start : start + self.batch]

    def length(self, tokenizer: TokenizerWrapper, item: Row) -> int:
        return len(item["prompt"]) + max(map(len, item["endings"]))

    def measure(
        self, views: Sequence[Looped], tokenizer: TokenizerWrapper, items: Sequence[Row]
    ) -> Iterator[list[Found]]:
        prompts, endings = ([item[name] for item in items] for name in ("prompt", "endings"))
        for start in range(0, len(views), TOGETHER):
            some = views[start : start + TOGETHER]
            found = log_likelihoods(some, prompts, endings, self.step)
            yield [
                Found(start + i, list(map(judge, items, likelihoods)))
                for i, likelihoods in enumerate(found)
            ]

    def told(self, item: Row, row: Row) -> tuple[str, str, str]:
        choices, likelihoods = item["choices"], row["log_p_of_choices"]
        chosen = likelihoods.index(max(likelihoods))
        return item["question"], choices[item["answer"]], choices[chosen]


@dataclass(frozen=True)
class ChatChoices(Choices):
    """The question as a user's message, and each choice as the answer to it.

    Args:
        template: more arguments for the chat template.
        system: the system message.
    """

    template: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None

    reads: ClassVar[Sequence[str]] = ("template", "system", "batch", "step")

    @classmethod
    def read(
        cls, path: Path, tokenizer: TokenizerWrapper, limit: int | None, **asked: Any
    ) -> Choices:
        """As `Choices.read`; UserError: the model has no chat template."""
        if not tokenizer.has_chat_template:
            raise UserError("chat_choices: needs a model with a chat template; choices: does not")
        return super().read(path, tokenizer, limit, **asked)

    def tokens(
        self, tokenizer: TokenizerWrapper, question: str, choice: str | None = None
    ) -> list[int]:
        messages = [{"role": "user", "content": question}]
        return render(tokenizer, messages, self.system, self.template, choice or "")


def judge(item: Row, likelihoods: Sequence[float]) -> Row:
    """What is kept of a question.

    Args:
        likelihoods: log p(choice | prompt) of each choice, in nats.
    """
    answer, found = item["answer"], np.array(likelihoods)
    per_character = found / [len(choice) for choice in item["choices"]]
    return place(item) | {
        "right": int(found.argmax() == answer),
        "right_per_character": int(per_character.argmax() == answer),
        "log_p": likelihoods[answer],
        "log_p_among": likelihoods[answer] - float(np.logaddexp.reduce(found)),
        "log_p_of_choices": list(likelihoods),
    }


def read_choices(path: Path, limit: int | None) -> list[Row]:
    """Questions of a file, as `read_items` reads them; the right choice as its number."""
    form = (
        'a question with choices: each line is {"question": "...", "choices": ["...", "..."], '
        '"answer": 0}, or "A"'
    )
    return read_items(path, limit, form, _parse)


def _parse(row: Any) -> Row:
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if isinstance(answer, str):
        answer = ord(answer) - ord("A")
    ok = isinstance(choices, list) and len(choices) > 1
    ok = ok and type(answer) is int and answer in range(len(choices))
    if not ok or not all(isinstance(x, str) and x.strip() for x in (question, *choices)):
        raise ValueError("another form")
    return {"question": question, "choices": choices, "answer": answer}
