"""RULER's synthetic long-context tasks, generated offline for any tokenizer and length.

Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, 2024
(arXiv 2404.06654). Structure, counts, depths, answer formats, token budgets and metrics are those
of the published configuration; wording and filler text are our own, so scores are not comparable
with published ones digit by digit (lm-evaluation-harness has the published wording). Three things
are stricter here: keys and variables are always different from each other, an example depends on
(seed, task, length, index) alone, and prompts are filled up to the last few tokens.
"""

from __future__ import annotations

import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, cycle, groupby, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import UserError
from ...foreign import from_json, lines, read_text
from ...generation.prefill import PREFILL_STEP
from ...generation.prompt import render
from ..results import Row
from .task import Answers

DATA = Path(__file__).parent
SEED = 42  # the published one
EXAMPLES = 500  # published, per task and length
DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent: where a needle may lie in prose
SLACK = 0.005  # of the length: an example that leaves no more than this unused is full
NOISE = (
    "Snow fell on the hills. The shop was closed. Someone was singing. The road was long. "
    "The lights went out."
)
SHORT = 4096  # below this length the published common-words task takes smaller counts
UNITS_AT_FIRST = 64  # a first guess, from which the size of a unit is measured


@dataclass(frozen=True)
class Kind:
    """A task of the published configuration.

    Attributes:
        kind: which generator makes it.
        max_tokens: of the answer; they count towards the context length.
        any_answer: whether one of the reference answers suffices (`string_match_part`), or the
            score is the share of them that is found (`string_match_all`).
        options: keyword arguments of the generator.
    """

    kind: str
    max_tokens: int
    any_answer: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _needles(**options: Any) -> Kind:
    return Kind("needles", 128, options=options)


TASKS: dict[str, Kind] = {
    "niah_single_1": _needles(haystack="noise"),
    "niah_single_2": _needles(haystack="prose"),
    "niah_single_3": _needles(haystack="prose", values_are="uuid"),
    "niah_multikey_1": _needles(haystack="prose", keys=4),
    "niah_multikey_2": _needles(haystack="needles"),
    "niah_multikey_3": _needles(haystack="needles", keys_are="uuid", values_are="uuid"),
    "niah_multivalue": _needles(haystack="prose", values=4),
    "niah_multiquery": _needles(haystack="prose", keys=4, queries=4),
    "vt": Kind("chain", 30, options={"hops": 4}),
    "cwe": Kind("common_words", 120, options={"common": 10}),
    "fwe": Kind("frequent_words", 50, options={"asked": 3}),
    "qa": Kind("documents", 32, any_answer=True),
}


@dataclass(frozen=True)
class Example:
    """One problem.

    Attributes:
        length: tokens asked for, of the prompt and the longest answer together.
        prompt: what the user says.
        answer_prefix: how the answer begins; given to the model where the study says so.
        answers: what is looked for in the answer.
        depths: per cent of the text at which each needle or assignment lies.
        tokens: of the whole prompt, chat template and answer prefix included.
    """

    task: str
    length: int
    index: int
    prompt: str
    answer_prefix: str
    answers: list[str]
    depths: list[float]
    tokens: int


@dataclass(frozen=True)
class Ruler(Answers):
    """Problems of `example`, the same ones for every setting.

    Args:
        problems: those of a task and length one after the other, of which batches are made.
        answer_prefix: whether the model is given the beginning of its answer, as published.
        template: more arguments for the chat template.
    """

    problems: Sequence[Example]
    answer_prefix: bool = True
    system: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 8
    step: int = PREFILL_STEP

    def of(self, problems: Sequence[Example]) -> Ruler:
        """Other problems, asked in the same way."""
        return replace(self, problems=problems)

    @cached_property
    def items(self) -> Sequence[Row]:  # type: ignore[override]
        return [
            {
                "item": f"{example.task}/{example.length}/{example.index}",
                **{name: getattr(example, name) for name in ("task", "length", "index")},
                "example": example,
            }
            for example in self.problems
        ]

    def batches(self) -> Iterator[Sequence[Row]]:
        for _, cell in groupby(self.items, key=lambda item: (item["task"], item["length"])):
            items = list(cell)
            for start in range(0, len(items), self.batch):
                yield items[start : start + self.batch]

    def tokens(self, tokenizer: TokenizerWrapper, text: str, answer_prefix: str) -> list[int]:
        """Token ids of a problem."""
        prefix = answer_prefix if self.answer_prefix else ""
        message = {"role": "user", "content": text}
        return render(tokenizer, [message], self.system, self.template, prefix)

    def prompt(self, tokenizer: TokenizerWrapper, item: Row) -> list[int]:
        return self.tokens(tokenizer, item["example"].prompt, item["example"].answer_prefix)

    def length(self, tokenizer: TokenizerWrapper, item: Row) -> int:
        return item["example"].tokens

    def longest(self, item: Row) -> int:
        return TASKS[item["task"]].max_tokens

    def judge(self, item: Row, text: str) -> Row:
        return {"answer": text, "score": score(item["task"], text, item["example"].answers)}


