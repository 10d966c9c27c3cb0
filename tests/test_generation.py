"""Generation with a looped model under any setting."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import pytest

import mlx_loop
from mlx_loop import LoopConfig, UserError


@pytest.fixture(scope="module")
def demo():
    return mlx_loop.load("demo", dtype="float32")


def prompt_for(tokenizer, text="What is 12 + 30?"):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )


@pytest.mark.parametrize("loop", [None, LoopConfig(), LoopConfig(cache="own", scope="layer")])
def test_it_is_mlx_lms_generation_where_every_token_loops(demo, loop):
    model, tokenizer = demo
    model = model.with_loop(loop)
    prompt = prompt_for(tokenizer)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=20)
    assert mlx_loop.generate(model, tokenizer, prompt, max_tokens=20) == expected


def test_a_text_and_its_tokens_are_the_same_prompt(demo):
    model, tokenizer = demo
    text = "hello there"
    for prompt in (text, tokenizer.encode(text), mx.array(tokenizer.encode(text))):
        answer = mlx_loop.generate(model, tokenizer, prompt, max_tokens=8)
        assert answer == mlx_lm.generate(model, tokenizer, text, max_tokens=8)


@pytest.mark.parametrize("bits", [None, 8])
def test_bypass_loops_the_prompt_and_nothing_else(demo, bits):
    model, tokenizer = demo
    prompt = prompt_for(tokenizer)
    calls = []

    def spy(x, between=None):
        calls.append(x.shape[1])

    bypass = model.with_loop(LoopConfig(loops=3, decode="bypass", window=(4, 5)))
    layer = bypass.layers[4]

    class Counted:
        def __getattr__(self, name):
            return getattr(layer, name)

        def __call__(self, x, *args):
            spy(x)
            return layer(x, *args)

    bypass.model.layers[4] = Counted()
    try:
        kv = {} if bits is None else {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": 4}
        list(mlx_loop.stream_generate(bypass, tokenizer, prompt, max_tokens=4, **kv))
    finally:
        bypass.model.layers[4] = layer
    length = len(prompt)
    # mlx-lm feeds all but the last prompt token, that token, and then what it generates.
    calls = calls[calls.index(length - 1) :]
    assert calls[:6] == [length - 1] * 3 + [1] * 3
    assert set(calls[6:]) == {1}
    assert 3 <= len(calls[6:]) <= 5


def test_max_kv_size_is_honoured_under_every_policy(demo):
    model, tokenizer = demo
    prompt = prompt_for(tokenizer)
    for policy in ("first", "last", "own"):
        looped = model.with_loop(LoopConfig(cache=policy))
        cache = mlx_loop.make_prompt_cache(looped, max_kv_size=32)
        answer = mlx_loop.generate(
            looped, tokenizer, prompt, max_tokens=40, prompt_cache=cache, max_kv_size=32
        )
        assert answer
        assert max(entry.size() for entry in cache) <= 32


def test_a_prompt_longer_than_the_rotating_cache_is_refused(demo):
    model, tokenizer = demo
    with pytest.raises(UserError, match=r"prompt has .* tokens and the cache keeps 8"):
        mlx_loop.generate(model, tokenizer, prompt_for(tokenizer), max_kv_size=8)


@pytest.mark.parametrize("size", [1, 4])
def test_a_rotating_cache_needs_room_beyond_what_it_always_keeps(demo, size):
    with pytest.raises(UserError, match="too small"):
        mlx_loop.make_prompt_cache(demo[0], max_kv_size=size)


def test_an_empty_prompt_is_refused(demo):
    model, tokenizer = demo
    with pytest.raises(UserError, match="empty"):
        mlx_loop.generate(model, tokenizer, [])


def test_a_group_that_does_not_divide_the_heads_is_refused_with_one_that_does(demo):
    model, tokenizer = demo
    with pytest.raises(UserError, match="numbers: use 32"):
        mlx_loop.generate(model, tokenizer, "hello", kv_bits=8)


def test_prompts_are_fed_in_smaller_steps_when_the_cache_is_quantised():
    model, tokenizer = mlx_loop.load("demo", loop=None, dtype="float32")
    seen = []
    for settings in ({}, {"kv_bits": 8, "kv_group_size": 32}):
        seen.append([])
        mlx_loop.generate(
            model,
            tokenizer,
            [5] * 600,
            max_tokens=1,
            prompt_progress_callback=lambda done, total: seen[-1].append(done),
            **settings,
        )
    assert seen == [[0, 599, 600], [0, 512, 599, 600]]
