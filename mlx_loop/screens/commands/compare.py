"""`mlx_loop compare`: what several loop settings make of a prompt, side by side."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ...errors import INTERRUPTED, USER_ERROR, UserError
from ...files import whole_file
from ...generation.conversation import Interrupted
from ...generation.prefill import prefill_step
from ...measure.comparison import Answer, compare, distinct
from ...measure.names import names
from ...method.loop import layer_passes
from ...models.looped import Looped
from ...settings import LoopConfig
from ..board import Board, notes
from ..options import (
    SETTINGS,
    axes_from,
    combinations,
    draft_from,
    from_zero,
    load_with_start,
    parse_config,
    parse_draft,
    parse_settings,
    positive,
    sampler_from,
    temperature,
)
from ..prompt_line import needed, piped_lines, typed_lines
from ..terminal import err, extra_cost, interruptible, is_interactive, out, prompt_progress
from .generate import read_prompt, render_prompt

DEFAULT_LOOPS = [2, 3, 6]
MOST_SETTINGS = 12
SECONDS_BETWEEN_PICTURES = 0.1


def run(args: argparse.Namespace) -> int:
    axes = axes_from(args)
    extra = [parse_config(text) for text in args.setting]
    if args.json and args.prompt is None and is_interactive():
        raise UserError('--json needs a prompt: give --prompt "..." or pipe some in')
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    with err.status(f"loading {args.model}"):
        model, tokenizer, start = load_with_start(args)
        draft = draft_from(args, tokenizer)
    if not axes and not extra:
        axes = {"loops": DEFAULT_LOOPS}
    more = [replace(start, **fields) for fields in extra]
    session = Session(args, model, tokenizer, draft, start, axes, more)
    session.views()
    if prompt is not None:
        return 0 if session.answer(prompt) else INTERRUPTED
    interactive = is_interactive()
    if interactive:
        session.greet()
    for line in typed_lines("compare", (*COMMANDS, *SETTINGS)) if interactive else piped_lines():
        try:
            if line.startswith("/"):
                if not session.command(line):
                    break
            elif not session.answer(line) and not interactive:
                return INTERRUPTED
        except UserError as error:
            err.print(f"{error}", style="red", markup=False)
            if not interactive:
                return USER_ERROR
    return 0


@dataclass
class Session:
    """The settings that are compared, and all answers so far.

    Args:
        draft: arguments of `compare` for speculative decoding.
        start: what a setting is where nothing is said.
        axes: fields of `LoopConfig` and their values, all combined.
        extra: more settings.
    """

    args: argparse.Namespace
    model: Looped
    tokenizer: TokenizerWrapper
    draft: dict[str, Any]
    start: LoopConfig
    axes: dict[str, list[Any]]
    extra: list[LoopConfig]
    reports: list[dict[str, Any]] = field(default_factory=list)
    _prompt: str | None = None

    def __post_init__(self) -> None:
        self._first = dict(self.axes), list(self.extra)

    def greet(self) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_row("model", f"[bold]{escape(self.args.model)}[/bold]")
        for i, view in enumerate(self.views()):
            table.add_row("" if i else "compared", *self._row(view, i))
        table.add_row("", "[dim]/help for commands, Ctrl-C stops, Ctrl-D leaves[/dim]")
        out.print(Panel(table, title="mlx_loop compare", title_align="left", expand=False))

    def views(self) -> list[Looped]:
        """What is compared, the un-looped model first.

        Raises:
            UserError: settings that fit neither each other nor the model, or too many.
        """
        combined = combinations(self.start, self.axes) if self.axes else []
        views = distinct(self.model, combined + self.extra)
        if len(views) > MOST_SETTINGS:
            raise UserError(f"that makes {len(views)} settings; {MOST_SETTINGS} are the most")
        return views

    def answer(self, prompt: str) -> bool:
        """Show what all settings make of `prompt`; False: it was stopped."""
        self._prompt = prompt
        args, views = self.args, self.views()
        tokens = render_prompt(args, self.tokenizer, prompt)
        step = args.prefill_step_size or prefill_step(None)
        seed = random.randrange(2**31) if args.seed is None and args.temp else args.seed
        draws = out.is_terminal and not out.is_dumb_terminal and not args.json
        answers: list[Answer] = []
        live: Live | None = None
        drawn = 0.0
        with ExitStack() as stack:
            stop = stack.enter_context(interruptible())
            progress = stack.enter_context(prompt_progress(step, stop))
            stream = compare(
                views,
                self.tokenizer,
                tokens,
                max_tokens=args.max_tokens,
                sampler=sampler_from(args, self.tokenizer),
                seed=seed,
                prefill_step_size=step,
                progress=progress,
                **self.draft,
            )
            try:
                for answers in stream:
                    if live is None and draws:
                        # A screen of its own survives whatever happens to the terminal's size.
                        live = stack.enter_context(
                            Live(console=out, screen=True, auto_refresh=False)
                        )
                    if live and time.perf_counter() - drawn > SECONDS_BETWEEN_PICTURES:
                        live.update(Board(answers), refresh=True)
                        drawn = time.perf_counter()
                    if stop.is_set():
                        stream.close()
            except Interrupted:
                pass
        report = self._report(prompt, seed, answers, stop.is_set())
        self.reports.append(report)
        if args.json:
            print(json.dumps(report, ensure_ascii=False))
        elif out.is_terminal:
            out.print(Board(answers) if answers else "")
        else:
            out.print(Board(answers).plain(), markup=False, soft_wrap=True)
        if stop.is_set() and not args.json:
            out.print("stopped", style="yellow")
        return not stop.is_set()

    def _report(
        self, prompt: str, seed: int | None, answers: Sequence[Answer], stopped: bool
    ) -> dict[str, Any]:
        return {
            "model": self.args.model,
            "prompt": prompt,
            "max_tokens": self.args.max_tokens,
            "temp": self.args.temp,
            "seed": seed,
            "draft": self.args.draft,
            "stopped": stopped,
            "answers": [self._answer_report(answer, answers[0]) for answer in answers],
        }

    def _answer_report(self, answer: Answer, base: Answer) -> dict[str, Any]:
        passes, layers = layer_passes(answer.loop, len(self.model.layers)), len(self.model.layers)
        return {
            "loop": None if answer.loop is None else answer.loop.to_dict(),
            "text": answer.text,
            "finish_reason": answer.finish_reason or "interrupted",
            "generation_tokens": len(answer.tokens),
            "draft_tokens": answer.drafted,
            "generation_tps": answer.tokens_per_second,
            "layers": layers,
            "layer_passes": passes,
            "extra_time": answer.extra_time(base),
            "departs_at_token": answer.departs,
            **(asdict(answer.measures) if answer.measures else {}),
            "guard": {"fired": answer.firings[0], "loops": answer.firings[1]}
            if answer.loop is not None and answer.loop.guard is not None
            else None,
            "notes": notes(answer, base),
        }

    # --- Commands ---

    def command(self, line: str) -> bool:
        """Carry out a line that starts with a slash; False: leave."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        if name in ("quit", "exit", "q"):
            return False
        if name in SETTINGS:
            self._change(name, argument)
        elif name in COMMANDS:
            COMMANDS[name].run(self, argument)
        else:
            raise UserError(f"unknown command /{name}; /help lists the commands")
        return True

    def help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, command in COMMANDS.items():
            table.add_row(f"[bold]/{name}[/bold] {escape(command.argument)}", command.help)
        table.add_row("[bold]/quit[/bold]", "leave, as Ctrl-D does")
        fields = ", ".join(f"/{name}" for name in SETTINGS)
        table.add_row("[bold]/FIELD[/bold] A,B,...", f"values to compare, all combined: {fields}")
        table.add_row("", "[dim]as /loops 1,3,6 or /window 3:7,4:8; empty: the preset[/dim]")
        table.add_row("", "[dim]a change answers the last prompt again[/dim]")
        table.add_row("[dim]Alt-Enter[/dim]", "[dim]a new line; so does \\ at the end of one[/dim]")
        out.print(table)

    def settings(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for i, view in enumerate(self.views()):
            table.add_row(*self._row(view, i))
        out.print(table)

    def add(self, argument: str) -> None:
        fields = parse_config(needed(argument, "/add loops=6 beta=0.3"))
        self._try(self.axes, [*self.extra, replace(self.start, **fields)])

    def reset(self, _: str) -> None:
        self._try(*self._first)

    def max_tokens(self, argument: str) -> None:
        self._option("max_tokens", positive, needed(argument, "/max-tokens 100"))

    def temp(self, argument: str) -> None:
        self._option("temp", temperature, needed(argument, "/temp 0.7"))

    def seed(self, argument: str) -> None:
        self._option("seed", from_zero, needed(argument, "/seed 1"))

    def drafts(self, argument: str) -> None:
        self.args.draft = self.draft["draft"] = parse_draft(argument)
        self._show()

    def again(self, _: str) -> None:
        if self._prompt is None:
            raise UserError("there is no prompt yet: type one first")
        self.answer(self._prompt)

    def save(self, argument: str) -> None:
        path = Path(needed(argument, "/save session.json, or session.md")).expanduser()
        if path.suffix == ".md":
            text = markdown(self.reports)
        else:
            text = json.dumps(self.reports, indent=2, ensure_ascii=False) + "\n"
        with whole_file(path) as file:
            file.write_text(text)
        out.print(f"{len(self.reports)} prompts saved to {path}", style="dim", markup=False)

    def prompts(self, argument: str) -> None:
        path = Path(needed(argument, "/prompts questions.txt")).expanduser()
        for prompt in read_prompts(path):
            out.print(prompt, style="green", markup=False)
            if not self.answer(prompt):
                break

    def _option(self, name: str, parse: Callable[[str], Any], text: str) -> None:
        try:
            value = parse(text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"/{name.replace('_', '-')}: {error}") from error
        setattr(self.args, name, value)
        self._show()

    def _change(self, name: str, text: str) -> None:
        axes = {**self.axes, name: parse_settings(name, text)} if text else dict(self.axes)
        if not text:
            axes.pop(name, None)
        self._try(axes, self.extra)

    def _try(self, axes: dict[str, list[Any]], extra: list[LoopConfig]) -> None:
        """Change what is compared, unless it is not valid, and show the effect."""
        before = self.axes, self.extra
        self.axes, self.extra = dict(axes), list(extra)
        try:
            self.views()
        except UserError:
            self.axes, self.extra = before
            raise
        self._show()

    def _show(self) -> None:
        if self._prompt is None or not out.is_terminal:
            self.settings("")
        else:
            self.answer(self._prompt)

    def _row(self, view: Looped, number: int) -> tuple[str, str]:
        if view.is_unlooped:
            return "no loop", ""
        return escape(str(view.loop)), f"[dim]{extra_cost(view)}[/dim]"


@dataclass(frozen=True)
class _Command:
    run: Callable[[Session, str], None]
    argument: str
    help: str


COMMANDS = {
    "settings": _Command(Session.settings, "", "what is compared"),
    "add": _Command(Session.add, "FIELD=VALUE ...", "compare one more setting"),
    "reset": _Command(Session.reset, "", "compare what the command line said"),
    "max-tokens": _Command(Session.max_tokens, "N", "the most tokens of an answer"),
    "temp": _Command(Session.temp, "T", "sampling temperature; 0: greedy"),
    "seed": _Command(Session.seed, "N", "of the random numbers, the same for all settings"),
    "draft": _Command(Session.drafts, "self | lookup | off", "same answers, sooner: what drafts"),
    "again": _Command(Session.again, "", "repeat the last prompt"),
    "prompts": _Command(Session.prompts, "FILE", "answer each line of a file"),
    "save": _Command(Session.save, "FILE", "write the session, as JSON or (.md) Markdown"),
    "help": _Command(Session.help, "", "this list"),
}


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or of .jsonl the user's last message in each object.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            lines = [json.loads(line)["messages"][-1]["content"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error
    if not lines:
        raise UserError(f"{path} has no prompts in it: write one to a line")
    return lines


def markdown(reports: Iterable[dict[str, Any]]) -> str:
    """A session for people to read."""
    parts = []
    for report in reports:
        loops = [
            None if answer["loop"] is None else LoopConfig.from_dict(answer["loop"])
            for answer in report["answers"]
        ]
        parts.append(f"# {report['model']}\n\n{_quoted(report['prompt'])}")
        for title, answer in zip(names(loops, brief=True), report["answers"], strict=True):
            parts.append(f"## {title}\n\n{' · '.join(answer['notes'])}")
            parts.append(_quoted(answer["text"]))
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""])
