"""Drafting changes when tokens come, never which: checks are exact, caches stay whole."""

from __future__ import annotations

import time
from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from conftest import SIZES, make, relative_error, tokens
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from scipy.stats import chisquare

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.generation.conversation import Conversation
from mlx_loop.generation.sampling import Sampler
from mlx_loop.generation.speculative import (
    LookupDraft,
    ModelDraft,
    Pace,
    SelfDraft,
    expected_tokens,
    round_passes,
    speculative_generate_step,
)
from mlx_loop.method.cache import leaves, tokens_seen
from mlx_loop.method.loop import Natural
from mlx_loop.models import halves

PROMPT = tokens(1, 9, seed=3)[0].tolist()
STORY = "Tell me a story."
DRAFTS = ("self", "lookup", "model")
TIED = {"tie_word_embeddings": True}
# Batched and single products round differently; the logits are of order 1.
ROUNDING = 1e-5


class Fixed(Pace):
    """Always as many drafts as there is room for."""

    def length(self, room):
        return min(self._most, room)


@pytest.fixture(scope="module")
def demo():
    return mlx_loop.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def looped(model):
    return model.with_loop(LoopConfig(window=(2, 5), loops=3))


def prompt_for(tokenizer, text=STORY):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )


def drafter(name, model):
    if name == "model":
        return ModelDraft(model.with_loop(None))
    return SelfDraft() if name == "self" else LookupDraft()


def steps(model, draft="self", prompt=PROMPT, cache=None, length=3, **settings):
    """A generator of (token, logprobs, from_draft) with rounds of a fixed length."""
    chosen = drafter(draft, model) if isinstance(draft, str) else draft
    settings.setdefault("pace", Fixed(1, 1, length))
    cache = model.new_cache() if cache is None else cache
    return speculative_generate_step(prompt, model, chosen, prompt_cache=cache, **settings)


def drafted(*args, **settings):
    return [token for token, *_ in steps(*args, **settings)]


def plain(model, prompt=PROMPT, max_tokens=20, **settings):
    return [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens, **settings)]


# --- The check ---


def fed_alone(model, text, cache):
    return mx.concatenate([model(text[:, i : i + 1], cache=cache) for i in range(text.shape[1])], 1)


def fed_as_drafts(model, text, cache):
    """As a round of self-drafting feeds it, the drafts being right."""
    *drafts, last = (text[:, i : i + 1] for i in range(text.shape[1]))
    parts = [halves.plain(model, draft, cache)[1] for draft in drafts]
    parts.append(halves.enter(model, last, cache))
    return halves.looped(model, text, cache, Natural.join(parts))


def fed_together(model, text, cache):
    return halves.looped(model, text, cache, halves.enter(model, text, cache))


def started(model):
    cache = model.new_cache()
    model(mx.array([PROMPT]), cache=cache)
    return cache


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def family(request):
    return make(request.param)


@pytest.mark.parametrize("feed", [fed_as_drafts, fed_together])
@pytest.mark.parametrize("scope", ["block", "layer"])
@pytest.mark.parametrize("policy", ["first", "own"])
def test_checked_tokens_are_as_if_each_had_been_fed_alone(family, policy, scope, feed):
    model = family.with_loop(LoopConfig(window=(2, 5), loops=3, cache=policy, scope=scope))
    text, more = tokens(1, 4, seed=4), mx.array([[7]])
    expected_cache, cache = started(model), started(model)
    expected = fed_alone(model, text, expected_cache)
    assert relative_error(feed(model, text, cache), expected) < ROUNDING
    # What it leaves in the cache is right as well.
    assert {leaf.offset for leaf in leaves(cache)} == {len(PROMPT) + 4}
    expected_next = model(more, cache=expected_cache)
    assert relative_error(model(more, cache=cache), expected_next) < ROUNDING


@pytest.mark.parametrize(
    "settings",
    [
        {"integrator": "uniform"},
        {"integrator": "rk4", "loops": 1},
        {"integrator": "anderson"},
        {"integrator": "aitken", "loops": 4},
        {"norm": "interpolated"},
        {"window": (0, 3)},
        {"window": (5, 8), "scope": "layer"},
    ],
)
def test_every_integrator_and_window_can_be_checked(model, settings):
    looped = model.with_loop(LoopConfig(**{"window": (2, 5), "loops": 3, **settings}))
    text = tokens(1, 4, seed=4)
    expected = fed_alone(looped, text, started(looped))
    assert relative_error(fed_as_drafts(looped, text, started(looped)), expected) < ROUNDING


def test_a_plain_call_with_several_tokens_is_no_check_under_first(looped):
    text = tokens(1, 4, seed=4)
    expected = fed_alone(looped, text, started(looped))
    assert relative_error(looped(text, cache=started(looped)), expected) > 1e-3


