"""Running a study: the same problems under every setting, batch by batch, resumable.

A study is a folder. `examples.jsonl` holds the problems and `results.jsonl` the answers with their
scores, a line each after a first line with the whole configuration. What is there is not done
again.
Batches are the same however often a run was interrupted, so the files are too. `seconds.jsonl`,
which differs from run to run, says how long each batch took.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError
from ..files import whole_file
from ..generation.batch import answer_batch
from ..generation.prompt import render
from ..models.looped import Looped
from .sweep import Results, fingerprint
from .tasks import ruler

EXAMPLES, RESULTS, SECONDS = "examples.jsonl", "results.jsonl", "seconds.jsonl"


@dataclass(frozen=True)
class Study:
    """Everything that the answers depend on, other than the loop settings.

    Args:
        tasks: names in `ruler.TASKS`.
        lengths: context lengths in tokens, prompt and answer together.
        limit: problems of each task and length.
        answer_prefix: whether the model is given the beginning of its answer, as published.
        template: more arguments for the chat template.
        batch_size: prompts that are answered at a time; it changes the rounding.
    """

    model: str
    tasks: Sequence[str]
    lengths: Sequence[int]
    limit: int
    sources: ruler.Sources = field(default_factory=ruler.Sources)
    seed: int = ruler.SEED
    adapter_path: str | None = None
    dtype: str | None = None
    answer_prefix: bool = True
    system_prompt: str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    prefill_step_size: int = 2048

    def header(self) -> dict[str, Any]:
        """As JSON; files by their content."""
        values = {name: value for name, value in vars(self).items() if name != "sources"}
        sources = self.sources
        return json.loads(
            json.dumps(
                values
                | {
                    "filler": sources.filler and fingerprint(sources.filler),
                    "documents": sources.documents and fingerprint(sources.documents),
                }
            )
        )

    def cells(self) -> list[tuple[str, int]]:
        """Each task at each length."""
        return [(task, length) for length in self.lengths for task in self.tasks]

    def prompt(self, tokenizer: TokenizerWrapper, text: str, answer_prefix: str) -> list[int]:
        """Token ids of a problem."""
        prefix = answer_prefix if self.answer_prefix else ""
        message = {"role": "user", "content": text}
        return render(tokenizer, [message], self.system_prompt, self.template, prefix)


def examples(
    study: Study,
    tokenizer: TokenizerWrapper,
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> list[ruler.Example]:
    """The problems of a study, from its folder, or made and written there.

    Args:
        advance: called after each problem that is made.

    Raises:
        UserError: a task does not fit a length, or the file cannot be read or written.
    """
    path = folder / EXAMPLES
    if path.exists():
        try:
            header, *lines = map(json.loads, path.read_text().splitlines())
            found = [ruler.Example(**line) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it to make it again") from error
        if header != study.header():
            differing = [
                name for name, value in study.header().items() if header.get(name) != value
            ]
            raise UserError(
                f"{folder} holds a study with another {' and '.join(differing)}: give --out "
                "another name"
            )
        return found

    def size(text: str, prefix: str) -> int:
        return len(study.prompt(tokenizer, text, prefix))

    made = []
    for task, length in study.cells():
        for index in range(study.limit):
            made.append(ruler.example(task, length, index, size, study.sources, study.seed))
            advance()
    rows = [study.header(), *map(asdict, made)]
    with whole_file(path) as scratch:
        scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return made


def answer_all(
    views: Sequence[Looped],
    tokenizer: TokenizerWrapper,
    study: Study,
    problems: Sequence[ruler.Example],
    results: Results,
    advance: Callable[[int], bool],
) -> bool:
    """Answer what `results` lacks, every setting in turn for each batch.

    Args:
        views: the un-looped one first.
        advance: called with how many answers were added; False: stop here.

    Returns:
        Whether it came to the end.
    """
    ends = set(tokenizer.eos_token_ids)
    for batch in _batches(problems, study.batch_size):
        keys = [{"item": item_name(e.task, e.length, e.index)} for e in batch]
        todo = [view for view in views if not all(results.has(view.loop, key) for key in keys)]
        if not todo:
            continue
        prompts = [study.prompt(tokenizer, e.prompt, e.answer_prefix) for e in batch]
        limit = ruler.TASKS[batch[0].task].max_tokens
        answers = answer_batch(todo, prompts, ends, limit, study.prefill_step_size)
        for number, said, seconds in answers:
            loop, added = todo[number].loop, 0
            for example, key, tokens in zip(batch, keys, said, strict=True):
                if results.has(loop, key):
                    continue
                text = tokenizer.decode(tokens)
                score = ruler.score(example.task, text, example.answers)
                place = {"task": example.task, "length": example.length, "index": example.index}
                results.add(loop, {**key, **place, "answer": text, "score": score})
                added += 1
            _note(results.path.with_name(SECONDS), loop, len(batch), seconds)
            if not advance(added):
                return False
    return True


def item_name(task: str, length: int | None, index: int) -> str:
    """How a problem is called in `results.jsonl`."""
    return f"{task}/{index}" if length is None else f"{task}/{length}/{index}"


def _batches(problems: Sequence[ruler.Example], size: int) -> Iterator[list[ruler.Example]]:
    """Of one task and length each."""
    for _, cell in groupby(problems, key=lambda e: (e.task, e.length)):
        rows = list(cell)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _note(path: Path, loop: Any, answers: int, seconds: float) -> None:
    line = {"loop": loop and loop.to_dict(), "answers": answers, "seconds": round(seconds, 4)}
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
