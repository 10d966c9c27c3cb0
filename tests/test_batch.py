"""Batches of answers: the same as one at a time, under every setting."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import SIDE_BY_SIDE, make, relative_error, tokens
from zoo import build

from mlx_loop import LoopConfig
from mlx_loop.generation.batch import answer_batch, batched
from mlx_loop.measure.comparison import distinct
from mlx_loop.method.cache import tokens_seen

PROMPTS = [[5, 9, 2, 7, 11], [8, 3], [4, 4, 6, 1, 9, 12, 30], [17]]
TOKENS = 8


def alone(view, prompt, ends, step):
    """The answer to one prompt, each token by a plain call."""
    cache, answer = view.new_cache(), []
    view = view.for_prompt(cache, len(prompt))
    for start in range(0, len(prompt) - 1, step):
        view(mx.array([prompt[start : min(start + step, len(prompt) - 1)]]), cache=cache)
    token = prompt[-1]
    while len(answer) < TOKENS:
        token = mx.argmax(view(mx.array([[token]]), cache=cache)[0, -1]).item()
        if token in ends:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("name", ["llama4", "jamba", "rwkv7"])
def test_prompts_that_cannot_be_merged_are_answered_one_at_a_time(name):
    views = distinct(build(name), [LoopConfig(loops=2)])
    found = {i: answers for i, answers, _ in answer_batch(views, PROMPTS, set(), TOKENS)}
    for i, view in enumerate(views):
        assert found[i] == [alone(view, prompt, set(), 99) for prompt in PROMPTS], view.loop


@pytest.mark.parametrize("name", ["qwen3", "sliding_llama", "qwen3_moe", "deepseek_v3"])
def test_a_batch_under_all_settings_answers_as_one_prompt_alone(name):
    views = distinct(make(name), SIDE_BY_SIDE)
    # An end that comes up early in one answer and late in another, so that rows leave the batch.
    free = [alone(views[0], prompt, set(), 99) for prompt in PROMPTS]
    ends = {free[0][1], free[2][4]}
    found = {i: answers for i, answers, _ in answer_batch(views, PROMPTS, ends, TOKENS)}
    assert sorted(found) == list(range(len(views)))
    for i, view in enumerate(views):
        assert found[i] == [alone(view, prompt, ends, 99) for prompt in PROMPTS], view.loop
    assert len({len(answer) for answer in found[0]}) > 1


def test_a_prompt_in_chunks(model):
    views = distinct(model, SIDE_BY_SIDE)
    prompts = [list(range(20, 31)), list(range(40, 51))]
    for i, answers, _ in answer_batch(views, prompts, set(), TOKENS, step=4):
        assert answers == [alone(views[i], prompt, set(), 4) for prompt in prompts]


def test_layers_below_the_windows_see_the_prompt_once(model, monkeypatch):
    views = distinct(model, [LoopConfig(loops=k, window=(3, 5)) for k in (2, 3, 4)])
    seen = []
    layer = type(model.layers[0])
    plain = layer.__call__

    def count(self, x, *args, **kwargs):
        if x.shape[1] > 1:
            seen.append(next(i for i, one in enumerate(model.layers) if one is self))
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(layer, "__call__", count)
    list(answer_batch(views, [[5, 9, 2, 7, 11]], set(), 2))
    assert [seen.count(i) for i in range(5)] == [1, 1, 1, 1 + 2 + 3 + 4, 1 + 2 + 3 + 4]
    assert tokens_seen(model.new_cache()) == 0


def test_layers_that_share_keys_get_those_of_the_natural_pass_from_a_full_window():
    view = build("gemma4_text").with_loop(LoopConfig(window=(4, 6), loops=2))
    text = tokens(2, 14)

    def fed(text, cache):
        return mx.concatenate([view(token, cache=cache) for token in mx.split(text, 14, 1)], 1)

    alone = [fed(text[i : i + 1], view.new_cache()) for i in range(2)]
    together = fed(text, batched(view, [14, 14], [0, 0]))
    assert relative_error(together, mx.concatenate(alone)) < 1e-4