def test_drafts_are_the_unlooped_models_as_long_as_all_were_its_own(looped):
    text, cache = tokens(1, 4, seed=4), looped.new_cache()
    found = [halves.plain(looped, text[:, i : i + 1], cache)[0] for i in range(4)]
    assert mx.array_equal(
        mx.concatenate(found, 1), fed_alone(looped.with_loop(None), text, looped.new_cache())
    )


def test_frozen_routing_is_that_of_the_drafts_however_many_there_are():
    model = make("qwen3_moe").with_loop(
        LoopConfig(window=(2, 5), loops=3, scope="block", routing="frozen")
    )
    # From 32 tokens with two experts each mlx-lm sorts them by expert.
    text = tokens(1, 33, seed=4)
    expected = fed_alone(model, text, started(model))
    assert relative_error(fed_as_drafts(model, text, started(model)), expected) < ROUNDING


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_a_round_runs_the_layers_that_it_is_said_to_run(family, scope, monkeypatch):
    model = family.with_loop(LoopConfig(window=(2, 5), loops=6, scope=scope))
    runs = []
    cache = started(model)
    for kind in {type(layer) for layer in model.layers}:
        run = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda *args, run=run, **kw: runs.append(1) or run(*args, **kw)
        )
    stream = steps(model, prompt=[5], cache=cache, length=4)
    next(stream)
    stream.close()
    assert len(runs) == round_passes(model, 4) == 4 * 8 + 8 + 5 * 3


# --- Greedy decoding ---


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "loop",
    [
        LoopConfig(loops=3),
        LoopConfig(loops=6, scope="layer", cache="own"),
        None,
    ],
)
def test_greedy_tokens_are_those_of_plain_looped_decoding(demo, loop, draft):
    model, tokenizer = demo[0].with_loop(loop), demo[1]
    prompt = prompt_for(tokenizer)
    chosen = demo[0].with_loop(None) if draft == "model" else draft
    expected = list(mlx_loop.stream_generate(model, tokenizer, prompt, 28))
    found = list(mlx_loop.stream_generate(model, tokenizer, prompt, 28, draft=chosen))
    assert [r.token for r in found] == [r.token for r in expected]
    assert "".join(r.text for r in found) == "".join(r.text for r in expected)
    assert found[-1].finish_reason == expected[-1].finish_reason
    assert found[-1].generation_tokens == expected[-1].generation_tokens
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a.logprobs, b.logprobs) < ROUNDING


@pytest.mark.parametrize("name", ["demo-moe", "demo-mla"])
def test_greedy_tokens_of_models_with_experts(name):
    model, tokenizer = mlx_loop.load(name, dtype="float32")
    prompt = prompt_for(tokenizer)
    expected = mlx_loop.generate(model, tokenizer, prompt, max_tokens=24)
    assert mlx_loop.generate(model, tokenizer, prompt, max_tokens=24, draft="self") == expected


def test_wrong_drafts_change_nothing(looped):
    expected = plain(looped)
    for length in (1, 2, 5):
        found = list(steps(looped, length=length, max_tokens=20))
        assert [token for token, *_ in found] == expected
        # A random model's loops change its tokens: the test has rejections in it.
        assert not all(from_draft for *_, from_draft in found[:-1])
    assert drafted(looped, draft=ModelDraft(make("qwen3", seed=1)), max_tokens=20) == expected


def test_one_loop_is_drafted_too(looped):
    once = looped.with_loop(LoopConfig(loops=1))
    assert drafted(once, max_tokens=20) == plain(once)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_token_too_many(looped, limit):
    cache = looped.new_cache()
    assert drafted(looped, cache=cache, max_tokens=limit, length=8) == plain(looped)[:limit]
    assert tokens_seen(cache) < len(PROMPT) + limit


@pytest.mark.parametrize("step", [1, 4])
def test_prompts_are_fed_in_mlx_lms_chunks(looped, step):
    assert drafted(looped, max_tokens=8, prefill_step_size=step) == plain(
        looped, max_tokens=8, prefill_step_size=step
    )


def test_the_first_round_counts_as_generation_and_not_as_prompt(demo):
    model, tokenizer = demo

    class Slow(SelfDraft):
        def draft(self, *args):
            time.sleep(0.3)
            return super().draft(*args)

    *_, last = mlx_loop.stream_generate(model, tokenizer, "hello", 4, draft=Slow())
    assert last.generation_tps < last.generation_tokens / 0.3
    assert last.prompt_tokens / last.prompt_tps < 0.3


@pytest.mark.parametrize("start", [0, len(PROMPT) + 6])
def test_quantised_keys_and_values(looped, start):
    kv = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    cache = looped.new_cache()
    assert drafted(looped, cache=cache, max_tokens=20, **kv) == plain(looped, **kv)
    assert {type(entry).__name__ for entry in cache} == {"QuantizedKVCache"}


