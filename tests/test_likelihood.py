"""Log-likelihoods of continuations: the same as one at a time, under every setting."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import SIDE_BY_SIDE, make
from zoo import build

from mlx_loop import LoopConfig
from mlx_loop.measure.comparison import distinct
from mlx_loop.measure.likelihood import log_likelihoods

SETTINGS = [
    *SIDE_BY_SIDE,
    LoopConfig(loops=3, window=(2, 5), prompt="plain"),
    LoopConfig(loops=3, window=(2, 5), gate="entropy:3"),
    LoopConfig(loops=2, window=((1, 3), (5, 6))),
]
PROMPTS = [[5, 9, 2, 7, 11], [8, 3], [4, 4, 6, 1, 9, 12, 30, 2, 2, 7, 31], [17]]
ENDINGS = [[[3, 4], [9]], [[6, 1, 9, 12, 7, 8, 9, 1, 2, 3]], [[3], [8], [5]], [[1, 2], [2, 1, 3]]]


def alone(view, prompt, ending, step=99):
    """log p(ending | prompt) through a cache of its own, as mlx-lm's adapter computes it."""
    cache = view.new_cache()
    view = view.for_prompt(cache, len(prompt))
    for start in range(0, len(prompt), step):
        logits = view(mx.array([prompt[start : start + step]]), cache=cache)[:, -1:]
    if len(ending) > 1:
        logits = mx.concatenate([logits, view(mx.array([ending[:-1]]), cache=cache)], axis=1)
    chances = logits[0] - mx.logsumexp(logits[0], axis=-1, keepdims=True)
    return sum(chances[i, token].item() for i, token in enumerate(ending))


def check(views, step=99):
    found = log_likelihoods(views, PROMPTS, ENDINGS, step)
    for view, of_view in zip(views, found, strict=True):
        for prompt, endings, values in zip(PROMPTS, ENDINGS, of_view, strict=True):
            expected = [alone(view, prompt, ending, step) for ending in endings]
            assert values == pytest.approx(expected, abs=1e-4), view.loop


@pytest.mark.parametrize("name", ["qwen3", "sliding_llama", "qwen3_moe", "deepseek_v3"])
def test_a_batch_under_all_settings_is_as_one_continuation_alone(name):
    check(distinct(make(name), SETTINGS))


@pytest.mark.parametrize("name", ["llama4", "jamba", "rwkv7", "gemma3n"])
def test_other_caches_and_states_are_no_exception(name):
    check(distinct(build(name), [LoopConfig(loops=2), LoopConfig(loops=3, cache="last")]))


def test_a_prompt_in_pieces(model):
    check(distinct(model, SETTINGS), step=4)


def test_with_a_history_for_each_pass_it_is_that_of_the_text_in_one_piece(model):
    view = model.with_loop(LoopConfig(loops=3, window=(2, 5), cache="own"))
    (found,) = log_likelihoods([view], PROMPTS, ENDINGS)
    for prompt, endings, values in zip(PROMPTS, ENDINGS, found, strict=True):
        for ending, value in zip(endings, values, strict=True):
            logits = view(mx.array([[*prompt, *ending]]))[0, len(prompt) - 1 : -1]
            chances = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            assert value == pytest.approx(
                sum(chances[i, token].item() for i, token in enumerate(ending)), abs=1e-4
            )


def test_a_prompt_is_fed_once_for_all_settings_and_continuations(model, monkeypatch):
    views = distinct(model, [LoopConfig(loops=k, window=(3, 5)) for k in (2, 3)])
    seen = []
    layer = type(model.layers[0])
    plain = layer.__call__

    def count(self, x, *args, **kwargs):
        seen.append((next(i for i, one in enumerate(model.layers) if one is self), x.shape[:2]))
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(layer, "__call__", count)
    log_likelihoods(views, [[5, 9, 2, 7, 11, 4]], [[[1, 2, 3], [4, 5]]])
    assert [seen.count((i, (1, 6))) for i in range(4)] == [1, 1, 1, 1 + 2 + 3]
    assert [seen.count((i, (2, 2))) for i in range(4)] == [1, 1, 1, 1 + 2 + 3]