class Sketch(NamedTuple):
    """An example before its size is known."""

    prompt: str
    answer_prefix: str
    answers: list[str]
    depths: Sequence[float] = ()


# A draft of any size: its argument is the number of filler words, list entries, ...
Build = Callable[[int], Sketch]


@dataclass
class Sources:
    """Where filler and documents come from.

    Args:
        filler: a text file to take the prose from; it is repeated where it is too short. None:
            sentences of our own, which do not repeat.
        documents: a JSON Lines file of `{"question", "answers", "documents"}` for the task `qa`;
            the documents of the other questions distract.
    """

    filler: Path | None = None
    documents: Path | None = None
    _prose: list[str] = field(default_factory=list, init=False, repr=False)
    _stream: Iterator[str] | None = field(default=None, init=False, repr=False)
    _questions: list[dict[str, Any]] | None = field(default=None, init=False, repr=False)

    def prose(self, words: int) -> list[str]:
        """The first words of the filler text, the same for every example."""
        if self._stream is None:
            self._stream = _own_prose() if self.filler is None else cycle(_words_of(self.filler))
        self._prose += islice(self._stream, max(0, words - len(self._prose)))
        return self._prose[:words]

    def questions(self) -> list[dict[str, Any]]:
        """What `documents` holds.

        Raises:
            UserError: there is none, or it is not as described.
        """
        if self.documents is None:
            raise UserError(
                "the task qa asks about documents of yours: give --documents FILE, lines of "
                '{"question": ..., "answers": [...], "documents": [...]}'
            )
        if self._questions is None:
            self._questions = _read_questions(self.documents)
        return self._questions


# --- Examples of the right size ---


def example(
    name: str,
    length: int,
    index: int,
    size: Callable[[str, str], int],
    sources: Sources,
    seed: int = SEED,
) -> Example:
    """Problem number `index` of a task, at most `length` tokens long and hardly shorter.

    Args:
        length: tokens of the prompt and the longest answer together.
        size: tokens of a prompt and its answer prefix.

    Raises:
        UserError: `length` is too short for the task, or the documents do not fill it.
    """
    task = TASKS[name]
    rng = random.Random(f"{seed} {name} {length} {index}")
    build = GENERATORS[task.kind](rng, length, index, sources, **task.options)
    draft, tokens = _fit(
        lambda n: (draft := build(n), size(draft.prompt, draft.answer_prefix)),
        length - task.max_tokens,
        round(SLACK * length),
        f"{name} at {length} tokens",
    )
    return Example(
        name,
        length,
        index,
        draft.prompt,
        draft.answer_prefix,
        draft.answers,
        [round(depth, 1) for depth in draft.depths],
        tokens,
    )


def _fit(
    build: Callable[[int], tuple[Sketch, int]], budget: int, slack: int, what: str
) -> tuple[Sketch, int]:
    """The largest draft within `budget` tokens, or one at most `slack` below it."""
    best = build(0)
    if best[1] > budget:
        raise UserError(
            f"{what}: the shortest prompt takes {best[1]} tokens and {max(0, budget)} are left "
            "beside the answer: ask for greater lengths"
        )
    empty = best[1]
    low, high, units = 0, None, UNITS_AT_FIRST
    for turn in count():
        draft = build(units)
        if draft[1] <= budget:
            low, best = units, draft
            if budget - draft[1] <= slack:
                break
        else:
            high = units
        if high is not None and high - low <= 1:
            break
        # Tokens grow almost evenly with the units, so a guess from the rate lands close.
        rate = max((best[1] - empty) / low if low else (draft[1] - empty) / units, 0.05)
        guess = low + max(1, int((budget - best[1]) / rate))
        if high is not None and (guess >= high or turn % 3 == 2):
            guess = (low + high) // 2
        units = max(low + 1, guess)
    return best


