"""What mlx_loop relies on in mlx-lm's server beyond its documented interface.

Apart from `upstream`, because importing the server takes a while. tests/test_upstream.py has a
test for each assumption.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from . import several

Stream = Generator[GenerationResponse, None, None]

_alone = threading.local()
_stream_generate = server.stream_generate
_make_logits_processors = server._make_logits_processors


def _stream(**kwargs: Any) -> Stream:
    """A request that is served alone: in the way of the `Batch` whose thread this is, if one is."""
    return getattr(_alone, "stream", _stream_generate)(**kwargs)


def _processors(args: server.GenerationArguments) -> list[Callable[..., Any]]:
    """mlx-lm's, and those that `Batch.admit` has put into the request's arguments."""
    return [*_make_logits_processors(args), *getattr(args, "processors", ())]


server.stream_generate = _stream  # type: ignore[assignment]
server._make_logits_processors = _processors


# What stands among the requests to end the threads of several machines at the same time.
_END = "end"


@dataclass(eq=False)
class _OneOfSeveral(server.ModelDescription):
    """A model that may share a batch with others: mlx-lm asks whether it is the batch's own."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OneOfSeveral)

    __hash__ = None  # type: ignore[assignment]


class Batch(server.ResponseGenerator):
    """mlx-lm's queue of requests and the thread that serves them.

    On several machines each has one, and they do the same work in the order of the first: from
    there all get its requests, and hear whether one is admitted.

    Attributes:
        lost: what MLX said where another machine has gone; the thread has ended then.
        shared: whether it takes requests to any model.

    Args:
        provider: of models, by name.
        kept: caches of earlier prompts.
        turns: held while the device is given work, so that settings alternate.
        admit: called in the thread with a request, its arguments and its tokens; what it raises
            reaches the one who asked.
        stream: answers a request that is served alone, called as mlx-lm's `stream_generate`.
        batches: whether requests to the model of a name can be in a batch.
        whole: whether its prompts are processed in one piece, rather than cut where their caches
            are worth keeping.
        most: requests that a batch holds that takes them to any model; None: a batch for one
            model at a time.
    """

    lost: RuntimeError | None = None

    def __init__(
        self,
        provider: server.ModelProvider,
        kept: LRUPromptCache,
        turns: AbstractContextManager[Any],
        admit: Callable[[server.CompletionRequest, server.GenerationArguments, list[int]], None],
        stream: Callable[..., Stream],
        batches: Callable[[str], bool],
        whole: Callable[[str], bool],
        most: int | None,
    ):
        self._turns, self._admit, self._alone_stream = turns, admit, stream
        self._batches, self._whole, self._most = batches, whole, most
        self.shared = most is not None
        self._held: list[_Asker] = []
        # The thread starts here, and asks for its budget of time after its first request.
        super().__init__(provider, _Fed(kept))  # type: ignore[arg-type]
        self._time_budget = _OneStep(turns)  # type: ignore[assignment]
        if self.shared:
            self.requests = _ByModel()

    def generate(self, request: Any, generation_args: Any, *args: Any, **kwargs: Any) -> Any:
        if self.shared:
            generation_args.model = _OneOfSeveral(**vars(generation_args.model))
        return super().generate(request, generation_args, *args, **kwargs)

    def _generate(self) -> None:
        try:
            super()._generate()
        except RuntimeError as error:
            if not several.is_lost(error):
                raise
            self.lost = error
        finally:
            # A process that ends while MLX is still ending streams of a thread aborts.
            mx.clear_streams()

    def _next_request(self, timeout: float | None = None) -> Any:
        if self._most is not None:
            return self._next_in_turn(self._most, timeout)
        request = super()._next_request(timeout)
        if request is None or request[1] != _END:
            return request
        self._stop = True
        return None

    def _next_in_turn(self, most: int, timeout: float | None) -> Any:
        self._held = [asker for asker in self._held if asker.is_under_way]
        if len(self._held) >= most:
            # Those that wait here are taken in turn; in the batch's own queue they would not be.
            time.sleep(timeout or 0)
            return None
        request = super()._next_request(timeout)
        if request is None:
            return None
        self._held.append(_Asker(request[0]))
        return self._held[-1], *request[1:]

    def stop_and_join(self) -> None:
        if not self._is_distributed:
            super().stop_and_join()
            return
        self.requests.put((None, _END))
        self.join()

    def _await_response(self, response_queue: Any) -> Any:
        try:
            return super()._await_response(response_queue)
        except RuntimeError as error:
            raise self.lost or error from None

    def _is_batchable(self, args: Any) -> bool:
        # mlx-lm knows it of the model that it has answered with last.
        self.model_provider.is_batchable = self._batches(args.model.model)
        return super()._is_batchable(args)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[Any, ...]:
        prompt, segments, types, state, vision = super()._tokenize(tokenizer, request, args)
        refused: Exception | None = None
        try:
            self._admit(request, args, prompt)
        except Exception as error:
            refused = error
        if self._is_distributed:
            # Machines with other caches of earlier prompts would not do the same work.
            refused, kept = self._share_object((refused, len(self.prompt_cache)))
            self.prompt_cache.trim_to(n_sequences=kept)
        if refused is not None:
            raise refused
        if self._whole(args.model.model):
            segments, types = [prompt], ["assistant"]
        return prompt, segments, types, state, vision

    def _serve_single(self, request: Any, stream: Any) -> None:
        _alone.stream = self._alone_stream
        if self._is_distributed:
            asker = _Queue(request[0])
            _alone.stream, request = partial(self._until_gone, asker), (asker, *request[1:])
        with self._turns:
            super()._serve_single(request, stream)

    def _until_gone(self, asker: _Queue, **kwargs: Any) -> Stream:
        """The answer, which all machines end at the same token where nobody reads it any more."""
        with closing(self._alone_stream(**kwargs)) as answer:
            for response in answer:
                yield response
                if self._share_object(asker.gone or None):
                    return


