"""Many loop settings on the same items, resumable, with honest statistics.

Every result is a line of JSON, appended as it comes; what a file holds already is not done again.
The un-looped model is always among the settings, and every other one is compared with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import batch_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError
from ..generation.generate import generate
from ..generation.prompt import encode, render
from ..method.loop import layer_passes
from ..models.looped import Looped
from ..models.together import logits, states
from ..settings import LoopConfig
from .comparison import CHUNK, kl
from .significance import LEVEL, bootstrap_mean, holm, signed_rank_p, wilson

QUESTIONS = Path(__file__).parents[1] / "demo" / "questions.jsonl"
# Tokens of a text that are read at a time; each such piece is an item.
PIECE = 512

Row = dict[str, Any]
# Results that come at the same time, each with the number of its view.
Found = list[tuple[int, Row]]


# --- What is measured -----------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Questions with expected answers, answered greedily; the score of an item is 0 or 1.

    Args:
        items: number in the file, messages, answer and skill.
        batch: questions that are answered at a time.
    """

    items: list[Row]
    max_tokens: int
    template: dict[str, Any]
    system: str | None = None
    batch: int = 32

    score = "right"
    better = 1

    def rows(
        self, views: Sequence[Looped], tokenizer: TokenizerWrapper, todo: Sequence[Sequence[Row]]
    ) -> Iterator[Found]:
        """Results as they come; `todo` holds the items of each view."""
        for number, (view, items) in enumerate(zip(views, todo, strict=True)):
            prompts = [
                render(tokenizer, item["messages"], self.system, self.template) for item in items
            ]
            texts = self._answers(view, tokenizer, prompts)
            yield [
                (number, {"item": item["item"], "right": int(is_right(item, text)), "text": text})
                for item, text in zip(items, texts, strict=True)
            ]

    def _answers(
        self, view: Looped, tokenizer: TokenizerWrapper, prompts: list[list[int]]
    ) -> list[str]:
        if not prompts:
            return []
        if view.loop is None or view.loop.decode == "full":
            texts = batch_generate(view, tokenizer, prompts, max_tokens=self.max_tokens).texts
            mx.clear_cache()
            return texts
        # Where only part of the tokens loop, a batch would mix rows in different phases.
        return [generate(view, tokenizer, p, max_tokens=self.max_tokens) for p in prompts]


@dataclass(frozen=True)
class Text:
    """A text in pieces; of each the mean loss and the KL to the un-looped model, in nats.

    Args:
        items: number of the piece and its tokens.
    """

    items: list[Row]
    batch: int = 1

    score = "loss"
    better = -1

    def rows(
        self, views: Sequence[Looped], tokenizer: TokenizerWrapper, todo: Sequence[Sequence[Row]]
    ) -> Iterator[Found]:
        """As `Task.rows`. Layers below the windows are computed once for all views."""
        for item in {item["item"]: item for items in todo for item in items}.values():
            wanted = [i for i, items in enumerate(todo) if item in items]
            used = sorted({0, *wanted})
            tokens = mx.array(item["tokens"])[None]
            found = states([views[i] for i in used], tokens)
            yield [
                (i, {"item": item["item"], **_loss(views[0], state, found[0], tokens)})
                for i, state in zip(used, found, strict=True)
                if i in wanted
            ]


def _loss(model: Looped, state: mx.array, base: mx.array, tokens: mx.array) -> Row:
    """Mean loss of the tokens after the first, and mean KL(base || state)."""
    losses, divergences = [], []
    for start in range(0, tokens.shape[1] - 1, CHUNK):
        stop = min(start + CHUNK, tokens.shape[1] - 1)
        found, plain = (logits(model, x[..., start:stop, :]) for x in (state, base))
        wide = found.astype(mx.float32)
        target = tokens[:, start + 1 : stop + 1, None]
        chosen = mx.take_along_axis(wide, target, axis=-1)[..., 0]
        losses.append(mx.logsumexp(wide, axis=-1) - chosen)
        divergences.append(kl(plain, found))
        mx.eval(losses[-1], divergences[-1])
    loss, divergence = (float(mx.concatenate(x, axis=1).mean()) for x in (losses, divergences))
    return {"loss": loss, "kl": divergence}


def is_right(question: Row, text: str) -> bool:
    """Exact match; an answer of the skill `fallback` needs only to begin as expected."""
    said = text.strip()
    if question.get("skill") == "fallback":
        return said.startswith(question["answer"])
    return said == question["answer"]


def read_task(path: Path, limit: int | None) -> list[Row]:
    """Questions of a file like mlx_loop/demo/questions.jsonl, `limit` of them evenly spread.

    Raises:
        UserError: it cannot be read, or a line is not of that form.
    """
    items = []
    for number, line in enumerate(_read(path).splitlines()):
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
    return _spread(items, limit, path)


def read_text(path: Path, tokenizer: TokenizerWrapper, limit: int | None) -> list[Row]:
    """A text in pieces of 512 tokens, `limit` of them evenly spread.

    Raises:
        UserError: it cannot be read, or is shorter than two tokens.
    """
    tokens = encode(tokenizer, _read(path))
    pieces = [tokens[i : i + PIECE] for i in range(0, len(tokens), PIECE)]
    items = [{"item": i, "tokens": piece} for i, piece in enumerate(pieces) if len(piece) > 1]
    return _spread(items, limit, path)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _spread(items: list[Row], limit: int | None, path: Path) -> list[Row]:
    if not items:
        raise UserError(f"{path} has nothing in it to measure")
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


