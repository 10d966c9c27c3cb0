"""Batches of requests on one set of weights, within limits of memory.

One holds requests of all settings that can stand side by side; each other setting has its own.
"""

from __future__ import annotations

import argparse
import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import CompletionRequest, GenerationArguments, ModelProvider
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ... import several
from ...checkpoints.memory import Footprint
from ...errors import UserError
from ...generation.batch import merges
from ...generation.generate import stream_generate
from ...generation.sampling import Sampler
from ...generation.speculative import check_drafts, is_its_own_draft
from ...method.cache import tokens_seen
from ...models.looped import Looped
from ...models.mixed import Mixed, Settings
from ...settings import ResolvedLoop
from ...upstream import hugging_face
from ...upstream_server import Batch, CachesOf
from .grammar import Grammars
from .names import Names
from .turns import Turns

# Batches that are kept ready at once, each with a thread.
MOST_SETTINGS = 8
# The name, among those of settings, of the batch that holds requests of several.
SHARED = "several"


# What a request that is served alone takes of mlx-lm's arguments as it is.
_TAKEN = ("max_tokens", "prefill_step_size", "kv_bits", "kv_group_size", "quantized_kv_start")


class Busy(Exception):
    """A request that would be answered at another time."""


class KeptCaches(LRUPromptCache):
    """mlx-lm's caches of earlier prompts, for several threads."""

    def __init__(self, max_size: int, max_bytes: int):
        super().__init__(max_size, max_bytes)
        self._lock = threading.RLock()

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        with self._lock:
            return super().fetch_nearest_cache(model, tokens)

    def insert_cache(self, *args: Any, **kwargs: Any) -> None:
        with self._lock:
            super().insert_cache(*args, **kwargs)

    def trim_to(self, **kwargs: Any) -> None:
        with self._lock:
            super().trim_to(**kwargs)


class SharedCaches(CachesOf):
    """The kept caches, for a batch whose rows' settings are in theirs (`Mixed`).

    Args:
        name_of: the name of settings.
    """

    def __init__(
        self,
        kept: KeptCaches,
        mixed: Mixed,
        name_of: Callable[[ResolvedLoop | None], str],
    ):
        super().__init__(kept)
        self._mixed, self._name_of = mixed, name_of

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        loop = self._mixed.loop
        cache, rest = self._kept.fetch_nearest_cache(_key(self._name_of(loop)), tokens)
        return cache and [*cache, Settings([loop])], rest

    def insert_cache(self, model: Any, tokens: list[int], cache: list[Any], **more: Any) -> None:
        *entries, settings = cache
        self._kept.insert_cache(_key(self._name_of(settings.rows[0])), tokens, entries, **more)


