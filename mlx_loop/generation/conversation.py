"""A conversation with a looped model: messages, and a prompt cache that is re-used across turns.

It knows nothing of screens: `reply` is a generator of what mlx-lm generates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import common_prefix_len

from ..errors import UserError
from ..method.cache import Bookmark, tokens_seen
from ..models.looped import Looped
from ..settings import LoopConfig
from .generate import make_prompt_cache, stream_generate
from .prompt import render, takes_system, thought_marks


class Interrupted(Exception):
    """Raised by a progress callback to stop between two chunks of the prompt."""


@dataclass
class Conversation:
    """Messages so far, and the tokens whose keys and values the cache holds.

    Args:
        model, tokenizer: the tokenizer needs a chat template.
        system: the system message, or None.
        max_kv_size: as in `make_prompt_cache`.
        template: more arguments for the chat template.
    """

    model: Looped
    tokenizer: TokenizerWrapper
    system: str | None = None
    max_kv_size: int | None = None
    template: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    _cache: list[Any] | None = None
    _tokens: list[int] = field(default_factory=list)
    # How many tokens the cache holds as the un-looped model leaves them, and how many of them fit
    # the present settings; None: all.
    _plain: int = 0
    _tokens_fit: int | None = None
    # The last prompt but its last token, and the cache as it was then.
    _bookmark: tuple[list[int], Bookmark] | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.has_chat_template:
            raise UserError(
                "this tokenizer has no chat template: chat needs an instruction-tuned model; "
                "`mlx_loop generate` works with any"
            )

    @property
    def loop(self) -> LoopConfig | None:
        """The model's loop settings. New ones make the next turn process everything again that
        another loop has left in the cache: nothing, if they differ in `decode` only; with
        `prompt="plain"` before and after, what comes after the first prompt.
        """
        return self.model.loop

    @loop.setter
    def loop(self, loop: LoopConfig | None) -> None:
        before, was_plain = self.model.loop, self.model.leaves_prompts_plain
        self.model.loop = loop
        after = self.model.loop
        if (
            before is None
            or after is None
            or replace(before, decode="full") != replace(after, decode="full")
        ):
            if not (was_plain and self.model.leaves_prompts_plain):
                self._forget()
            else:
                self._tokens_fit = self._plain

    def reset(self) -> None:
        """Start again, with the same system message."""
        self.messages = []
        self._forget()

    def reply(
        self, text: str, progress: Callable[[int, int], None] | None = None, **generation: Any
    ) -> Generator[GenerationResponse, None, None]:
        """Stream the answer to `text`; only tokens that are not yet in the cache are processed.

        Closing the generator, or `Interrupted` from `progress`, ends the answer there. What has
        been said until then stays in the conversation.

        Args:
            progress: called with the prompt tokens done and the prompt tokens to do.
            generation: arguments of `stream_generate`, `max_tokens` and `sampler` among them.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._render(asked)
        cache, rest = self._reuse(prompt)
        answer, generated = "", []
        whole = False
        try:
            responses = stream_generate(
                self.model,
                self.tokenizer,
                rest,
                prompt_cache=cache,
                max_kv_size=self.max_kv_size,
                context=prompt[: -len(rest)],
                prompt_progress_callback=self._marking(prompt, cache, progress),
                **generation,
            )
            # Closed before the cache is looked at, because closing may cut it.
            with closing(responses):
                for response in responses:
                    answer += response.text
                    generated.append(response.token)
                    self.messages = [*asked, {"role": "assistant", "content": answer}]
                    yield response
            whole = True
        except (GeneratorExit, Interrupted):
            whole = True
            raise
        finally:
            if whole and (generated or tokens_seen(cache) is not None):
                # A cache that does not count its tokens has seen all that were given out.
                self._tokens = (prompt + generated)[: tokens_seen(cache)]
                if self._plain == len(prompt) - len(rest) and self.model.leaves_prompts_plain:
                    all_plain = self.model.is_unlooped
                    self._plain = len(self._tokens) if all_plain else len(prompt) - 1
            else:
                # Something broke in the middle of a pass: layers may disagree.
                self._forget()

    @property
    def length(self) -> int:
        """Tokens of the conversation, as far as the model has seen it."""
        return len(self._tokens)

    def cache_summary(self) -> str:
        """What the cache holds, for people."""
        if self._cache is None:
            return "empty"
        size = sum(entry.nbytes for entry in self._cache if not entry.empty())
        return f"{len(self._tokens)} tokens, {size / 1e6:.1f} MB"

    @property
    def system_stands_first(self) -> bool:
        """Whether the chat template takes no system message: it then begins the first question."""
        return bool(self.system) and not takes_system(self.tokenizer, self.template)

    @cached_property
    def marks(self) -> tuple[str, str] | None:
        """As `thought_marks`."""
        return thought_marks(self.tokenizer)

    @cached_property
    def begins_with_thoughts(self) -> bool:
        """Whether the chat template has begun the thoughts where an answer begins."""
        if not self.tokenizer.has_thinking:
            return False
        prompt = self._render([{"role": "user", "content": "?"}])
        begun = self.tokenizer.rfind_think_start(prompt)
        return begun > self.tokenizer.rfind_think_end(prompt)

    def check_messages(self) -> None:
        """Refuse messages that the chat template does not take.

        Raises:
            UserError: they are not those of a conversation that can go on.
        """
        self._render([*self.messages, {"role": "user", "content": "?"}])

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        system = self.system
        told = [{**message, "content": _told(message)} for message in messages]
        if self.system_stands_first:
            told[0]["content"] = f"{system}\n\n{told[0]['content']}"
            system = None
        return render(self.tokenizer, told, system, self.template)

    def _reuse(self, prompt: list[int]) -> tuple[list[Any], list[int]]:
        """The cache cut back to what it has in common with `prompt`, and the rest of that."""
        same = common_prefix_len(self._tokens[: self._tokens_fit], prompt)
        common = min(same, len(prompt) - 1)
        surplus = len(self._tokens) - common
        if self._cache is not None and surplus:
            if can_trim_prompt_cache(self._cache):
                trim_prompt_cache(self._cache, surplus)
            elif self._bookmark is not None and len(self._bookmark[0]) <= common:
                tokens, bookmark = self._bookmark
                bookmark.go_back(self._cache)
                common = len(tokens)
            else:
                self._cache = None
        if self._cache is None:
            self._cache, common = make_prompt_cache(self.model, self.max_kv_size), 0
        if self._bookmark is not None and len(self._bookmark[0]) > common:
            # It is of a text that the cache no longer holds.
            self._bookmark = None
        self._tokens_fit, self._plain = None, min(self._plain, common)
        return self._cache, prompt[common:]

    def _marking(
        self, prompt: list[int], cache: list[Any], progress: Callable[[int, int], None] | None
    ) -> Callable[[int, int], None]:
        """`progress`, which also keeps the cache as it is before the last prompt token.

        Sliding windows and recurrent state cannot be cut back to what the next prompt shares.
        """

        def called(done: int, total: int) -> None:
            if done == total - 1:
                self._bookmark = prompt[:-1], Bookmark(cache)
            if progress is not None:
                progress(done, total)

        return called

    def _forget(self) -> None:
        self._cache, self._tokens, self._bookmark = None, [], None
        self._plain, self._tokens_fit = 0, None


def _told(message: dict[str, str]) -> str:
    """What a template is told of a message: of gpt-oss's channels, which it refuses, the last."""
    if message["role"] == "assistant" and "<|channel|>" in message["content"]:
        return message["content"].rpartition("<|message|>")[2]
    return message["content"]
