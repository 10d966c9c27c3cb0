"""Generation: mlx-lm's own, told where the prompt ends, or speculative."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError
from ..method.cache import tokens_seen
from ..models.looped import Looped
from ..upstream import ROTATING_KEEP
from .prefill import prefill_step
from .prompt import Prompt, check_prompt, encode
from .sampling import Sampler, check_finite
from .speculative import (
    Drafter,
    LookupDraft,
    ModelDraft,
    SelfDraft,
    is_its_own_draft,
    speculative_generate_step,
)

LOOKS_EVERY = 32  # tokens: looking waits for the device


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
    draft: str | nn.Module | Drafter | None = None,
    context: Sequence[int] = (),
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """mlx-lm's `stream_generate` for a looped model under any `decode` setting.

    Args:
        prompt: a text, or token ids.
        prompt_cache: what came before; it is updated. None: nothing.
        draft: speculative decoding (`mlx_loop.generation.speculative`), with the same tokens or,
            sampled, from the same distribution: `self`, the un-looped model drafts; `lookup`, the
            text so far does; or a small model with the same tokens.
        context: the tokens in `prompt_cache`, which `lookup` and a model draft from.
        kwargs: whatever mlx-lm's `stream_generate` takes; with a draft, what
            `speculative_generate_step` does. With `kv_bits`, `prefill_step_size` is 512 unless it
            is given (`prefill.prefill_step`).

    Raises:
        UserError: as `check_prompt`, and `speculative.check_drafts` where something drafts.
    """
    if "draft_model" in kwargs:
        raise UserError("pass the draft model as draft, not as draft_model")
    tokens = encode(tokenizer, prompt)
    if prompt_cache is None:
        prompt_cache = make_prompt_cache(model, max_kv_size)
    kv_bits = kwargs.get("kv_bits")
    check_prompt(model, tokens, prompt_cache, max_kv_size, kv_bits, kwargs.get("kv_group_size", 64))
    kwargs.setdefault("prefill_step_size", prefill_step(kv_bits))
    view = model.for_prompt(prompt_cache, len(tokens))
    if draft is None or is_its_own_draft(model, draft):
        kwargs.pop("num_draft_tokens", None)
        yield from _finite(
            model,
            mlx_lm.stream_generate(
                view,
                tokenizer,
                tokens,
                max_tokens,
                prompt_cache=prompt_cache,
                **kwargs,
            ),
        )
        return
    drafter = _drafter(draft)
    _check_draft(drafter, prompt_cache, context, kwargs)
    clock = _Clock(kwargs.pop("prompt_progress_callback", None))
    steps = speculative_generate_step(
        tokens,
        view,
        drafter,
        prompt_cache=prompt_cache,
        context=context,
        max_tokens=max_tokens,
        prompt_progress_callback=clock,
        **kwargs,
    )
    with wired_limit(model, [generation_stream]):  # type: ignore[list-item]
        responses = _responses(steps, tokenizer, clock, len(tokens), max_tokens)
        yield from _finite(model, responses)


def _finite(
    model: Looped, responses: Generator[GenerationResponse, None, None]
) -> Generator[GenerationResponse, None, None]:
    """The same, looked at now and then: NaN stays in a cache once it is there."""
    with closing(responses):
        for n, response in enumerate(responses):
            if n % LOOKS_EVERY == 0 or response.finish_reason is not None:
                check_finite(model.loop, response.logprobs[..., response.token])
            yield response


def _drafter(draft: str | nn.Module | Drafter) -> Drafter:
    if draft == "self":
        return SelfDraft()
    if draft == "lookup":
        return LookupDraft()
    if isinstance(draft, str):
        raise UserError(f"draft={draft!r} is not valid: it must be 'self', 'lookup' or a model")
    return ModelDraft(draft) if isinstance(draft, nn.Module) else draft


def _check_draft(
    drafter: Drafter, cache: list[Any], context: Sequence[int], kwargs: dict[str, Any]
) -> None:
    if not isinstance(kwargs.get("sampler") or Sampler(), Sampler):
        raise UserError(
            "drafting needs to know the distribution that tokens are drawn from: pass as "
            "sampler a mlx_loop.generation.sampling.Sampler, whose arguments are those of mlx-lm's "
            "make_sampler"
        )
    for name in ("logits_processors", "input_embeddings"):
        if kwargs.get(name) is not None:
            raise UserError(f"{name} do not work with a draft: use no draft, or leave them out")
    if isinstance(drafter, ModelDraft) and tokens_seen(cache) != len(context):
        raise UserError("a draft model has to read what is in prompt_cache: pass it as context")


class _Clock:
    """Told of a prompt's progress, it knows when the prompt was done with, in seconds.

    The first round of drafts brings many tokens, so its time may not count for the prompt.
    """

    def __init__(self, watched: Callable[[int, int], None] | None):
        self.start = self.processed = time.perf_counter()
        self._watched = watched

    def __call__(self, done: int, total: int) -> None:
        self.processed = time.perf_counter()
        if self._watched is not None:
            self._watched(done, total)


def _responses(
    steps: Generator[tuple[int, mx.array, bool], None, None],
    tokenizer: TokenizerWrapper,
    clock: _Clock,
    prompt_tokens: int,
    max_tokens: int,
) -> Generator[GenerationResponse, None, None]:
    """What mlx-lm's `stream_generate` makes of tokens; it takes no generator but its own."""
    detokenizer = tokenizer.detokenizer
    with closing(steps):
        for n, (token, logprobs, from_draft) in enumerate(steps, 1):
            reason = "length" if n == max_tokens else None
            if token in tokenizer.eos_token_ids:
                reason = "stop"
            else:
                detokenizer.add_token(token)
            if reason:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=logprobs,
                from_draft=from_draft,
                prompt_tokens=prompt_tokens,
                prompt_tps=prompt_tokens / (clock.processed - clock.start),
                generation_tokens=n,
                generation_tps=n / (time.perf_counter() - clock.processed),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=reason,
            )
            if reason:
                return


def generate(
    model: Looped,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """The whole answer as text. Other arguments as in `stream_generate`.

    Args:
        verbose: print the answer as it comes, and speeds and memory after it, as mlx-lm does.
    """
    texts = []
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        texts.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print("", "=" * 10, sep="\n")
    if verbose and not any(texts):
        print("No text generated for this prompt")
    elif verbose:
        for name, count, speed in (
            ("Prompt", response.prompt_tokens, response.prompt_tps),
            ("Generation", response.generation_tokens, response.generation_tps),
        ):
            print(f"{name}: {count} tokens, {speed:.3f} tokens-per-sec")
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    return "".join(texts)
