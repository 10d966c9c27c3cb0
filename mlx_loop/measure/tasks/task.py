"""What a task is: items, and how a batch of them is measured under several settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import UserError
from ...foreign import from_json, lines, read_text
from ...generation.batch import answer_batch
from ...generation.prefill import PREFILL_STEP
from ...models.looped import Looped
from ..results import Row

# Settings that answer at the same time, which bounds the memory that their caches take.
TOGETHER = 8


class Found(NamedTuple):
    """Results of one view.

    Args:
        view: its number.
        rows: the results, each with the name of its item.
        seconds: what they took; None: that was not measured.
    """

    view: int
    rows: list[Row]
    seconds: float | None = None


class Score(NamedTuple):
    """A number in the results that settings are compared by.

    Args:
        name: what the results call it.
        title: what people read.
        unit: `%` for 0 to 1, or another one.
        better: 1 where more is better, -1 where less is.
    """

    name: str
    title: str
    unit: str = "%"
    better: int = 1


class Task:
    """Something to measure.

    Attributes:
        items: each has a name, `item`; `task`, `length` and `index` are kept with its results.
        batch: items that are measured at a time.
        reads: the names in `asked` that matter to it.
        score: what the results call the score.
        also: other numbers in the results, of which means are shown.
        beside: other scores, by which settings are compared too.
        better: 1 where more is better, -1 where less is.
        unit: of the score: `%` for 0 to 1, or another one.
        no_choice: why no setting is chosen by the score; None: one may be.
    """

    items: Sequence[Row]
    batch: int = 1
    reads: ClassVar[Sequence[str]] = ()

    score: str = "score"
    also: Sequence[str] = ()
    beside: ClassVar[Sequence[Score]] = ()
    better: int = 1
    unit: str = "%"
    no_choice: ClassVar[str | None] = None

    @property
    def numbers(self) -> Sequence[str]:
        """The numbers that each of its results has."""
        return (self.score, *self.also, *(score.name for score in self.beside))

    @classmethod
    def read(cls, path: Path, tokenizer: TokenizerWrapper, limit: int | None, **asked: Any) -> Task:
        """The task of a file.

        Args:
            limit: as in `spread`.
            asked: how it is asked, if it is: max_tokens, template, system, batch, step.

        Raises:
            UserError: the file cannot be read, or is not of the task's form.
        """
        raise NotImplementedError

    def batches(self) -> Iterator[Sequence[Row]]:
        """The items, a batch at a time; the same ones in every run."""
        for start in range(0, len(self.items), self.batch):
            yield self.items[start : start + self.batch]

    def length(self, tokenizer: TokenizerWrapper, item: Row) -> int:
        """Tokens that the model is given with an item; 0: that is not known."""
        return 0

    def measure(
        self, views: Sequence[Looped], tokenizer: TokenizerWrapper, items: Sequence[Row]
    ) -> Iterator[list[Found]]:
        """Results of a batch under each view; those that come at the same time in one list."""
        raise NotImplementedError

    def told(self, item: Row, row: Row) -> tuple[str, str, str] | None:
        """The question, the right answer and that of a result; None: there are no answers."""
        return None


class Answers(Task):
    """A task of prompts that are answered greedily."""

    reads: ClassVar[Sequence[str]] = ("max_tokens", "template", "system", "batch", "step")
    step: int = PREFILL_STEP

    def prompt(self, tokenizer: TokenizerWrapper, item: Row) -> list[int]:
        """Token ids, up to where the answer begins."""
        raise NotImplementedError

    def longest(self, item: Row) -> int:
        """The most tokens of an answer; the same for all items of a batch."""
        raise NotImplementedError

    def length(self, tokenizer: TokenizerWrapper, item: Row) -> int:
        return len(self.prompt(tokenizer, item))

    def judge(self, item: Row, text: str) -> Row:
        """What is kept of an answer, its score among it."""
        raise NotImplementedError

    def measure(
        self, views: Sequence[Looped], tokenizer: TokenizerWrapper, items: Sequence[Row]
    ) -> Iterator[list[Found]]:
        ends = set(tokenizer.eos_token_ids)
        prompts = [self.prompt(tokenizer, item) for item in items]
        for start in range(0, len(views), TOGETHER):
            some = views[start : start + TOGETHER]
            found = answer_batch(some, prompts, ends, self.longest(items[0]), self.step)
            for number, answers, seconds in found:
                texts = map(tokenizer.decode, answers)
                rows = [place(i) | self.judge(i, t) for i, t in zip(items, texts, strict=True)]
                yield [Found(start + number, rows, seconds)]


def place(item: Row) -> Row:
    """What is kept of an item with each of its results."""
    return {name: item[name] for name in ("item", "task", "length", "index") if name in item}


def named(task: Task, name: str) -> Task:
    """The same task with items of which the results can stand among those of other tasks."""
    task = copy.copy(task)
    items = [
        item
        | {"item": f"{name}/{item['item']}", "task": name, "length": None, "index": item["item"]}
        for item in task.items
    ]
    # Tasks are frozen.
    object.__setattr__(task, "items", items)
    return task


def joined(tasks: Sequence[Task]) -> Task:
    """Tasks of one kind as one, with the items of all."""
    task = copy.copy(tasks[0])
    object.__setattr__(task, "items", [item for of in tasks for item in of.items])
    return task


def read_items(path: Path, limit: int | None, form: str, parse: Callable[[Any], Row]) -> list[Row]:
    """Items of a file of JSON lines, numbered as in the file, `limit` of them evenly spread.

    Args:
        form: what a line should be, in words.
        parse: what an item has besides its number, of a line's value; a ValueError, KeyError,
            TypeError or IndexError says that the line is not of the form.

    Raises:
        UserError: it cannot be read, or a line is not of the form.
    """
    items = []
    for number, line in enumerate(lines(read_text(path))):
        if not line.strip():
            continue
        try:
            items.append({"item": number, **parse(from_json(line, ""))})
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"line {number + 1} of {path} is not {form}") from error
    return spread(items, limit, path)


def spread(items: list[Any], limit: int | None, source: Any) -> list[Any]:
    """`limit` of the items, evenly spread; None: all.

    Raises:
        UserError: there are none.
    """
    if not items:
        raise UserError(f"{source} has nothing in it to measure")
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
