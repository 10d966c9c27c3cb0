"""What mlx_loop relies on in mlx-lm's server beyond its documented interface.

Apart from `upstream`, because importing the server takes a while. tests/test_upstream.py has a
test for each assumption.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import LRUPromptCache

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


class Batch(server.ResponseGenerator):
    """mlx-lm's queue of requests and the thread that serves them, for one of several settings.

    Not with `mx.distributed`, where all ranks have to do the same work in the same order.

    Args:
        provider: the model with its setting.
        kept: caches of earlier prompts.
        turns: held while the device is given work, so that settings alternate.
        admit: called in the thread with a request, its arguments and its tokens; what it raises
            reaches the one who asked.
        stream: answers a request that is served alone, called as mlx-lm's `stream_generate`.
        whole: whether prompts are processed in one piece, rather than cut where their caches are
            worth keeping.
    """

    def __init__(
        self,
        provider: server.ModelProvider,
        kept: LRUPromptCache,
        turns: AbstractContextManager[Any],
        admit: Callable[[server.CompletionRequest, server.GenerationArguments, list[int]], None],
        stream: Callable[..., Stream],
        whole: bool,
    ):
        self._turns, self._admit, self._alone_stream, self._whole = turns, admit, stream, whole
        # The thread starts here, and asks for its budget of time after its first request.
        super().__init__(provider, kept)
        self._time_budget = _OneStep(turns)  # type: ignore[assignment]

    def _generate(self) -> None:
        try:
            super()._generate()
        finally:
            # A process that ends while MLX is still ending streams of a thread aborts.
            mx.clear_streams()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[Any, ...]:
        prompt, segments, types, state, vision = super()._tokenize(tokenizer, request, args)
        self._admit(request, args, prompt)
        if self._whole:
            segments, types = [prompt], ["assistant"]
        return prompt, segments, types, state, vision

    def _serve_single(self, request: Any, stream: Any) -> None:
        _alone.stream = self._alone_stream
        with self._turns:
            super()._serve_single(request, stream)


class _OneStep:
    """mlx-lm's budget of time, as one step of the batch for each turn."""

    def __init__(self, turns: AbstractContextManager[Any]):
        self._turns = turns

    def __iter__(self) -> Iterator[None]:
        with self._turns:
            yield
