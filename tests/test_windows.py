"""Several windows, each looped in its turn."""

import mlx.core as mx
import pytest
from conftest import relative_error, tokens
from mlx_lm.models.cache import make_prompt_cache
from reference import Reference, plain

from mlx_loop import LoopConfig
from mlx_loop.generation.speculative import Pace, SelfDraft, speculative_generate_step
from mlx_loop.measure.trace import trace
from mlx_loop.models.together import logits, states

WINDOWS = ((1, 3), (3, 4), (5, 7))


def looped(model, **settings):
    return model.with_loop(LoopConfig(window=WINDOWS, loops=3, beta=0.3, **settings))


def fed(model, text, chunks, cache):
    outs, at = [], 0
    for length in (*chunks, *[1] * (text.shape[1] - sum(chunks))):
        outs.append(model(text[:, at : at + length], cache=cache))
        at += length
    return mx.concatenate(outs, axis=1)


@pytest.mark.parametrize("scope", ["block", "layer"])
@pytest.mark.parametrize("policy", ["first", "last"])
def test_they_are_those_of_an_independent_loop(model, policy, scope):
    view, text = looped(model, cache=policy, scope=scope), tokens(2, 12)
    reference = Reference(plain(model), view.loop)
    assert relative_error(view(text), reference(text)) < 1e-5
    caches = make_prompt_cache(view), make_prompt_cache(plain(model))
    expected = fed(reference, text, (9,), caches[1])
    assert relative_error(fed(view, text, (9,), caches[0]), expected) < 1e-5


def test_in_layer_scope_they_are_one_window_where_they_touch(model):
    text = tokens(1, 10)
    settings = {"loops": 3, "scope": "layer"}
    apart = model.with_loop(LoopConfig(window=((2, 4), (4, 6)), **settings))
    assert mx.array_equal(apart(text), model.with_loop(LoopConfig(window=(2, 6), **settings))(text))


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_own_gives_the_same_logits_however_the_text_is_fed(any_model, scope):
    view, text = looped(any_model, cache="own", scope=scope), tokens(2, 12)
    whole = fed(view, text, (12,), make_prompt_cache(view))
    assert relative_error(fed(view, text, (5, 4), make_prompt_cache(view)), whole) < 1e-4


@pytest.mark.parametrize("policy", ["first", "own"])
@pytest.mark.parametrize("scope", ["block", "layer"])
def test_drafts_are_checked_as_if_each_token_had_been_fed_alone(model, policy, scope):
    view, prompt = looped(model, cache=policy, scope=scope), [5, 9, 4, 17]
    cache = view.new_cache()
    pace = Pace(1, 1, 3)
    steps = speculative_generate_step(
        prompt, view, SelfDraft(), prompt_cache=cache, pace=pace, max_tokens=12
    )
    found = [token for token, *_ in steps]
    plainly, cache = [], view.new_cache()
    view(mx.array([prompt[:-1]]), cache=cache)
    token = prompt[-1]
    for _ in range(12):
        token = int(mx.argmax(view(mx.array([[token]]), cache=cache)[0, -1]))
        plainly.append(token)
    assert found == plainly


def test_they_share_what_lies_below_the_first_one(model):
    views, text = [model.with_loop(None), looped(model), looped(model, cache="own")], tokens(1, 9)
    for view, state in zip(views, states(views, text), strict=True):
        assert relative_error(logits(view, state), view(text)) < 1e-6


def test_each_is_traced_as_a_loop_of_its_own(model):
    found = trace(looped(model), [3, 1, 4, 1, 5])
    assert [list(loop.layers) for loop in found.loops] == [[1, 2], [3], [5, 6]]