class _Queue:
    """The way to one who asked and may go away, of which mlx-lm would tell one machine alone."""

    def __init__(self, queue: Any):
        self._queue, self.gone = queue, False

    def put(self, item: Any) -> None:
        if isinstance(item, server.GenerationContext):
            item.stop = self._stop  # type: ignore[method-assign]
        self._queue.put(item)

    def _stop(self) -> None:
        self.gone = True


class CachesOf:
    """Caches of earlier prompts as somebody is to see them; all that is not said here is theirs."""

    def __init__(self, kept: Any):
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept, name)


class _Fed(CachesOf):
    """Of a prompt that is wholly kept the last token goes in again: a batch has to be fed."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        cache, rest = self._kept.fetch_nearest_cache(model, tokens)
        if cache is None or rest:
            return cache, rest
        if can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, 1)
            return cache, tokens[-1:]
        return None, tokens


class _Asker:
    """The way to one who asked."""

    def __init__(self, to: Any):
        self._to, self._ended = to, False
        self._context: server.GenerationContext | None = None

    def put(self, item: Any) -> None:
        if isinstance(item, server.GenerationContext):
            self._context = item
        self._ended = self._ended or item is None or isinstance(item, Exception)
        self._to.put(item)

    @property
    def is_under_way(self) -> bool:
        """Whether the answer has not ended, and is still wanted."""
        return not self._ended and not (self._context and self._context._should_stop)


class _ByModel(queue.Queue[Any]):
    """Requests, of those to each model in turn."""

    def _init(self, maxsize: int) -> None:
        self._waiting: dict[str, deque[Any]] = {}

    def _qsize(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _put(self, item: Any) -> None:
        _, _, args = item
        self._waiting.setdefault(args.model.model, deque()).append(item)

    def _get(self) -> Any:
        model = next(iter(self._waiting))
        requests = self._waiting.pop(model)
        item = requests.popleft()
        if requests:
            self._waiting[model] = requests
        return item


class _OneStep:
    """mlx-lm's budget of time, as one step of the batch for each turn."""

    def __init__(self, turns: AbstractContextManager[Any]):
        self._turns = turns

    def __iter__(self) -> Iterator[None]:
        with self._turns:
            yield
