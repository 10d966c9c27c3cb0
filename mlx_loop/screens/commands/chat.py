"""`mlx_loop chat`: the screen of a conversation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lm.generate import GenerationResponse
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ...errors import UserError
from ...files import whole_file
from ...generation.conversation import Conversation, Interrupted
from ...settings import LoopConfig
from ..options import draft_from, generation_from, load_from, parse_draft, parse_setting
from ..prompt_line import needed, piped_lines, typed_lines
from ..terminal import (
    describe,
    err,
    extra_cost,
    interruptible,
    is_interactive,
    numbers,
    out,
    prompt_progress,
)


def run(args: argparse.Namespace) -> int:
    with err.status(f"loading {args.model}"):
        model, tokenizer = load_from(args)
        draft = draft_from(args, tokenizer)
    conversation = Conversation(
        model,
        tokenizer,
        system=args.system_prompt,
        max_kv_size=args.max_kv_size,
        template=args.chat_template_config,
    )
    chat = Chat(conversation, args.model, generation_from(args, tokenizer) | draft)
    interactive = is_interactive()
    if interactive:
        chat.greet()
    for line in typed_lines("chat", COMMANDS) if interactive else piped_lines():
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    break
            else:
                chat.answer(line)
        except UserError as error:
            err.print(f"{error}", style="red", markup=False)
            if not interactive:
                return 2
    return 0


@dataclass
class Chat:
    """A conversation, the settings of its answers, and what is printed about them."""

    conversation: Conversation
    name: str
    generation: dict[str, Any]
    _before_off: LoopConfig | None = None

    def greet(self) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_row("model", f"[bold]{escape(self.name)}[/bold]")
        table.add_row("loop", describe(self.conversation.loop))
        table.add_row("cost", extra_cost(self.conversation.model))
        table.add_row("", "[dim]/help for commands, Ctrl-C stops an answer, Ctrl-D leaves[/dim]")
        out.print(Panel(table, title="mlx_loop chat", title_align="left", expand=False))

    def answer(self, text: str) -> None:
        """Stream the answer to `text`, then one line of numbers."""
        response: GenerationResponse | None = None
        drafted = 0
        step = self.generation["prefill_step_size"]
        with interruptible() as stop, prompt_progress(step, stop) as progress:
            stream = self.conversation.reply(text, progress, **self.generation)
            try:
                for response in stream:
                    drafted += response.from_draft
                    out.out(response.text, end="", style="cyan", highlight=False)
                    out.file.flush()
                    if stop.is_set():
                        stream.close()
            except Interrupted:
                pass
        out.print()
        if stop.is_set():
            out.print("stopped", style="yellow")
        if response is not None:
            out.print(numbers(response, self.conversation.model, drafted), style="dim")

    # --- Commands ---

    def command(self, line: str) -> bool:
        """Carry out a line that starts with a slash; False: leave."""
        name, _, argument = line[1:].strip().partition(" ")
        if name in ("quit", "exit", "q"):
            return False
        action = COMMANDS.get(name)
        if action is None:
            raise UserError(f"unknown command /{name}; /help lists the commands")
        action.run(self, argument.strip())
        return True

    def help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, command in COMMANDS.items():
            table.add_row(f"[bold]/{name}[/bold] {escape(command.argument)}", command.help)
        table.add_row("[bold]/quit[/bold]", "leave, as Ctrl-D does")
        table.add_row("[dim]Alt-Enter[/dim]", "[dim]a new line; so does \\ at the end of one[/dim]")
        out.print(table)

    def loop(self, argument: str) -> None:
        if argument == "off":
            self._before_off = self.conversation.loop
            self.conversation.loop = None
        elif argument == "on":
            self.conversation.loop = self.conversation.loop or self._before_off or LoopConfig()
        elif argument:
            self._change("loops", argument)
        self._show_loop()

    def window(self, argument: str) -> None:
        self._change("window", needed(argument, "/window 15:19"))
        self._show_loop()

    def set(self, argument: str) -> None:
        name, _, value = needed(argument, "/set beta 0.3").partition(" ")
        self._change(name, needed(value.strip(), f"/set {name} VALUE"))
        self._show_loop()

    def draft(self, argument: str) -> None:
        self.generation["draft"] = parse_draft(argument)
        out.print(f"draft {argument}", style="dim")

    def info(self, _: str) -> None:
        model = self.conversation.model
        table = Table.grid(padding=(0, 2))
        table.add_row(
            "model", f"{escape(self.name)} ({model.model_type}, {len(model.layers)} layers)"
        )
        table.add_row("loop", describe(model.loop))
        table.add_row("cost", extra_cost(model))
        table.add_row("system", escape(self.conversation.system or "none"))
        table.add_row("conversation", f"{len(self.conversation.messages)} messages")
        table.add_row("cache", self.conversation.cache_summary())
        out.print(table)

    def reset(self, _: str) -> None:
        self.conversation.reset()
        out.print("a new conversation", style="dim")

    def system(self, argument: str) -> None:
        self.conversation.system = argument or None
        out.print("system message set" if argument else "no system message", style="dim")

    def save(self, argument: str) -> None:
        path = Path(needed(argument, "/save talk.json")).expanduser()
        loop = self.conversation.loop
        messages = self.conversation.messages
        data = {
            "model": self.name,
            "loop": None if loop is None else loop.to_dict(),
            "system": self.conversation.system,
            "messages": messages,
        }
        with whole_file(path) as file:
            file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        out.print(f"{len(messages)} messages saved to {path}", style="dim", markup=False)

    def load(self, argument: str) -> None:
        path = Path(needed(argument, "/load talk.json")).expanduser()
        try:
            data = json.loads(path.read_text())
            messages = [{"role": m["role"], "content": m["content"]} for m in data["messages"]]
            system, loop = data["system"], data["loop"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a conversation that /save wrote: {error}") from error
        self.conversation.loop = None if loop is None else LoopConfig.from_dict(loop)
        self.conversation.reset()
        self.conversation.system, self.conversation.messages = system, messages
        out.print(f"{len(messages)} messages loaded from {path}", style="dim", markup=False)
        self._show_loop()

    def _change(self, name: str, text: str) -> None:
        value = parse_setting(name, text)
        loop = self.conversation.loop or self._before_off or LoopConfig()
        self.conversation.loop = replace(loop, **{name: value})

    def _show_loop(self) -> None:
        loop = self.conversation.loop
        cost = f" · {extra_cost(self.conversation.model)}" if loop else ""
        out.print(f"loop {describe(loop)}{cost}", style="dim")


@dataclass(frozen=True)
class _Command:
    run: Callable[[Chat, str], None]
    argument: str
    help: str


COMMANDS = {
    "loop": _Command(Chat.loop, "N | off | on", "how many loops; off: the plain model"),
    "window": _Command(Chat.window, "START:STOP", "the layers that loop, half open"),
    "set": _Command(
        Chat.set, "FIELD VALUE", "any loop setting: integrator, beta, cache, decode, ..."
    ),
    "draft": _Command(Chat.draft, "self | lookup | off", "the same answers sooner: what drafts"),
    "info": _Command(Chat.info, "", "model, settings, what the cache holds"),
    "system": _Command(Chat.system, "TEXT", "the system message; empty: none"),
    "reset": _Command(Chat.reset, "", "forget the conversation"),
    "save": _Command(Chat.save, "FILE", "write the conversation as JSON"),
    "load": _Command(Chat.load, "FILE", "go on with a saved conversation"),
    "help": _Command(Chat.help, "", "this list"),
}
