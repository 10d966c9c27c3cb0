"""The screen of `mlx_loop compare`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.live import Live
from rich.text import Text

from ..errors import UserError
from ..files import whole_file
from ..foreign import foreseen, from_json, lines, path_of, read_text, to_json, visible
from ..generation.conversation import Interrupted
from ..generation.sampling import Sampler
from ..measure.comparison import Answer, compare, distinct
from ..measure.document import markdown, page
from ..measure.provenance import provenance
from ..models.looped import Looped
from ..settings import LoopConfig
from .board import Board, answer_report
from .compare_report import blocks
from .fields import SETTINGS, check_model, check_read, combinations, parse_config, parse_settings
from .options import from_zero, parse_draft, positive, temperature
from .session import PASSES, Command, Row, Session, command, grid, needed, parsed
from .terminal import (
    NowAndThen,
    command_line,
    extra_cost,
    interruptible,
    out,
    prompt_progress,
    tell_of_length,
)

MOST_SETTINGS = 12


@dataclass(frozen=True)
class Asked:
    """How answers are made: arguments of `measure.comparison.compare`."""

    max_tokens: int
    sampler: Sampler
    seed: int | None
    prefill_step_size: int
    draft: Any
    num_draft_tokens: int


@dataclass
class Compare(Session):
    """The settings that are compared, and all answers so far.

    Args:
        title: of the model.
        drafts: what drafts, in words.
        render: the token ids of a prompt.
        start: what a setting is where nothing is said.
        axes: fields of `LoopConfig` and their values, all combined.
        extra: more settings, by the fields in which they differ from `start`.
        as_json: whether answers are printed as JSON.
    """

    title: str
    model: Looped
    tokenizer: TokenizerWrapper
    render: Callable[[str], list[int]]
    asked: Asked
    drafts: str | None
    start: LoopConfig
    axes: dict[str, list[Any]]
    extra: list[dict[str, Any]]
    as_json: bool
    reports: list[dict[str, Any]] = field(default_factory=list)
    _prompt: str | None = None

    name = "compare"
    hints = (
        (
            Text.assemble(("/FIELD", "bold"), " A,B,..."),
            "values to compare, all combined: /" + ", /".join(SETTINGS),
        ),
        ("", Text("as /loops 1,3,6 or /window 3:7,4:8; empty: the preset", "dim")),
        ("", Text("a change answers the last prompt again", "dim")),
        PASSES,
        (
            Text("KL, agreement", "dim"),
            Text(
                "how far predictions are from those without a loop, in nats (0: the same), and "
                "how many name the same token first",
                "dim",
            ),
        ),
    )

    def __post_init__(self) -> None:
        self._first = self.axes, self.extra
        self.views()

    def commands(self) -> Mapping[str, Command]:
        fields = {name: Command(partial(Compare.change, name=name)) for name in SETTINGS}
        return {**super().commands(), **fields}

    def about(self) -> list[Row]:
        title = ("model", Text(visible(self.title), "bold"))
        first, *rest = self._rows()
        return [title, ("compared", *first), *(("", *row) for row in rest)]

    def views(self) -> list[Looped]:
        """What is compared, the un-looped model first.

        Raises:
            UserError: settings that fit neither each other nor the model, or too many.
        """
        loops = combinations(self.start, self.axes) if self.axes else []
        for fields in self.extra:
            loops.append(replace(self.start, **fields))
            check_read(fields, loops[-1:])
        check_model([*self.axes, *(name for fields in self.extra for name in fields)], self.model)
        views = distinct(self.model, loops)
        if len(views) > MOST_SETTINGS:
            raise UserError(f"that makes {len(views)} settings; {MOST_SETTINGS} are the most")
        return views

    def answer(self, text: str) -> bool:
        """Show what all settings make of a prompt; False: it was stopped."""
        self._prompt, asked, views = text, self.asked, self.views()
        tokens = self.render(text)
        tell_of_length(self.model, len(tokens))
        if asked.seed is None and asked.sampler.temp:
            asked = replace(asked, seed=random.randrange(2**31))
        draws = out.can_redraw and not self.as_json
        answers: list[Answer] = []
        live: Live | None = None
        now_and_then = NowAndThen()
        with ExitStack() as stack:
            stop = stack.enter_context(interruptible())
            progress = stack.enter_context(prompt_progress(asked.prefill_step_size, stop))
            stream = compare(views, self.tokenizer, tokens, progress=progress, **vars(asked))
            try:
                for answers in stream:
                    if live is None and draws:
                        # A screen of its own survives whatever happens to the terminal's size.
                        # Before it starts: a signal may come while it does.
                        stack.callback(out.show_cursor)
                        stack.callback(out.set_alt_screen, False)
                        live = stack.enter_context(
                            Live(console=out, screen=True, auto_refresh=False)
                        )
                    if live:
                        now_and_then(partial(live.update, Board(answers), refresh=True))
                    if stop.is_set():
                        stream.close()
            except Interrupted:
                pass
        report = {
            "model": self.title,
            "prompt": text,
            "max_tokens": asked.max_tokens,
            "temp": asked.sampler.temp,
            "seed": asked.seed,
            "draft": self.drafts,
            "stopped": stop.is_set(),
            "answers": [answer_report(answer, answers[0]) for answer in answers],
            "made": provenance(command_line()),
        }
        self.reports.append(report)
        if self.as_json:
            print(to_json(report))
        elif out.is_terminal:
            out.print(Board(answers) if answers else "")
        else:
            out.print(Board(answers).plain(), soft_wrap=True)
        if stop.is_set() and not self.as_json:
            out.print("stopped", style="yellow")
        return not stop.is_set()

    # --- Commands ---

    @command("", "what is compared")
    def settings(self, _: str) -> None:
        self._show_settings()

    @command("FIELD=VALUE ...", "compare one more setting")
    def add(self, argument: str) -> None:
        fields = parse_config(needed(argument, "/add loops=6 beta=0.3"))
        self._try(self.axes, [*self.extra, fields])

    @command("", "compare what the command line said")
    def reset(self, _: str) -> None:
        self._try(*self._first)

    @command("N", "the most tokens of an answer")
    def max_tokens(self, argument: str) -> None:
        self._ask(max_tokens=parsed(positive, argument, "/max-tokens 100"))

    @command("T", "sampling temperature; 0: greedy")
    def temp(self, argument: str) -> None:
        heat = parsed(temperature, argument, "/temp 0.7")
        self._ask(sampler=replace(self.asked.sampler, temp=heat))

    @command("N", "of the random numbers, the same for all settings")
    def seed(self, argument: str) -> None:
        self._ask(seed=parsed(from_zero, argument, "/seed 1"))

    @command("self | lookup | off", "same answers, sooner: what drafts")
    def draft(self, argument: str) -> None:
        self.drafts = parse_draft(argument)
        self._ask(draft=self.drafts)

    @command("", "repeat the last prompt")
    def again(self, _: str) -> None:
        if self._prompt is None:
            raise UserError("there is no prompt yet: type one first")
        self.answer(self._prompt)

    # What it is called in a chat.
    retry = Command(again.run)

    @command("FILE", "answer each line of a file")
    def prompts(self, argument: str) -> None:
        path = path_of(needed(argument, "/prompts questions.txt"))
        for prompt in read_prompts(path):
            out.print(prompt, style="green")
            if not self.answer(prompt):
                break

    @command("FILE", "write the session: as JSON, or .html or .md to read")
    def save(self, argument: str) -> None:
        path = path_of(needed(argument, "/save session.json, session.html or session.md"))
        if path.suffix == ".md":
            text = markdown(blocks(self.reports))
        elif path.suffix == ".html":
            text = page(f"{self.title}: what loops change", blocks(self.reports))
        else:
            text = to_json(self.reports, indent=2) + "\n"
        with whole_file(path) as file:
            file.write_bytes(text.encode())
        out.print(f"{len(self.reports)} prompts saved to {path}", style="dim")

    def change(self, text: str, name: str) -> None:
        """`/FIELD A,B,...`: other values of a field; none: the preset's."""
        axes = {key: values for key, values in self.axes.items() if key != name or text}
        self._try(axes | ({name: parse_settings(name, text)} if text else {}), self.extra)

    def _ask(self, **changes: Any) -> None:
        self.asked = replace(self.asked, **changes)
        self._show()

    def _try(self, axes: dict[str, list[Any]], extra: list[dict[str, Any]]) -> None:
        """Change what is compared, unless it is not valid, and show the effect."""
        before = self.axes, self.extra
        self.axes, self.extra = axes, extra
        try:
            self.views()
        except UserError:
            self.axes, self.extra = before
            raise
        self._show()

    def _show(self) -> None:
        if self._prompt is None or not out.is_terminal:
            self._show_settings()
        else:
            self.answer(self._prompt)

    def _show_settings(self) -> None:
        out.print(grid(self._rows()))

    def _rows(self) -> list[Row]:
        return [
            ("no loop", "") if view.is_unlooped else (str(view.loop), Text(extra_cost(view), "dim"))
            for view in self.views()
        ]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or of .jsonl the user's last message in each object.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    prompts = [line.strip() for line in lines(read_text(path)) if line.strip()]
    if path.suffix == ".jsonl":
        with foreseen(f"cannot read prompts from {path}"):
            prompts = [from_json(p, "a line")["messages"][-1]["content"] for p in prompts]
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise TypeError("a message is no text")
    if not prompts:
        raise UserError(f"{path} has no prompts in it: write one to a line")
    return prompts
