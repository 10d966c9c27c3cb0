"""Prompts: their tokens, and whether a model can take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError
from ..method.cache import leaves
from ..models.looped import Looped

Prompt = str | Sequence[int] | mx.array


def encode(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids; a text that starts with the tokenizer's own first token does not get another."""
    if isinstance(prompt, mx.array):
        return [int(token) for token in prompt]
    if not isinstance(prompt, str):
        return list(prompt)
    bos = tokenizer.bos_token
    special = bos is None or not prompt.startswith(bos)
    # Not verbose: it would warn of lengths beyond the trained one, which may be meant.
    return tokenizer.encode(prompt, add_special_tokens=special, verbose=False)


def render(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, str]],
    system: str | None = None,
    template: Mapping[str, Any] = MappingProxyType({}),
    answer: str = "",
) -> list[int]:
    """Token ids of a conversation, up to where the model's answer begins.

    Without a chat template they are the messages as a text like any other.

    Args:
        messages: of `role` and `content`.
        system: the system message, which comes first.
        template: more arguments for the chat template.
        answer: how the answer begins, given to the model.
    """
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    if not tokenizer.has_chat_template:
        text = "\n".join(message["content"] for message in messages)
        return encode(tokenizer, f"{text} {answer}".rstrip() if answer else text)
    return _tokens(tokenizer, _text(tokenizer, messages, template) + answer)


def opening(tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    """Token ids of a user's message that begins with `prompt`, for a cache; `rest` goes on."""
    if not tokenizer.has_chat_template:
        return encode(tokenizer, prompt)
    before, _, _ = _text(tokenizer, _MESSAGE, {}).partition(_PLACEHOLDER)
    return _tokens(tokenizer, before + prompt)


def rest(
    tokenizer: TokenizerWrapper, prompt: str, template: Mapping[str, Any] = MappingProxyType({})
) -> list[int]:
    """Token ids of the rest of a user's message, up to where the answer begins."""
    after = ""
    if tokenizer.has_chat_template:
        _, _, after = _text(tokenizer, _MESSAGE, template).partition(_PLACEHOLDER)
    return _tokens(tokenizer, prompt + after)


# Stands for a prompt while the template's text around it is looked for.
_PLACEHOLDER = "<query>"
_MESSAGE = [{"role": "user", "content": _PLACEHOLDER}]


def _text(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, str]],
    template: Mapping[str, Any],
) -> str:
    return tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=True,
        tokenize=False,
        **template,
    )


def _tokens(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


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
    if any(isinstance(leaf, RotatingKVCache) for leaf in leaves(cache)):
        raise UserError(
            "--kv-bits (kv_bits) does not work with a rotating cache, which --max-kv-size and "
            "sliding-window layers need: leave one of them out"
        )
    if not reads_quantised_cache(model):
        raise UserError(f"--kv-bits (kv_bits) does not work with {model.model_type}: leave it out")
    wrong = [size for size in _head_sizes(model) if size % kv_group_size]
    if wrong:
        raise UserError(
            f"--kv-group-size (kv_group_size) {kv_group_size} does not divide this model's keys "
            f"and values of {wrong[0]} numbers: use {math.gcd(wrong[0], 128)}"
            if wrong[0] % 32 == 0
            else f"--kv-bits (kv_bits) needs keys and values of whole groups of 32 numbers, and "
            f"this model's have {wrong[0]}: leave it out"
        )


def reads_quantised_cache(model: Looped) -> bool:
    """Whether mlx-lm's model has keys and values that `kv_bits` quantises, and reads them then."""
    cache = model.with_loop(None).new_cache()
    if not any(type(entry) is KVCache for entry in cache) or CacheList in map(type, cache):
        return False
    for i, entry in enumerate(cache):
        if type(entry) is KVCache:
            cache[i] = QuantizedKVCache(group_size=32)
    try:
        for length in (2, 1):
            model.with_loop(None)(mx.zeros((1, length), mx.int32), cache=cache)
    except (TypeError, ValueError, AttributeError):
        return False
    return True


def _head_sizes(model: Looped) -> set[int]:
    """Numbers in a cached key and in a value."""
    view = model.with_loop(None)
    cache = view.new_cache()
    view(mx.zeros((1, 1), mx.int32), cache=cache)
    arrays = [getattr(leaf, name, None) for leaf in leaves(cache) for name in ("keys", "values")]
    return {array.shape[-1] for array in arrays if array is not None}
