"""The screen of `mlx_loop chat`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.text import Text

from .. import several
from ..checkpoints.loading import saved_loop
from ..errors import UserError
from ..files import whole_file
from ..foreign import foreseen, path_of, read_json, read_text, to_json, visible
from ..generation.conversation import Conversation
from ..settings import LoopConfig
from .fields import SETTINGS, check_model, check_read, parse_setting
from .markdown import Rendering
from .options import fraction, from_zero, parse_draft, positive, temperature
from .session import PASSES, Command, Row, Session, command, grid, needed, parsed
from .terminal import context, describe, err, extra_cost, numbers, out, stream


@dataclass
class Chat(Session):
    """A conversation, the settings of its answers, and what is printed about them.

    Args:
        title: of the model.
        generation: arguments of `stream_generate`.
        plain: whether answers are shown as they come, and not as Markdown.
    """

    conversation: Conversation
    title: str
    generation: dict[str, Any]
    plain: bool = False
    _before_off: LoopConfig | None = None
    # Texts that go before the next message, and the file of the last /save or /load.
    _texts: list[str] = field(default_factory=list)
    _file: Path | None = None

    name = "chat"
    hints = (
        (Text("/FIELD VALUE", "bold"), "the same as /set: /" + ", /".join(SETTINGS)),
        PASSES,
    )

    def commands(self) -> Mapping[str, Command]:
        fields = {name: Command(partial(Chat.change, name=name)) for name in SETTINGS}
        return {**fields, **super().commands()}

    def about(self) -> list[Row]:
        return [("model", Text(visible(self.title), "bold")), *self._loop_rows()]

    def answer(self, text: str) -> bool:
        """Stream the answer to `text`, then one line of numbers."""
        texts, self._texts = self._texts, []
        text = "\n\n".join([*texts, text])
        with self._shown() as show:
            answer = stream(
                lambda progress: self.conversation.reply(text, progress, **self.generation),
                self.generation["prefill_step_size"],
                show,
            )
        if answer.stopped and answer.last is None:
            self._texts = texts
            out.print("stopped before the answer: the conversation is as it was", style="yellow")
        elif answer.stopped:
            out.print("stopped", style="yellow")
        if answer.last is not None:
            model, used = self.conversation.model, self.conversation.length
            out.print(f"{numbers(answer, model)} · {context(model, used)}", style="dim")
        return not answer.stopped

    # --- Commands ---

    @command("N | off | on", "how many loops; off: the plain model")
    def loop(self, argument: str) -> None:
        if argument == "off":
            self._before_off = self.conversation.loop or self._before_off
            self.conversation.loop = None
        elif argument == "on":
            self.conversation.loop = self._looped()
        elif argument:
            self._change("loops", argument)
        self._show_loop()

    @command("START:STOP", "the layers that loop, half open")
    def window(self, argument: str) -> None:
        self._change("window", needed(argument, "/window 15:19"))
        self._show_loop()

    @command("FIELD VALUE", "any loop setting: integrator, beta, cache, decode, ...")
    def set(self, argument: str) -> None:
        name, _, value = needed(argument, "/set beta 0.3").partition(" ")
        value = needed(value.strip(), f"/set {name} VALUE")
        if name in self.commands() and name not in SETTINGS:
            raise UserError(f"{name} is no loop setting: write /{name} {value}")
        self._change(name, value)
        self._show_loop()

    @command("self | lookup | off", "the same answers sooner: what drafts")
    def draft(self, argument: str) -> None:
        self.generation["draft"] = parse_draft(argument)
        out.print(f"draft {argument}", style="dim")

    @command("", "answer the last question again")
    def retry(self, _: str) -> None:
        talk, before, texts = self.conversation, self.conversation.messages, self._texts
        question = self._take_back()
        left, self._texts = talk.messages, []
        try:
            self.answer(question)
        finally:
            self._texts = texts
            # Without a new answer the old one stays.
            if talk.messages is left:
                talk.messages = before

    @command("", "forget the last question and its answer")
    def undo(self, _: str) -> None:
        question = self._take_back()
        out.print(f"forgotten: {question}", style="dim")

    @command("", "change the last question and ask it again")
    def edit(self, _: str) -> None:
        self.next_line = self._take_back()

    @command("PATH", "put a text file before the next message")
    def file(self, argument: str) -> None:
        path = path_of(needed(argument, "/file notes.txt"))
        text = several.from_first(lambda: read_text(path))
        self._texts.append(text)
        words = f"{len(text.split())} words of {path} go before your next message"
        out.print(words, style="dim")

    @command("T", "sampling temperature; 0: greedy")
    def temp(self, argument: str) -> None:
        self._sample("temp", parsed(temperature, argument, "/temp 0.7"))

    @command("P", "sample from the likeliest tokens that make up this probability")
    def top_p(self, argument: str) -> None:
        self._sample("top_p", parsed(fraction, argument, "/top-p 0.9"))

    @command("N", "the most tokens of an answer")
    def max_tokens(self, argument: str) -> None:
        self.generation["max_tokens"] = parsed(positive, argument, "/max-tokens 100")
        self._show_sampling()

    @command("N", "of the random numbers")
    def seed(self, argument: str) -> None:
        seed = parsed(from_zero, argument, "/seed 1")
        mx.random.seed(seed)
        out.print(f"seed {seed}", style="dim")

    @command("", "model, settings, what the cache holds")
    def info(self, _: str) -> None:
        model, talk = self.conversation.model, self.conversation
        rows = [
            ("model", f"{self.title} ({model.model_type}, {model.depth} layers)"),
            *self._loop_rows(),
            ("answers", self._sampling()),
            ("system", talk.system or "none"),
            ("conversation", f"{len(talk.messages)} messages"),
            ("cache", talk.cache_summary()),
        ]
        out.print(grid(rows))

    @command("TEXT", "the system message; empty: none")
    def system(self, argument: str) -> None:
        self.conversation.system = argument or None
        out.print("system message set" if argument else "no system message", style="dim")
        self.tell_of_system()

    @command("", "forget the conversation")
    def clear(self, _: str) -> None:
        self.conversation.reset()
        out.print("a new conversation", style="dim")

    reset = Command(clear.run)

    @command("FILE", "write the conversation as JSON; empty: to its own file again")
    def save(self, argument: str) -> None:
        own = str(self._file or "")
        path = path_of(needed(argument or own, "/save talk.json"))
        loop = self.conversation.loop
        messages = self.conversation.messages
        data = {
            "model": self.title,
            "loop": None if loop is None else loop.to_dict(),
            "system": self.conversation.system,
            "messages": messages,
        }

        def write() -> None:
            with whole_file(path, overwrite=not argument) as file:
                file.write_bytes(f"{to_json(data, indent=2)}\n".encode())

        several.from_first(write)
        self._file = path
        out.print(f"{len(messages)} messages saved to {path}", style="dim")

    @command("FILE", "go on with a saved conversation")
    def load(self, argument: str) -> None:
        path = path_of(needed(argument, "/load talk.json"))
        with foreseen(f"{path} is not a conversation that /save wrote"):
            data = several.from_first(lambda: read_json(path))
            messages = [{"role": m["role"], "content": m["content"]} for m in data["messages"]]
            system, loop = data["system"], data["loop"]
            texts = [system or "", *chain(*(message.values() for message in messages))]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a message is no text")
        talk = replace(self.conversation, system=system, messages=messages)
        if messages:
            talk.check_messages()
        self.conversation.loop = None if loop is None else LoopConfig.from_dict(loop)
        self.conversation.reset()
        self.conversation.system, self.conversation.messages = system, messages
        self._file = path
        out.print(f"{len(messages)} messages loaded from {path}", style="dim")
        if data.get("model") != self.title:
            other = f"it was with {data.get('model')}; {self.title} goes on with it"
            out.print(other, style="yellow")
        self._show_loop()

    def change(self, text: str, name: str) -> None:
        """`/FIELD VALUE`: another value of a field."""
        self._change(name, needed(text, f"/{name} VALUE (/help {name} says which)"))
        self._show_loop()

    def tell_of_system(self) -> None:
        """Say where the system message stands, if that is not where it should."""
        if self.conversation.system_stands_first:
            err.print(
                "this model's chat template takes no system message: it is put before the first "
                "question instead",
                style="yellow",
            )

    @contextmanager
    def _shown(self) -> Iterator[Callable[[str], None]]:
        """What shows the pieces of an answer."""
        if self.plain or not out.can_redraw:
            yield partial(out.out, end="", style="cyan", highlight=False)
            out.print()
            return
        talk = self.conversation
        with Rendering(out, talk.marks, talk.begins_with_thoughts) as rendering:
            yield rendering.show

    def _take_back(self) -> str:
        """The last question, which with its answer is no longer part of the conversation."""
        messages = self.conversation.messages
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            raise UserError("there is no question yet: type one first")
        self.conversation.messages = messages[: asked[-1]]
        return messages[asked[-1]]["content"]

    def _sample(self, name: str, value: float) -> None:
        sampler = replace(self.generation["sampler"], **{name: value})
        if name != "temp" and not sampler.temp:
            raise UserError(f"{name} does nothing without a temperature: /temp 0.7 first")
        self.generation["sampler"] = sampler
        self._show_sampling()

    def _show_sampling(self) -> None:
        out.print(self._sampling(), style="dim")

    def _sampling(self) -> str:
        """How tokens are drawn, and how many."""
        sampler = self.generation["sampler"]
        given = [(name, getattr(sampler, name)) for name in ("top_p", "min_p", "top_k")]
        words = [f"temp {sampler.temp:g}", *(f"{n} {v:g}" for n, v in given if v)]
        if not sampler.temp:
            words = ["greedy (temp 0)"]
        return ", ".join([*words, f"at most {self.generation['max_tokens']} tokens"])

    def _looped(self) -> LoopConfig:
        checkpoint = self.conversation.model.checkpoint
        saved = None if checkpoint is None else saved_loop(checkpoint)
        return self.conversation.loop or self._before_off or saved or LoopConfig()

    def _change(self, name: str, text: str) -> None:
        fields = {name: parse_setting(name, text)}
        check_model([name], self.conversation.model)
        if name == "loops":
            # Weights that came with another number of loops were not asked for.
            fields["weights"] = None
        loop = replace(self._looped(), **fields)
        check_read([name], [loop])
        self.conversation.loop = loop

    def _loop_rows(self) -> list[Row]:
        model = self.conversation.model
        return [("loop", describe(model.loop)), ("cost", extra_cost(model))]

    def _show_loop(self) -> None:
        loop = self.conversation.loop
        cost = f" · {extra_cost(self.conversation.model)}" if loop else ""
        out.print(f"loop {describe(loop)}{cost}", style="dim")