# --- The file of results --------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """A file of results: a line that says what was measured, then a line for each result."""

    path: Path
    rows: dict[tuple[str, int], Row]

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
            if not whole:
                if text:
                    raise UserError(f"{path} holds no results: give --out another name")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(header) + "\n")
                return cls(path, {})
            try:
                first, *lines = map(json.loads, whole.splitlines())
                rows = {(_key(line["loop"]), line["item"]): line for line in lines}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} holds no results: give --out another name") from error
            if first != header:
                differing = [name for name in header if first.get(name) != header[name]]
                raise UserError(
                    f"{path} holds results of another {' and '.join(differing) or 'kind'}: "
                    "give --out another name"
                )
            if len(whole) < len(text):
                path.write_text(whole)
            return cls(path, rows)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def add(self, loop: LoopConfig | None, row: Row) -> None:
        """Append one result."""
        line = {"loop": None if loop is None else loop.to_dict(), **row}
        self.rows[_key(line["loop"]), row["item"]] = line
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}") from error

    def has(self, loop: LoopConfig | None, item: Row) -> bool:
        return (_key(loop), item["item"]) in self.rows

    def of(self, loop: LoopConfig | None, item: Row) -> Row:
        return self.rows[_key(loop), item["item"]]


def _key(loop: LoopConfig | Row | None) -> str:
    values = loop.to_dict() if isinstance(loop, LoopConfig) else loop
    return json.dumps(values, sort_keys=True)


def fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(_read(path).encode()).hexdigest()


def sweep(
    views: Sequence[Looped],
    tokenizer: TokenizerWrapper,
    work: Task | Text,
    results: Results,
    advance: Callable[[int], bool],
) -> bool:
    """Measure what `results` lacks, batch by batch, every setting in turn.

    Args:
        views: the un-looped one first.
        advance: called with how many results were added; False: stop here.

    Returns:
        Whether it came to the end.
    """
    for start in range(0, len(work.items), work.batch):
        items = work.items[start : start + work.batch]
        todo = [[item for item in items if not results.has(view.loop, item)] for view in views]
        for found in work.rows(views, tokenizer, todo):
            for number, row in found:
                results.add(views[number].loop, row)
            if not advance(len(found)):
                return False
    return True


# --- What it says ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One setting over all items, and against the un-looped model.

    Args:
        loop: complete settings; None: the un-looped model.
        cost: layer passes of a looped token over the plain model's, less 1.
        mean, interval: of the score: share of right answers, or loss in nats per token.
        change, change_interval: against the un-looped model, item by item; the paired bootstrap.
        p: of the paired test, corrected by Holm for the number of settings.
        kl: mean KL to the un-looped model; None: not measured.
    """

    loop: LoopConfig | None
    cost: float
    mean: float
    interval: tuple[float, float]
    change: float = 0.0
    change_interval: tuple[float, float] = (0.0, 0.0)
    p: float = 1.0
    kl: float | None = None

    @property
    def is_distinguishable(self) -> bool:
        return self.p < LEVEL


def complete(views: Sequence[Looped], work: Task | Text, results: Results) -> list[Row]:
    """The items that have a result of every setting."""
    return [i for i in work.items if all(results.has(view.loop, i) for view in views)]


def summarise(views: Sequence[Looped], work: Task | Text, results: Results) -> list[Summary]:
    """Each setting over the complete items, of which there are some; the un-looped model first."""
    items = complete(views, work, results)
    is_task = isinstance(work, Task)
    layers = len(views[0].layers)
    base = [results.of(None, item)[work.score] for item in items]
    found, tests = [], []
    for view in views:
        rows = [results.of(view.loop, item) for item in items]
        scores = [row[work.score] for row in rows]
        differences = [a - b for a, b in zip(scores, base, strict=True)]
        count = len(items)
        found.append(
            Summary(
                view.loop,
                layer_passes(view.loop, layers) / layers - 1,
                sum(scores) / count,
                wilson(sum(scores), count) if is_task else bootstrap_mean(scores),
                sum(differences) / count,
                bootstrap_mean(differences),
                kl=None if is_task else sum(row["kl"] for row in rows) / count,
            )
        )
        tests.append(signed_rank_p(differences))
    corrected = [1.0, *holm(tests[1:])]
    return [replace(summary, p=p) for summary, p in zip(found, corrected, strict=True)]


def best(summaries: Sequence[Summary], better: int) -> Summary | None:
    """The setting with the best mean of those distinguishably better than no looping, if any."""
    won = [s for s in summaries if s.is_distinguishable and better * s.change > 0]
    return max(won, key=lambda s: better * s.mean, default=None)


def conclusion(summaries: Sequence[Summary], better: int, count: int) -> str:
    """What may be said, in a sentence or two."""
    others = summaries[1:]
    told = [s for s in others if s.is_distinguishable]
    corrected = f", Holm's correction for {len(others)} settings" if len(others) > 1 else ""
    what = f"{count} items, paired test{corrected}, 5 %"
    if not told:
        return f"No setting is distinguishable from no looping ({what})."
    good = sum(better * s.change > 0 for s in told)
    parts = [
        f"{n} of {len(others)} settings {'is' if n == 1 else 'are'} {word} than no looping"
        for n, word in ((good, "better"), (len(told) - good, "worse"))
        if n
    ]
    text = f"{' and '.join(parts)} ({what})."
    if good:
        text += " The best of many looks better than it is: confirm it on other items."
    else:
        text += " No setting is better."
    return text