def test_a_prompt_cache_from_a_file(demo, tmp_path):
    model, tokenizer = demo
    prompt = prompt_for(tokenizer)
    cache = mlx_loop.make_prompt_cache(model)
    model(mx.array([prompt[:-4]]), cache=cache)
    file = tmp_path / "cache.safetensors"
    mlx_loop.save_prompt_cache(file, cache, model)
    answers = []
    for draft in (None, "self"):
        loaded, _ = mlx_loop.load_prompt_cache(file, model)
        answers.append(
            mlx_loop.generate(
                model, tokenizer, prompt[-4:], max_tokens=20, prompt_cache=loaded, draft=draft
            )
        )
    assert answers[0] == answers[1]


# --- Sampling ---


def pair_probabilities(model, prompt):
    """How likely each pair of tokens is after `prompt`, (vocab, vocab)."""
    pairs = []
    for i in range(model.args.vocab_size):
        cache = model.new_cache()
        model(mx.array([prompt[:-1]]), cache=cache)
        first, second = (
            mx.softmax(model(mx.array([[t]]), cache=cache)[0, 0]) for t in (prompt[-1], i)
        )
        pairs.append(np.array(first[i] * second, np.float64))
    return np.stack(pairs) / np.sum(pairs)


def test_sampled_text_has_the_looped_models_distribution():
    sizes = {**SIZES, "vocab_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 16}
    model = make("qwen3", **sizes)
    mx.random.seed(3)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.4, model.parameters()))
    looped = model.with_loop(LoopConfig(window=(0, 3), loops=4, integrator="naive"))
    runs, counts = 200, np.zeros((4, 4))
    for _ in range(runs):
        counts[tuple(drafted(looped, prompt=[1, 2], sampler=Sampler(temp=1), max_tokens=2))] += 1
    expected, drafts = (runs * pair_probabilities(m, [1, 2]) for m in (looped, model))
    assert chisquare(counts.ravel(), expected.ravel()).pvalue > 1e-3
    assert chisquare(counts.ravel(), drafts.ravel()).pvalue < 1e-6


def test_a_sampler_without_a_distribution_is_refused(demo):
    model, tokenizer = demo
    with pytest.raises(UserError, match="Sampler"):
        mlx_loop.generate(model, tokenizer, "hi", draft="self", sampler=make_sampler(0.7))


# --- How much is drafted ---


def test_right_drafts_make_rounds_longer_and_wrong_ones_end_them():
    pace = Pace(36, 56, 8)
    for _ in range(40):
        pace.record(kept=8, drafted=8)
    assert pace.length(100) == 8
    assert pace.length(3) == 3
    for _ in range(40):
        pace.record(kept=0, drafted=1)
    assert pace.length(100) == 0


def test_without_drafts_one_is_tried_again_after_a_while():
    pace = Pace(36, 56, 8)
    for _ in range(10):
        pace.record(kept=0, drafted=1)
    assert pace.length(8) == 0
    for _ in range(60):
        pace.record(kept=0, drafted=0)
    assert pace.length(8) > 0


def test_drafts_that_cannot_pay_off_are_not_made():
    # One loop more than none: even perfect drafts save little, so they must be nearly perfect.
    pace = Pace(36, 37, 8)
    assert pace.length(8) == 0
    assert expected_tokens(1.0, 8) == 9
    assert expected_tokens(0.5, 2) == 1.75


# --- Other drafts ---


def test_lookup_proposes_what_followed_the_latest_occurrence(model):
    text = [1, 2, 3, 4, 9, 2, 3, 5, 6, 7, 2, 3]
    draft = LookupDraft()
    assert draft.draft(model, [], text, 3, Sampler()).tokens.tolist() == [5, 6, 7]
    # Three tokens are a better guide than two, and the text has grown.
    assert draft.draft(model, [], [*text, 4, 1, 2, 3], 2, Sampler()).tokens.tolist() == [4, 9]
    assert draft.draft(model, [], [*text, 4, 1, 2, 3, 8], 2, Sampler()).tokens.size == 0


def test_a_draft_model_is_fed_each_token_once_from_text_to_text(model):
    fed = []

    class Spy(type(model)):
        def __call__(self, inputs, **kwargs):
            fed.append(inputs.shape[1])
            return super().__call__(inputs, **kwargs)

    spy = model.with_loop(None)
    spy.__class__ = Spy
    draft, looped = ModelDraft(spy), model.with_loop(LoopConfig(loops=3))
    cache = looped.new_cache()
    text = [*PROMPT, *drafted(looped, draft=draft, cache=cache, max_tokens=12)]
    fed.clear()
    rest = [*text[tokens_seen(cache) :], 5, 6]
    context = text[: tokens_seen(cache)]
    drafted(looped, draft=draft, prompt=rest, context=context, cache=cache, max_tokens=4)
    assert sum(fed) < len(PROMPT)


