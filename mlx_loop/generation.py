"""Generation: mlx-lm's own, told where the prompt ends."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .cache import ROTATING_KEEP, histories
from .errors import UserError
from .loop import Looped
from .memory import head_sizes, prefill_step

Prompt = str | Sequence[int] | mx.array


def make_prompt_cache(model: Looped, max_kv_size: int | None = None) -> list[Any]:
    """An empty cache for `model` with the loop settings that it has now.

    As mlx-lm's function of that name, which also works, but `max_kv_size` holds for every model
    and key/value policy.

    Args:
        max_kv_size: keep the first 4 and the latest tokens, this many in all. None: keep all.
    """
    if max_kv_size is not None and max_kv_size <= ROTATING_KEEP:
        raise UserError(f"max_kv_size={max_kv_size} is too small: it must be over {ROTATING_KEEP}")
    return model.new_cache(max_kv_size)


def stream_generate(
    model: Looped,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    draft_model: Any = None,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """mlx-lm's `stream_generate` for a looped model under any `decode` setting.

    Args:
        prompt: a text, or token ids.
        prompt_cache: what came before; it is updated. None: nothing.
        kwargs: whatever mlx-lm's `stream_generate` takes. With `kv_bits`, `prefill_step_size` is
            512 unless it is given (`memory.prefill_step`).

    Raises:
        UserError: as `check_prompt`.
    """
    tokens = encode(tokenizer, prompt)
    if prompt_cache is None:
        prompt_cache = make_prompt_cache(model, max_kv_size)
        if draft_model is not None:
            prompt_cache += mlx_lm_make_prompt_cache(draft_model)
    kv_bits = kwargs.get("kv_bits")
    check_prompt(model, tokens, prompt_cache, max_kv_size, kv_bits, kwargs.get("kv_group_size", 64))
    kwargs.setdefault("prefill_step_size", prefill_step(kv_bits))
    yield from mlx_lm.stream_generate(
        model.for_prompt(prompt_cache, len(tokens)),
        tokenizer,
        tokens,
        max_tokens,
        prompt_cache=prompt_cache,
        draft_model=draft_model,
        **kwargs,
    )


def check_prompt(
    model: Looped,
    tokens: Sequence[int],
    cache: Sequence[Any],
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> None:
    """Refuse what mlx-lm would answer with an exception, or by dropping part of the prompt.

    Raises:
        UserError: an empty prompt, one longer than a rotating cache holds, or a cache that mlx-lm
            cannot quantise.
    """
    if not tokens:
        raise UserError("the prompt is empty: give at least one token")
    if max_kv_size is not None and len(tokens) > max_kv_size:
        raise UserError(
            f"the prompt has {len(tokens)} tokens and the cache keeps {max_kv_size}: raise "
            "--max-kv-size (max_kv_size) or shorten the prompt"
        )
    if kv_bits is None:
        return
    if not model.quantised_cache:
        raise UserError(f"--kv-bits (kv_bits) does not work with {model.model_type}: leave it out")
    if any(isinstance(c, RotatingKVCache) for entry in cache for c in histories(entry)):
        raise UserError(
            "--kv-bits (kv_bits) does not work with a rotating cache, which --max-kv-size and "
            "sliding-window layers need: leave one of them out"
        )
    wrong = [size for size in head_sizes(model) if size % kv_group_size]
    if wrong:
        raise UserError(
            f"--kv-group-size (kv_group_size) {kv_group_size} does not divide this model's keys "
            f"and values of {wrong[0]} numbers: use {math.gcd(wrong[0], 128)}"
            if wrong[0] % 32 == 0
            else f"--kv-bits (kv_bits) needs keys and values of whole groups of 32 numbers, and "
            f"this model's have {wrong[0]}: leave it out"
        )


def generate(model: Looped, tokenizer: TokenizerWrapper, prompt: Prompt, **kwargs: Any) -> str:
    """The whole answer as text. Arguments as in `stream_generate`."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, **kwargs))


def encode(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids; a text that starts with the tokenizer's own first token does not get another."""
    if isinstance(prompt, mx.array):
        return [int(token) for token in prompt]
    if not isinstance(prompt, str):
        return list(prompt)
    bos = tokenizer.bos_token
    return tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