# --- Needles in a haystack ---

KINDS = {"number": "numbers", "uuid": "identifiers"}


def _one(kind: str) -> str:
    return {"number": "number", "uuid": "identifier"}[kind]


def needle(key: str, kind: str, value: str) -> str:
    """The sentence that hides a value."""
    return f"Remember that the {key} key has the {_one(kind)} {value}."


def _needles_task(
    rng: random.Random,
    length: int,
    index: int,
    sources: Sources,
    haystack: str,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    keys_are: str = "word",
    values_are: str = "number",
) -> Build:
    """Some keys have values; some of the keys are asked for.

    Args:
        haystack: between what they are hidden: `noise` (a few sentences over and over), `prose`,
            or `needles` (more keys with values, which nobody asks for).
        keys, values, queries: how many keys, values of each, and keys that are asked for.
        keys_are, values_are: word, number or uuid.
    """
    used: set[str] = set()
    hidden = {_new(rng, keys_are, used): _several(rng, values_are, values) for _ in range(keys)}
    said = [needle(key, values_are, value) for key, found in hidden.items() for value in found]
    rng.shuffle(said)
    asked = rng.sample(list(hidden), queries)
    answers = [value for key in asked for value in hidden[key]]
    if haystack == "prose":
        depths: list[float] = sorted(map(float, rng.sample(DEPTHS, len(said))))
    else:
        depths = sorted(100 * rng.random() for _ in said)
    distracting = _distractors(random.Random(rng.random()), keys_are, values_are, used)
    lines: list[str] = []

    names = asked[0] if queries == 1 else ", ".join(asked[:-1]) + f" and {asked[-1]}"
    plural = len(answers) > 1
    kind = KINDS[values_are] if plural else _one(values_are)
    key = "key has" if queries == 1 else "keys have"
    intro = f"Remember the {kind} in this text."
    question = (
        f"What are all the {kind} that the {names} {key}?"
        if plural
        else f"What {kind} does the {names} key have?"
    )

    def build(words: int) -> Sketch:
        if haystack == "prose":
            parts, gap = sentences(sources.prose(words)), " "
        elif haystack == "noise":
            parts, gap = _repeated(NOISE, words), "\n"
        else:
            per_line = needle("a", values_are, "1").count(" ") + 1
            lines.extend(islice(distracting, max(0, words // per_line - len(lines))))
            parts, gap = lines[: words // per_line], "\n"
            if words % per_line:
                parts = [*parts, " ".join(sources.prose(words % per_line))]
        return Sketch(
            f"{intro}\n{gap.join(insert(parts, said, depths))}\n{question}",
            f"The {names} {key} the {kind}",
            answers,
            depths,
        )

    return build


def insert(parts: Sequence[str], statements: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The statements among the parts, each at its depth in per cent; depths ascend."""
    out, start = [], 0
    for statement, depth in zip(statements, depths, strict=True):
        stop = int(len(parts) * depth / 100)
        out += [*parts[start:stop], statement]
        start = stop
    return out + list(parts[start:])


def _new(rng: random.Random, kind: str, used: set[str]) -> str:
    """A word pair, number or uuid that is not in `used`, and is from now on."""
    while True:
        if kind == "word":
            made = f"{rng.choice(WORDS['adjectives'])}-{rng.choice(WORDS['nouns'])}"
        elif kind == "number":
            made = str(rng.randint(1_000_000, 9_999_999))
        else:
            made = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if made not in used:
            used.add(made)
            return made


def _words(rng: random.Random, letters: str, length: int, n: int) -> list[str]:
    """Different invented words."""
    made: dict[str, None] = {}
    while len(made) < n:
        made["".join(rng.choices(letters, k=length))] = None
    return list(made)


def _several(rng: random.Random, kind: str, n: int) -> list[str]:
    used: set[str] = set()
    return [_new(rng, kind, used) for _ in range(n)]


def _distractors(rng: random.Random, keys: str, values: str, used: set[str]) -> Iterator[str]:
    """Needles with other keys, without end.

    `used` would fill up: more than half of all word pairs are never taken.
    """
    taken = set(used)
    while True:
        if keys == "word" and len(taken) > len(WORDS["adjectives"]) * len(WORDS["nouns"]) // 2:
            taken = set(used)
        yield needle(_new(rng, keys, taken), values, _new(rng, values, set()))


# --- A chain of variables ---


def _chain_task(rng: random.Random, length: int, index: int, sources: Sources, hops: int) -> Build:
    """A variable is set to a number, the next to that variable, and so on; all are asked for.

    A small worked example comes first.
    """
    solved = _chain(rng, hops, letters=3)(len(NOISE.split()) * 2)
    shown = f"{solved.prompt}\n{solved.answer_prefix} {' '.join(solved.answers)}\n\n"
    build = _chain(rng, hops, letters=5)

    def with_example(words: int) -> Sketch:
        draft = build(words)
        return draft._replace(prompt=shown + draft.prompt)

    return with_example


def _chain(rng: random.Random, hops: int, letters: int) -> Build:
    names = _words(rng, string.ascii_uppercase, letters, hops + 1)
    value = str(rng.randint(10_000, 99_999))
    said = [f"VAR {names[0]} = {value}."]
    said += [f"VAR {after} = VAR {before}." for before, after in pairwise(names)]
    depths = sorted(100 * rng.random() for _ in said)

    def build(words: int) -> Sketch:
        parts = [part for line in _repeated(NOISE, words) for part in sentences(line.split())]
        return Sketch(
            "Follow the variables in this text: each is set to a number or to another variable.\n"
            f"{' '.join(insert(parts, said, depths))}\n"
            f"Question: which variables have the value {value}? Name all of them.",
            f"Answer: the {len(names)} variables with the value {value} are:",
            names,
            depths,
        )

    return build


# --- Counting words ---


def _common_words_task(
    rng: random.Random, length: int, index: int, sources: Sources, common: int
) -> Build:
    """A numbered list in which a few words come up often and all others seldom.

    A worked example comes first. Its size and how often words come up are the published ones,
    which depend on the length.
    """
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    example_words, example_often, example_seldom = (20, 3, 1) if length < SHORT else (40, 10, 3)
    vocabulary = _vocabulary(random.Random(rng.random()))
    shown_words = list(islice(vocabulary, example_words))
    frequent = list(islice(vocabulary, common))
    rare: list[str] = []
    order = rng.random()

    shown = _word_list(
        shown_words[:common] * example_often + shown_words[common:] * example_seldom,
        common,
        random.Random(order),
    )
    solved = " ".join(f"{i}. {word}" for i, word in enumerate(shown_words[:common], 1))

    def build(entries: int) -> Sketch:
        rare.extend(islice(vocabulary, max(0, -(-entries // seldom) - len(rare))))
        listed = [word for word in rare for _ in range(seldom)][:entries]
        prefix = f"Answer: the {common} words that come up most often are:"
        asked = _word_list(frequent * often + listed, common, random.Random(order))
        return Sketch(f"{shown}\n{prefix} {solved}\n\n{asked}", prefix, frequent)

    return build


def _word_list(words: list[str], common: int, rng: random.Random) -> str:
    rng.shuffle(words)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    return (
        "Here is a numbered list of words. Some of them come up more often than the others; "
        f"remember those.\n{listed}\n"
        f"Question: which {common} words come up most often in the list?"
    )


def _vocabulary(rng: random.Random) -> Iterator[str]:
    """Different words without end: our list in random order, then invented ones."""
    listed = sorted({word for words in WORDS.values() for word in words})
    rng.shuffle(listed)
    yield from listed
    seen = set(listed)
    while True:
        pairs = rng.choices(CONSONANTS, k=3), rng.choices("aeiou", k=3)
        word = "".join(a + b for a, b in zip(*pairs, strict=True)) + rng.choice(CONSONANTS)
        if word not in seen:
            seen.add(word)
            yield word


CONSONANTS = "bdfgklmnprstvz"


def _frequent_words_task(
    rng: random.Random, length: int, index: int, sources: Sources, asked: int
) -> Build:
    """A text of invented words whose frequencies fall as 1 / rank^2; the most frequent is noise."""
    words = _words(rng, string.ascii_lowercase, 6, max(asked + 2, length // 50))
    words[0] = "..."
    zeta = math.pi**2 / 6
    order = rng.random()

    def build(total: int) -> Sketch:
        text = [
            word for rank, word in enumerate(words, 1) for _ in range(int(total / (zeta * rank**2)))
        ]
        random.Random(order).shuffle(text)
        return Sketch(
            "Count how often each word comes up in this coded text, and leave out the dots.\n"
            f"{' '.join(text)}\n"
            f"Question: which {asked} words come up most often? Give only the words.",
            f"Answer: the {asked} words that come up most often are:",
            words[1 : asked + 1],
        )

    return build


# --- Questions about documents ---


def _documents_task(rng: random.Random, length: int, index: int, sources: Sources) -> Build:
    """The question's own documents among others, in random order."""
    questions = sources.questions()
    asked = questions[index % len(questions)]
    others = [
        document
        for question in questions
        for document in question["documents"]
        if document not in asked["documents"]
    ]
    others = list(dict.fromkeys(others))
    rng.shuffle(others)
    available = sum(len(document.split()) for document in others)
    order = rng.random()

    def build(words: int) -> Sketch:
        if words > available + UNITS_AT_FIRST:
            raise UserError(
                f"the documents of {sources.documents} do not fill {length} tokens: give more of "
                "them, or ask for smaller lengths"
            )
        distracting, left = [], words
        for document in others:
            if left <= 0:
                break
            split = document.split()
            distracting.append(document if len(split) <= left else " ".join(split[:left]))
            left -= len(split)
        documents = [*asked["documents"], *distracting]
        random.Random(order).shuffle(documents)
        listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        task = "Answer the question from the documents, in as few words as you can."
        return Sketch(
            f"{task}\n\n{listed}\n\n{task}\n\nQuestion: {asked['question']}",
            "Answer:",
            asked["answers"],
        )

    return build


def _read_questions(path: Path) -> list[dict[str, Any]]:
    questions = []
    for number, line in enumerate(lines(read_text(path)), 1):
        try:
            question = from_json(line, "")
            lists = [question["answers"], question["documents"]]
            texts = [question["question"], *lists[0], *lists[1]]
            ok = all(isinstance(of, list) and of for of in lists)
            ok = ok and all(isinstance(text, str) for text in texts) and all(texts[1:])
        except (ValueError, KeyError, TypeError):
            ok = False
        if not ok:
            raise UserError(
                f'{path}, line {number}: expected {{"question": TEXT, "answers": [TEXT, ...], '
                '"documents": [TEXT, ...]}'
            )
        questions.append(question)
    if not questions:
        raise UserError(f"{path} is empty: it needs a question on each line")
    return questions


GENERATORS: dict[str, Callable[..., Build]] = {
    "needles": _needles_task,
    "chain": _chain_task,
    "common_words": _common_words_task,
    "frequent_words": _frequent_words_task,
    "documents": _documents_task,
}

# --- Text ---

WORDS: dict[str, list[str]] = {
    kind: words.split() for kind, words in json.loads((DATA / "words.json").read_text()).items()
}


def _own_prose() -> Iterator[str]:
    """Words of our sentences, without end."""
    patterns = (DATA / "prose.txt").read_text().splitlines()
    rng = random.Random("prose")
    while True:
        for pattern in rng.sample(patterns, len(patterns)):
            yield from re.sub(
                r"\{(\w+)\}", lambda slot: rng.choice(WORDS[slot[1] + "s"]), pattern
            ).split()


def _words_of(path: Path) -> list[str]:
    words = read_text(path).split()
    if not words:
        raise UserError(f"the filler text {path} is empty")
    return words


def sentences(words: Sequence[str]) -> list[str]:
    """Sentences of a text that is given as words; where it breaks off, there is a full stop."""
    out, start = [], 0
    for i, word in enumerate(words, 1):
        if word.endswith((".", "!", "?")):
            out.append(" ".join(words[start:i]))
            start = i
    rest = " ".join(words[start:]).rstrip(",;:")
    return out + ([f"{rest}."] if rest else [])


def _repeated(text: str, words: int) -> list[str]:
    """A text over and over, cut after so many words."""
    split = text.split()
    whole, rest = divmod(words, len(split))
    return [text] * whole + ([" ".join(split[:rest])] if rest else [])


# --- Metrics ---


def score(task: str, answer: str, references: Sequence[str]) -> float:
    """RULER's metric of the task, 0 to 1: is what is looked for in the answer, case aside?

    The share of the references that is found (string_match_all), or for `qa` whether one of them
    is (string_match_part). Control characters of the answer become line breaks first.
    """
    said = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    found = [reference.lower() in said for reference in references]
    return float(any(found)) if TASKS[task].any_answer else sum(found) / len(found)
