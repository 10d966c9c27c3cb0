"""Several settings at once: the same answers as alone, and nothing shared computed twice."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import make, relative_error, tokens
from mlx_lm.models.cache import make_prompt_cache

import mlx_loop
from mlx_loop import Guard, LoopConfig, UserError
from mlx_loop.measure.comparison import Answer, compare, distinct, kl
from mlx_loop.models.together import logits, states

SETTINGS = [
    LoopConfig(loops=3),
    LoopConfig(loops=2, integrator="rk4", cache="own", window=(5, 8)),
    LoopConfig(loops=2, cache="last", window=(3, 6)),
    LoopConfig(loops=6, integrator="naive", scope="layer", guard=Guard()),
    LoopConfig(loops=4, decode="bypass"),
]


@pytest.fixture(scope="module")
def demo():
    return mlx_loop.load("demo")


def prompt_for(tokenizer, text):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )


def last(stream):
    """What a generator ends with."""
    *_, end = stream
    return end


# --- Answers ---


@pytest.mark.parametrize("name", ["demo", "demo-moe", "demo-mla"])
def test_each_text_is_what_generate_gives_for_that_setting_alone(name):
    model, tokenizer = mlx_loop.load(name)
    views = distinct(model, SETTINGS)
    prompt = prompt_for(tokenizer, "My name is Anna. What is my name?")
    answers = last(compare(views, tokenizer, prompt, max_tokens=12, prefill_step_size=16))
    for view, answer in zip(views, answers, strict=True):
        alone = mlx_loop.generate(view, tokenizer, prompt, max_tokens=12, prefill_step_size=16)
        assert answer.text == alone


@pytest.mark.parametrize("draft", ["self", "lookup"])
def test_drafts_change_no_answer(draft):
    # float32, where single and batched products round alike enough that no two tokens tie.
    model, tokenizer = mlx_loop.load("demo", dtype="float32")
    views = distinct(model, [LoopConfig(loops=6), LoopConfig(loops=3, cache="own")])
    prompt = prompt_for(tokenizer, "The code for apple is 48217. What is the code for apple?")
    plainly = last(compare(views, tokenizer, prompt, max_tokens=16))
    drafting = last(compare(views, tokenizer, prompt, max_tokens=16, draft=draft))
    assert [a.tokens for a in drafting] == [a.tokens for a in plainly]
    assert [a.measures for a in drafting] == [a.measures for a in plainly]
    assert all(a.drafted for a in drafting[1:])
    assert not any(a.drafted for a in plainly)


def test_settings_under_which_drafts_cannot_be_checked_are_refused_before_any_answer(demo):
    model, tokenizer = demo
    views = distinct(model, [LoopConfig(), LoopConfig(cache="last")])
    with pytest.raises(UserError, match="cache='last'"):
        next(compare(views, tokenizer, prompt_for(tokenizer, "hello"), draft="self"))


def test_answers_grow_by_one_token_in_turn(demo):
    model, tokenizer = demo
    views = distinct(model, [LoopConfig(loops=2), LoopConfig(loops=3)])
    prompt = prompt_for(tokenizer, "Tell me a story.")
    counts = [
        [len(answer.tokens) for answer in answers]
        for answers in compare(views, tokenizer, prompt, max_tokens=4)
    ]
    assert counts[:4] == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1]]
    assert counts[-1] == [4, 4, 4]


def test_closing_stops_all_answers_and_leaves_no_measures(demo):
    model, tokenizer = demo
    views = distinct(model, [LoopConfig(loops=2)])
    stream = compare(views, tokenizer, prompt_for(tokenizer, "Tell me a story."))
    answers = next(stream)
    stream.close()
    assert answers[0].tokens
    assert answers[0].measures is None


def test_a_seed_gives_settings_that_do_not_differ_the_same_sample(demo):
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = demo
    # At beta this near to 1 the loop changes nothing that matters, but it runs.
    views = distinct(model, [LoopConfig(beta=1 - 1e-9)])
    prompt = prompt_for(tokenizer, "Tell me a story.")
    texts = []
    for seed in (1, 1, 2):
        job = compare(views, tokenizer, prompt, max_tokens=20, sampler=make_sampler(1.5), seed=seed)
        texts.append([answer.text for answer in last(job)])
    assert texts[0][0] == texts[0][1]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_is_refused(demo):
    model, tokenizer = demo
    with pytest.raises(UserError, match="empty"):
        next(compare(distinct(model, []), tokenizer, []))


# --- Numbers ---


def test_measures_are_those_of_the_logits_along_the_unlooped_answer(demo):
    model, tokenizer = demo
    looped = LoopConfig(integrator="naive", loops=3, cache="own")
    views = distinct(model, [looped])
    prompt = prompt_for(tokenizer, "What is 12 + 30?")
    base, answer = last(compare(views, tokenizer, prompt, max_tokens=8))
    # Under `own` any way of feeding gives the same logits, so one prefill is a reference.
    text = mx.array([[*prompt, *base.tokens[:-1]]])
    p, q = (view(text)[0, len(prompt) - 1 :] for view in views)
    expected = kl(p, q)
    # bfloat16 logits of different kernels.
    assert abs(answer.measures.first_kl - float(expected[0])) < 0.02 * float(expected[0])
    assert abs(answer.measures.mean_kl - float(expected.mean())) < 0.02 * float(expected.mean())
    agreement = mx.mean((mx.argmax(p, -1) == mx.argmax(q, -1)).astype(mx.float32))
    assert answer.measures.agreement == pytest.approx(float(agreement))
    assert base.measures.first_kl == base.measures.mean_kl == 0


def test_kl_is_that_of_its_definition():
    p, q = mx.array([0.5, 0.25, 0.25]), mx.array([0.25, 0.5, 0.25])
    expected = 0.5 * mx.log(mx.array(2.0)) - 0.25 * mx.log(mx.array(2.0))
    # float32; a constant added to logits changes nothing.
    assert relative_error(kl(mx.log(p) + 3, mx.log(q)), expected) < 1e-5


def answered(tokens, finish_reason="stop"):
    answer = Answer(None)
    answer.tokens, answer.finish_reason = tokens, finish_reason
    return answer


@pytest.mark.parametrize(
    ("mine", "base", "at"),
    [
        (answered([1, 2, 3]), answered([1, 2, 3]), None),
        (answered([1, 5, 3]), answered([1, 2, 3]), 1),
        (answered([1, 2], None), answered([1, 2, 3]), None),
        (answered([1, 2, 3, 4]), answered([1, 2, 3]), 3),
        (answered([1, 2, 3, 4], None), answered([1, 2, 3], None), None),
    ],
)
def test_the_first_token_that_departs(mine, base, at):
    mine.compare_to(base)
    assert mine.departs == at


def test_a_setting_that_is_there_already_is_not_compared_twice(model):
    loops = [
        LoopConfig(loops=1),
        LoopConfig(loops=3),
        LoopConfig(loops=3, integrator="anchored"),
        LoopConfig(loops=1, integrator="euler"),
        LoopConfig(beta=1.0),
    ]
    assert [view.loop and view.loop.loops for view in distinct(model, loops)] == [None, 3]


# --- Sharing ---


def views_of(model):
    return distinct(
        model,
        [
            LoopConfig(window=(2, 4), loops=2),
            LoopConfig(window=(5, 7), loops=3, cache="own"),
            LoopConfig(window=(2, 6), loops=2, cache="last"),
        ],
    )


def test_a_shared_pass_is_each_views_own_pass(any_model):
    text = tokens(1, 12)
    views = views_of(any_model)
    for view, state in zip(views, states(views, text), strict=True):
        assert mx.array_equal(logits(view, state), view(text))


def test_shared_caches_are_each_views_own_cache(one_of_each):
    text, views = tokens(1, 13), views_of(one_of_each)
    shared = [make_prompt_cache(view) for view in views]
    own = [make_prompt_cache(view) for view in views]
    for chunk in (text[:, :5], text[:, 5:12]):
        states(views, chunk, shared)
        for view, cache in zip(views, own, strict=True):
            view(chunk, cache=cache)
    for view, mine, cache in zip(views, shared, own, strict=True):
        assert mx.array_equal(view(text[:, 12:], cache=mine), view(text[:, 12:], cache=cache))


def test_one_cache_does_not_see_what_another_writes(model):
    views = views_of(model)
    caches = [make_prompt_cache(view) for view in views]
    states(views, tokens(1, 5), caches)
    before = [mx.array(cache[0].state[0]) for cache in caches]
    views[0](tokens(1, 3, seed=1), cache=caches[0])
    assert caches[0][0].offset == 8
    for cache, keys in list(zip(caches, before, strict=True))[1:]:
        assert cache[0].offset == 5
        assert mx.array_equal(cache[0].state[0], keys)


class Counted(nn.Module):
    """A layer that counts its calls."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def __call__(self, *args):
        self.calls += 1
        return self.layer(*args)


def test_layers_below_the_windows_run_once_for_all_views():
    model = make("qwen3")
    layers = model.model.layers = [Counted(layer) for layer in model.layers]
    loops = [LoopConfig(window=(4, 6), loops=k) for k in (2, 3)] + [LoopConfig(window=(6, 8))]
    views = distinct(model, loops)
    for layer in layers:
        layer.calls = 0
    states(views, tokens(1, 4))
    assert [layer.calls for layer in layers] == [1] * 4 + [2 + 3 + 1] * 2 + [1 + 1 + 3 + 1] * 2
