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
from ..foreign import check_text, foreseen
from ..method.cache import leaves, tokens_seen
from ..models.looped import Looped
from ..upstream import ROTATING_KEEP

Prompt = str | Sequence[int] | mx.array


def encode(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids; a text that starts with the tokenizer's own first token does not get another."""
    if isinstance(prompt, mx.array):
        return [int(token) for token in prompt]
    if not isinstance(prompt, str):
        return list(prompt)
    check_text(prompt)
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
        messages: of `role` and `content`. If the last one is the assistant's, its answer goes on.
        system: the system message, which comes first.
        template: more arguments for the chat template.
        answer: how the answer begins, given to the model.
    """
    asked = [{"role": "system", "content": system}, *messages] if system else messages
    if not tokenizer.has_chat_template:
        text = "\n".join(message["content"] for message in asked)
        return encode(tokenizer, f"{text} {answer}".rstrip() if answer else text)
    if system and not takes_system(tokenizer, template):
        raise UserError(
            "this model's chat template takes no system message: leave it out, or put it before "
            "the question"
        )
    return _tokens(tokenizer, _text(tokenizer, asked, template) + answer)


def takes_system(
    tokenizer: TokenizerWrapper, template: Mapping[str, Any] = MappingProxyType({})
) -> bool:
    """Whether the chat template neither refuses a system message nor leaves it out."""
    system = {"role": "system", "content": _PLACEHOLDER}
    try:
        return _PLACEHOLDER in _text(tokenizer, [system, _question("?")], template)
    except UserError:
        _text(tokenizer, [_question("?")], template)  # What fails without one too is told.
        return False


def thought_marks(tokenizer: TokenizerWrapper) -> tuple[str, str] | None:
    """What begins a model's thoughts, and what ends them; None: nothing that is known."""
    if tokenizer.has_thinking:
        return tokenizer.think_start, tokenizer.think_end
    if "<|channel|>" in tokenizer.get_vocab():
        return _ANALYSIS
    return None


# Of gpt-oss, whose channels mlx-lm does not call thinking.
_ANALYSIS = (
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
)


def opening(tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    """Token ids of a user's message that begins with `prompt`, for a cache; `rest` goes on."""
    if not tokenizer.has_chat_template:
        return encode(tokenizer, prompt)
    before, _ = _around(tokenizer, {})
    return _tokens(tokenizer, before + prompt)


def rest(
    tokenizer: TokenizerWrapper,
    prompt: str,
    template: Mapping[str, Any] = MappingProxyType({}),
    answer: Sequence[Mapping[str, str]] = (),
) -> list[int]:
    """Token ids of the rest of a user's message, up to where the answer begins, or goes on.

    Args:
        template: more arguments for the chat template.
        answer: its beginning, as a message of the assistant; or nothing.
    """
    after = ""
    if tokenizer.has_chat_template:
        _, after = _around(tokenizer, template, answer)
    return _tokens(tokenizer, prompt + after)


# Stands for a prompt while the template's text around it is looked for.
_PLACEHOLDER = "<query>"
# What the templates of a few models need; nested loops in a hostile one have no end.
TEMPLATE_SECONDS = 10
# Arguments that say what comes out, not what is in it.
RESERVED = (
    "conversation messages tokenize add_generation_prompt continue_final_message padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs"
).split()


def _question(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _around(
    tokenizer: TokenizerWrapper,
    template: Mapping[str, Any],
    answer: Sequence[Mapping[str, str]] = (),
) -> tuple[str, str]:
    """The template's text before a user's message and after it."""
    text = _text(tokenizer, [_question(_PLACEHOLDER), *answer], template)
    parts = text.split(_PLACEHOLDER)
    if len(parts) != 2:
        raise UserError(
            "this model's chat template does not show a message once, as it is: a prompt cannot "
            "be taken apart"
        )
    return parts[0], parts[1]


def _text(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, str]],
    template: Mapping[str, Any],
) -> str:
    for name in RESERVED:
        if name in template:
            raise UserError(f"{name} in --chat-template-config is not the template's: leave it out")
    with foreseen("this model's chat template fails", TEMPLATE_SECONDS):
        goes_on = messages[-1]["role"] == "assistant"
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                tokenize=False,
                **template,
            )
        )


def _tokens(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    check_text(text)
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def check_tokens(model: Looped, *rows: Sequence[int]) -> None:
    """Refuse tokens that the model has no embedding for: MLX would read whatever lies there.

    Raises:
        UserError: there is one in `rows`.
    """
    count = model.vocabulary
    worst = max((max(row, default=0) for row in rows), default=0)
    if count is not None and worst >= count:
        raise UserError(
            f"the tokenizer gives token {worst} and the model knows {count}: it is not the "
            "tokenizer of this model"
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
    check_tokens(model, tokens)
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


def check_room(cache: Sequence[Any], tokens: Sequence[int]) -> None:
    """Refuse to go on with more of a prompt than a rotating cache holds of it.

    Raises:
        UserError: its beginning would be dropped.
    """
    sizes = [
        leaf.max_size
        for leaf in leaves(cache)
        if isinstance(leaf, RotatingKVCache) and leaf.keep == ROTATING_KEEP
    ]
    whole = (tokens_seen(cache) or 0) + len(tokens)
    if sizes and whole > min(sizes):
        raise UserError(
            f"the prompt has {whole} tokens in all and the cache keeps {min(sizes)}: make it with "
            "a greater --max-kv-size, or shorten the prompt"
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
