"""`decode`: which tokens loop, and that nobody guesses where the prompt ends."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest
from conftest import tokens
from mlx_lm.generate import (
    batch_generate,
    generate_step,
    maybe_quantize_kv_cache,
    speculative_generate_step,
)
from mlx_lm.models.cache import make_prompt_cache

from mlx_loop import LoopConfig, UserError

POLICIES = ("first", "last", "own")
PROMPT, GENERATED = 9, 6


@pytest.fixture
def text():
    return tokens(1, PROMPT + GENERATED)


def spelled_out(model, text, policy, looped_tokens):
    """Logits when the first tokens run under looping settings and the others, with the same
    cache, one by one under settings that loop nothing.
    """
    loop = LoopConfig(loops=3, cache=policy)
    looped = model.with_loop(loop)
    cache = make_prompt_cache(looped)
    outs = [looped(text[:, : PROMPT - 1], cache=cache)]
    for i in range(PROMPT - 1, PROMPT + GENERATED):
        view = looped if i < looped_tokens else never_looping(model, policy)
        outs.append(view(text[:, i : i + 1], cache=cache))
    return mx.concatenate(outs, axis=1)


def never_looping(model, policy):
    if policy != "own":
        return model
    view = model.with_loop(LoopConfig(loops=3, cache=policy, decode="bypass"))
    view._prompt_end = 0
    return view


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("decode", "count"), [("full", 99), ("bypass", 0), (0, 0), (2, 2)])
def test_generated_tokens_loop_as_far_as_decode_says(model, text, policy, decode, count):
    looped = model.with_loop(LoopConfig(loops=3, cache=policy, decode=decode))
    cache = make_prompt_cache(looped)
    # As mlx-lm feeds it: the prompt, then its last token alone.
    outs = [looped(text[:, : PROMPT - 1], cache=cache)]
    outs.append(looped(text[:, PROMPT - 1 : PROMPT], cache=cache))
    looped.begin_decode(cache)
    outs += [looped(text[:, i : i + 1], cache=cache) for i in range(PROMPT, PROMPT + GENERATED)]
    expected = spelled_out(model, text, policy, PROMPT + count)
    assert mx.array_equal(mx.concatenate(outs, axis=1), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_call_that_straddles_the_end_of_the_prompt_is_split_there(model, text, policy):
    looped = model.with_loop(LoopConfig(loops=3, cache=policy, decode=2))
    cache = make_prompt_cache(looped)
    view = looped.for_prompt(cache, PROMPT)
    found = mx.concatenate(
        [view(text[:, : PROMPT - 1], cache=cache), view(text[:, PROMPT - 1 :], cache=cache)], axis=1
    )
    cache = make_prompt_cache(looped)
    pieces = [
        looped(text[:, : PROMPT - 1], cache=cache),
        model.with_loop(LoopConfig(loops=3, cache=policy))(
            text[:, PROMPT - 1 : PROMPT + 2], cache=cache
        ),
        never_looping(model, policy)(text[:, PROMPT + 2 :], cache=cache),
    ]
    assert mx.array_equal(found, mx.concatenate(pieces, axis=1))


@pytest.mark.parametrize("policy", ["first", "last"])
def test_a_bypassed_token_keeps_the_entries_of_its_plain_pass(model, text, policy):
    looped = model.with_loop(LoopConfig(loops=3, cache=policy, decode="bypass"))
    cache = make_prompt_cache(looped)
    looped(text[:, :PROMPT], cache=cache)
    looped.begin_decode(cache)
    copies = copy.deepcopy(cache)
    looped(text[:, PROMPT : PROMPT + 1], cache=cache)
    model(text[:, PROMPT : PROMPT + 1], cache=copies)
    for entry, other in zip(cache, copies, strict=True):
        assert mx.array_equal(
            entry.keys[..., : entry.offset, :], other.keys[..., : other.offset, :]
        )


def test_under_own_a_bypassed_token_stands_in_every_history(model, text):
    looped = model.with_loop(LoopConfig(window=(2, 6), loops=3, cache="own", decode="bypass"))
    cache = make_prompt_cache(looped)
    looped(text[:, :PROMPT], cache=cache)
    looped.begin_decode(cache)
    looped(text[:, PROMPT : PROMPT + 1], cache=cache)
    first, *others = cache[3].caches
    assert first.offset == PROMPT + 1
    for other in others:
        assert other.offset == PROMPT + 1
        assert mx.array_equal(other.keys[..., PROMPT, :], first.keys[..., PROMPT, :])
        assert not mx.array_equal(other.keys[..., PROMPT - 1, :], first.keys[..., PROMPT - 1, :])


def test_the_next_prompt_loops_again(model, text):
    looped = model.with_loop(LoopConfig(loops=3, decode="bypass"))
    full = model.with_loop(LoopConfig(loops=3))
    cache, other = make_prompt_cache(looped), make_prompt_cache(full)
    for c, view in ((cache, looped), (other, full)):
        view(text[:, :PROMPT], cache=c)
    looped.begin_decode(cache)
    looped(text[:, :1], cache=cache)
    model(text[:, :1], cache=other)
    assert mx.array_equal(looped(text[:, :4], cache=cache), full(text[:, :4], cache=other))
    # Its last token alone, which nobody has announced as generated.
    assert mx.array_equal(looped(text[:, :1], cache=cache), full(text[:, :1], cache=other))


@pytest.mark.parametrize("decode", ["bypass", 3])
def test_plain_mlx_lm_generation_is_refused_and_never_guesses(model, decode):
    looped = model.with_loop(LoopConfig(loops=3, decode=decode))
    for length in (1, 2, 9):
        with pytest.raises(UserError, match="begin_decode"):
            list(generate_step(tokens(1, length)[0], looped, max_tokens=4))


def test_plain_mlx_lm_batches_are_refused_too(model):
    looped = model.with_loop(LoopConfig(loops=3, decode="bypass"))

    class Tokenizer:
        eos_token_ids = frozenset()

    with pytest.raises(UserError, match="begin_decode"):
        batch_generate(looped, Tokenizer(), [[3, 4, 5], [6, 7]], max_tokens=4)


@pytest.mark.parametrize("step", [1, 2, 3, 2048])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_for_prompt_is_right_for_every_prompt_length_and_chunk_size(model, length, step):
    # A chunk of one token before the last one looks just like decoding.
    looped = model.with_loop(LoopConfig(loops=3, decode="bypass", cache="own"))
    prompt = tokens(1, length)
    cache = make_prompt_cache(looped)
    view = looped.for_prompt(cache, length)
    found = [
        token
        for token, _ in generate_step(
            prompt[0], view, max_tokens=4, prompt_cache=cache, prefill_step_size=step
        )
    ]
    cache = make_prompt_cache(looped)
    logits = model.with_loop(LoopConfig(loops=3, cache="own"))(prompt, cache=cache)
    expected = [int(mx.argmax(logits[0, -1]))]
    for _ in range(3):
        logits = never_looping(model, "own")(mx.array([[expected[-1]]]), cache=cache)
        expected.append(int(mx.argmax(logits[0, -1])))
    assert found == expected


def test_speculative_decoding_knows_the_phase_of_each_drafted_token(model):
    looped = model.with_loop(LoopConfig(loops=3, decode=2, cache="own"))
    prompt = tokens(1, 9)[0]

    def generated(step, cache, **kwargs):
        view = looped.for_prompt(cache, prompt.size)
        return [out[0] for out in step(prompt, view, prompt_cache=cache, max_tokens=8, **kwargs)]

    expected = generated(generate_step, make_prompt_cache(looped))
    cache = make_prompt_cache(looped) + make_prompt_cache(model)
    found = generated(speculative_generate_step, cache, draft_model=model, num_draft_tokens=3)
    assert found == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_said_survives_the_quantisation_of_the_cache(model, text, policy):
    # KV quantisation puts another entry in the place of the one that was told of.
    looped = model.with_loop(LoopConfig(loops=3, cache=policy, decode="bypass"))
    cache = make_prompt_cache(looped)
    looped(text[:, :PROMPT], cache=cache)
    looped.begin_decode(cache)
    maybe_quantize_kv_cache(cache, 0, 32, 8)
    other = copy.deepcopy(cache)
    found = looped(text[:, PROMPT : PROMPT + 1], cache=cache)
    expected = never_looping(model, policy)(text[:, PROMPT : PROMPT + 1], cache=other)
    assert mx.array_equal(found, expected)