@pytest.mark.parametrize("vocab", [310, 330])
def test_a_draft_model_may_pad_its_vocabulary_to_another_size(model, vocab):
    sizes = SIZES | TIED | {"vocab_size": vocab, "num_hidden_layers": 2}
    draft = ModelDraft(make("qwen3", **sizes))
    logits = draft.draft(model, [], PROMPT, 2, Sampler(temp=1.0)).logits
    assert logits.shape == (2, 320)
    assert mx.all(mx.isfinite(logits[:, :310]))
    assert mx.all(mx.isfinite(logits[:, 310:])).item() == (vocab > 320)


# --- Stopped in the middle ---


@pytest.mark.parametrize("policy", ["first", "own"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_wherever_it_is_stopped_the_text_goes_on_as_if_nothing_had_been_drafted(
    model, draft, policy
):
    looped = model.with_loop(LoopConfig(window=(2, 5), loops=3, cache=policy))
    expected = plain(looped, max_tokens=12)
    for count in range(1, 7):
        cache = looped.new_cache()
        with closing(steps(looped, draft, cache=cache, length=4)) as stream:
            given = [next(stream)[0] for _ in range(count)]
        text = [*PROMPT, *given]
        held = tokens_seen(cache)
        assert {leaf.offset for leaf in leaves(cache)} == {held}
        assert len(PROMPT) <= held <= len(text)
        if held == len(text):
            for entry in cache:
                entry.trim(1)
            held -= 1
        rest = plain(looped, text[held:], 12 - count, prompt_cache=cache)
        assert [*given, *rest] == expected


def test_an_exception_in_a_round_leaves_what_was_given_out(looped):
    expected, cache = plain(looped, max_tokens=12), looped.new_cache()
    layers, given, layer = looped.model.layers, [], looped.model.layers[3]

    class Broken:
        def __call__(self, *args):
            raise RuntimeError("in the middle")

    stream = steps(looped, cache=cache)
    given += [next(stream)[0] for _ in range(4)]
    layers[3] = Broken()
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            given.extend(token for token, *_ in stream)
    finally:
        layers[3] = layer
    held = tokens_seen(cache)
    rest = plain(looped, [*PROMPT, *given][held:], 12 - len(given), prompt_cache=cache)
    assert [*given, *rest] == expected


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_conversation_goes_on_after_an_interruption(demo, draft):
    model, tokenizer = demo
    chosen = ModelDraft(model.with_loop(None)) if draft == "model" else draft
    answers = []
    for settings in ({}, {"draft": chosen}):
        talk = Conversation(model.with_loop(LoopConfig(loops=6)), tokenizer)
        list(talk.reply("My name is Anna.", max_tokens=8, **settings))
        stream = talk.reply(STORY, max_tokens=24, **settings)
        for _ in range(7):
            next(stream)
        stream.close()
        assert tokens_seen(talk._cache) == len(talk._tokens)
        list(talk.reply("What is my name?", max_tokens=8, **settings))
        answers.append(talk.messages)
    assert answers[0] == answers[1]


# --- What is refused ---


@pytest.mark.parametrize(
    ("loop", "settings", "words"),
    [
        (LoopConfig(cache="last"), {}, "cache='last'"),
        (LoopConfig(decode="bypass"), {}, "decode='bypass'"),
        (LoopConfig(decode=4), {}, "decode=4"),
        (LoopConfig(), {"max_kv_size": 64}, "RotatingKVCache"),
        (LoopConfig(), {"logits_processors": [lambda tokens, logits: logits]}, "logits_processors"),
        (LoopConfig(), {"draft": "elf"}, "'self', 'lookup'"),
        (LoopConfig(), {"draft_model": None}, "as draft,"),
    ],
)
def test_what_cannot_be_exact_is_refused(demo, loop, settings, words):
    model, tokenizer = demo
    with pytest.raises(UserError, match=words):
        mlx_loop.generate(
            model.with_loop(loop), tokenizer, "hello", **{"draft": "self", **settings}
        )


def test_sliding_windows_are_refused():
    model = make("sliding_llama").with_loop(LoopConfig())
    with pytest.raises(UserError, match="cannot be trimmed"):
        drafted(model)


def test_a_draft_model_that_does_not_know_what_came_before_is_refused(demo):
    model, tokenizer = demo
    cache = mlx_loop.make_prompt_cache(model)
    model(mx.array([[5, 6]]), cache=cache)
    with pytest.raises(UserError, match="context"):
        mlx_loop.generate(
            model, tokenizer, "hello", prompt_cache=cache, draft=model.with_loop(None)
        )