class Provider(ModelProvider):
    """mlx-lm's, which answers with views of a model that is loaded already.

    Args:
        mixed: the model of all names, where one batch holds them.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        names: Names,
        tokenizer: TokenizerWrapper,
        mixed: Mixed | None = None,
    ):
        super().__init__(args)
        self._names, self._tokenizer, self._mixed = names, tokenizer, mixed

    def load_default(self) -> None:
        """Nothing: each request names its model."""

    def load(self, name: str, *_: Any) -> tuple[Any, TokenizerWrapper]:
        view = self._names.view(name)
        # Whoever serves with it says where a prompt ends, or has settings that need not know.
        mine = view.with_loop(view.loop)
        mine.make_cache = view.new_cache
        model, key = self._mixed or mine, _key(SHARED if self._mixed else name)
        vars(self).update({"model": model, "tokenizer": self._tokenizer, "model_key": key})
        return model, self._tokenizer

    def batches(self, name: str) -> bool:
        view = self._names.view(name)
        return not view.tells_tokens_apart and merges(view.new_cache())

    def takes_whole(self, name: str) -> bool:
        # Passes of a prompt see each other, so that pieces would change the answer.
        view = self._names.view(name)
        return not view.is_unlooped and view.loop is not None and view.loop.cache != "own"


def _key(name: str) -> tuple[str, None, None]:
    """What mlx-lm calls a model by: name, adapter, draft."""
    return name, None, None


@dataclass
class _Setting:
    """A batch and what its requests need of memory, in bytes, by their arguments' `id`."""

    batch: Batch
    asked: int = 0
    needs: dict[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """In a batch, rows are as long as the longest."""
        return len(self.needs) * max(self.needs.values(), default=0)


class Desk:
    """What serves requests: batches, made when they are asked for.

    On several machines one batch serves all settings, one after the other as mlx-lm does it: there
    each machine has to do the same work in the same order, and turns go by time.

    Args:
        args: the options of mlx-lm's server, with `max_context`, tokens of a prompt and its
            answer, `prompt_cache_bytes`, of all caches together, and `draft`.
        names: of the model.
    """

    def __init__(self, args: argparse.Namespace, names: Names, tokenizer: TokenizerWrapper):
        self.cli_args, self.names, self.tokenizer = args, names, tokenizer
        self.turns, self.grammars = Turns(), Grammars(tokenizer)
        self.kept = KeptCaches(args.prompt_cache_size, args.prompt_cache_bytes)
        # mlx-lm would count the caches of one batch only.
        self._batch_args = argparse.Namespace(**{**vars(args), "prompt_cache_bytes": None})
        view = names.view(names.name)
        # How many logits there are, of which nothing is computed.
        self.vocabulary: int = view.with_loop(None)(mx.zeros((1, 1), mx.int32)).shape[-1]
        render = hugging_face(tokenizer).apply_chat_template
        self._depth = view.depth
        self.reserved = frozenset(inspect.signature(render).parameters)
        self._footprint = lru_cache(64)(lambda name: Footprint(names.view(name)))
        self._settings: dict[str, _Setting] = {}
        self._lock = threading.RLock()
        self._one_batch = several.count() > 1
        if self._one_batch:
            self._setting(view)

    @property
    def is_healthy(self) -> bool:
        return all(setting.batch.is_healthy for setting in list(self._settings.values()))

    @contextmanager
    def batch(self, view: Looped, alone: bool) -> Iterator[Batch]:
        """The batch for a view's settings, which stays while it is asked something.

        Args:
            alone: for a request that is served alone.

        Raises:
            Busy: too many other settings are being asked.
        """
        with self._lock:
            setting = self._setting(view, alone)
            setting.asked += 1
        try:
            yield setting.batch
        finally:
            with self._lock:
                setting.asked -= 1

    def _setting(self, view: Looped, alone: bool = False) -> _Setting:
        name = self.names.canonical(view)
        if self._one_batch or (not alone and self._is_shared(view)):
            name = SHARED
        setting = self._settings.pop(name, None)
        if setting is not None and not setting.batch.is_healthy and not self._one_batch:
            setting = None
            # What its thread has not computed yet, no other one can.
            self.kept.trim_to(n_sequences=0)
        if setting is None:
            self._make_room()
            setting = self._open(name == SHARED and not self._one_batch)
        # The latest one last, so that the first one is the longest unused.
        self._settings[name] = setting
        return setting

    def _make_room(self) -> None:
        if len(self._settings) < MOST_SETTINGS:
            return
        idle = next((name for name, s in self._settings.items() if not s.asked), None)
        if idle is None:
            raise Busy(
                f"{MOST_SETTINGS} batches are being served, the most at once: ask again, or with "
                "one of " + ", ".join(name for name in self._settings if name != SHARED)
            )
        self._settings.pop(idle).batch.stop_and_join()

    def _is_shared(self, view: Looped) -> bool:
        return self.cli_args.kv_bits is None and Mixed.takes(view)

    def _open(self, shared: bool) -> _Setting:
        latest: tuple[GenerationArguments, list[int]]
        model = self.names.view(self.names.name)
        mixed = Mixed(model) if shared else None

        def admit(request: CompletionRequest, args: GenerationArguments, tokens: list[int]) -> None:
            nonlocal latest
            self._admit(setting, request, args, tokens)
            latest = args, tokens
            if mixed is not None:
                mixed.loop = self.names.view(args.model.model).here

        def name_of(loop: ResolvedLoop | None) -> str:
            return self.names.canonical(model.with_loop(loop))

        def alone(**kwargs: Any) -> Generator[GenerationResponse, None, None]:
            return self._alone(*latest, **kwargs)

        provider = Provider(self._batch_args, self.names, self.tokenizer, mixed)
        of_name = provider.batches, provider.takes_whole
        kept: Any = self.kept if mixed is None else SharedCaches(self.kept, mixed, name_of)
        most = self.cli_args.decode_concurrency if shared else None
        setting = _Setting(Batch(provider, kept, self.turns, admit, alone, *of_name, most))
        return setting

    def _admit(
        self,
        setting: _Setting,
        request: CompletionRequest,
        args: GenerationArguments,
        tokens: list[int],
    ) -> None:
        most = self.cli_args.max_context
        if not tokens:
            raise UserError("the prompt is empty: give at least one token")
        if len(tokens) >= most:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, and {most} is the most for a prompt and its "
                "answer here: shorten it, or start the server with a larger --max-context"
            )
        args.max_tokens = min(args.max_tokens, most - len(tokens))
        schema = getattr(request, "schema", None)
        if schema is not None:
            vars(args)["processors"] = [self.grammars.processor(schema)]
        if not several.is_first():
            return
        length = -(-(len(tokens) + args.max_tokens) // 256) * 256
        need = self._footprint(args.model.model).cache(length)
        if setting.batch.shared:
            # Passes of some of the rows work on copies of what their windows keep.
            looped = self.names.view(args.model.model).here
            need += need * len(looped.layers if looped else ()) // self._depth
        total = self.cli_args.prompt_cache_bytes
        if need > total:
            raise UserError(
                f"{len(tokens)} tokens and an answer of up to {args.max_tokens} need a cache of "
                f"{need / 1e9:.2f} GB, and {total / 1e9:.2f} GB is the most here: ask for less, or "
                "start the server with larger --prompt-cache-bytes"
            )
        with self._lock:
            setting.needs[id(args)] = need
            used = sum(s.nbytes for s in self._settings.values())
            if used > total:
                del setting.needs[id(args)]
                raise Busy("the caches of other requests fill the memory: ask again later")
            self._leave(total - used)

    def finished(self, args: GenerationArguments) -> None:
        """Give back the memory that a request was admitted with, if it was."""
        with self._lock:
            for setting in self._settings.values():
                setting.needs.pop(id(args), None)
            used = sum(s.nbytes for s in self._settings.values())
            # On several machines all drop the same caches: when the first admits a request.
            if not self._one_batch:
                self._leave(self.cli_args.prompt_cache_bytes - used)

    def _leave(self, nbytes: int) -> None:
        if not self._one_batch:
            self.kept.max_bytes = nbytes
        self.kept.trim_to(n_bytes=nbytes)

    def _alone(
        self,
        args: GenerationArguments,
        tokens: list[int],
        model: Looped,
        tokenizer: TokenizerWrapper,
        prompt: list[int],
        prompt_cache: list[Any],
        prompt_progress_callback: Callable[[int, int], None],
        sampler: Any,
        logits_processors: list[Any],
        **kwargs: Any,
    ) -> Generator[GenerationResponse, None, None]:
        """Answer a request that cannot be in a batch; called with a turn, which it hands on.

        Args:
            tokens: the whole prompt, of which `prompt` is what the cache does not hold.
        """

        def progress(done: int, total: int) -> None:
            prompt_progress_callback(done, total)
            self.turns.hand_on()

        more = {name: kwargs[name] for name in _TAKEN}
        if self._can_draft(model, prompt_cache) and not logits_processors:
            more["draft"] = self.cli_args.draft
            more["num_draft_tokens"] = args.num_draft_tokens
            sampler = _sampler(args, tokenizer)
        else:
            known = mx.array(tokens[: len(tokens) - len(prompt)], mx.uint32)
            seeing = [partial(_seeing, process, known) for process in logits_processors]
            more |= {"stream": kwargs["stream"], "logits_processors": seeing}
        answer = stream_generate(
            model,
            tokenizer,
            prompt,
            prompt_cache=prompt_cache,
            prompt_progress_callback=progress,
            sampler=sampler,
            **more,
        )
        expected = (tokens_seen(prompt_cache) or 0) + len(prompt)
        last = None
        try:
            for response in answer:
                expected, last = expected + 1, response.token
                yield response
                self.turns.hand_on()
        finally:
            answer.close()
            if last is not None and tokens_seen(prompt_cache) == expected - 1:
                # A round of drafts leaves its last token out, and mlx-lm keeps the cache as whole.
                model.for_prompt(prompt_cache, 0)(mx.array([[last]]), cache=prompt_cache)

    def _can_draft(self, model: Looped, cache: list[Any]) -> bool:
        if self.cli_args.draft is None or is_its_own_draft(model, self.cli_args.draft):
            return False
        try:
            check_drafts(model, cache)
        except UserError:
            return False
        return True

    def check(self) -> None:
        """RuntimeError: another one of several machines has gone."""
        for setting in list(self._settings.values()):
            if setting.batch.lost is not None:
                raise setting.batch.lost

    def join(self) -> None:
        """Serve what the first of several machines is asked, until it ends."""
        for setting in self._settings.values():
            setting.batch.join()
        self.check()

    def stop(self) -> None:
        """End all threads."""
        for setting in self._settings.values():
            setting.batch.stop_and_join()


def _seeing(process: Any, known: mx.array, tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor's result, for a text that begins with what a cache holds.

    mlx-lm would show it what is fed only, so that penalties would hang on what was cached.
    """
    return process(mx.concatenate([known, tokens.astype(mx.uint32)]), logits)


def _sampler(args: GenerationArguments, tokenizer: TokenizerWrapper) -> Sampler:
    """One that tells its distribution, as drafts need it."""
    wanted = args.sampling
    return Sampler(
        temp=wanted.temperature,
        top_p=wanted.top_p,
        min_p=wanted.min_p,
        top_k=wanted.top_k,
        xtc_probability=wanted.xtc_probability,
        xtc_threshold=wanted.xtc_threshold,
        xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    )
