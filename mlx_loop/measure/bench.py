"""How fast prompts are processed and tokens generated, as mlx_lm.benchmark measures it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation.generate import stream_generate
from ..models.looped import Looped


@dataclass(frozen=True)
class Speed:
    """Of one run.

    Args:
        prompt_tps, generation_tps: tokens per second, of all prompts of a batch together.
        peak_memory: GB.
        total_time: seconds.
    """

    prompt_tps: float
    generation_tps: float
    peak_memory: float
    total_time: float


def bench(
    views: Sequence[Looped],
    tokenizer: TokenizerWrapper,
    prompt_tokens: int,
    generation_tokens: int,
    batch_size: int,
    trials: int,
    prefill_step_size: int,
    delay: float = 0,
) -> Iterator[list[Speed]]:
    """Trials, each with the speed of every view, after a run that warms up and is not counted.

    Views take turns, so what slows the machine down for a while slows them all. Prompts are
    random tokens, and no token ends an answer: `tokenizer` is changed.

    Args:
        delay: seconds between two runs.
    """
    mx.random.seed(0)
    tokenizer.eos_token_ids = ()
    shape = batch_size, prompt_tokens
    prompts = cast(list[list[int]], mx.random.randint(0, tokenizer.vocab_size, shape).tolist())

    def one(view: Looped) -> Speed:
        mx.reset_peak_memory()
        start = time.perf_counter()
        found: Any
        if batch_size == 1:
            *_, found = stream_generate(
                view,
                tokenizer,
                prompts[0],
                generation_tokens,
                prefill_step_size=prefill_step_size,
            )
        else:
            found = mlx_lm.batch_generate(
                view,
                tokenizer,
                prompts,
                max_tokens=generation_tokens,
                prefill_step_size=prefill_step_size,
            ).stats
        spent = time.perf_counter() - start
        return Speed(found.prompt_tps, found.generation_tps, found.peak_memory, spent)

    for trial in range(trials + 1):
        speeds = []
        for view in views:
            if trial:
                time.sleep(delay)
            speeds.append(one(view))
        if trial:
            yield speeds
