"""Tokens are drawn as mlx-lm draws them, and drafts do not change their distribution."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler
from scipy.stats import chisquare

from mlx_loop.generation.sampling import Sampler

VOCAB = 5


def logprobs(rows, seed, vocab=VOCAB, scale=1.5):
    logits = mx.random.normal((rows, vocab), key=mx.random.key(seed)) * scale
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temp": 0.7},
        {"temp": 1.2, "top_p": 0.8},
        {"temp": 1.0, "min_p": 0.1, "top_k": 5},
        {"temp": 2.0, "min_p": 1.0, "min_tokens_to_keep": 3},
        {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1, "xtc_special_tokens": [3]},
    ],
)
def test_a_seed_gives_the_tokens_that_mlx_lms_sampler_gives(settings):
    rows = logprobs(50, 1, vocab=40)
    drawn = []
    for sampler in (Sampler(**settings), make_sampler(**settings)):
        mx.random.seed(3)
        drawn.append(mx.concatenate([sampler(rows[i : i + 1]) for i in range(50)]).tolist())
    assert drawn[0] == drawn[1]


def test_to_keep_more_tokens_than_there_are_is_no_limit():
    rows = logprobs(5, 1, vocab=10)
    kept = Sampler(temp=1.0, min_p=1.0, min_tokens_to_keep=10).logits(rows)
    assert mx.isfinite(kept).all()


def test_greedy_keeps_the_drafts_before_the_first_wrong_one():
    target = logprobs(4, 2)
    best = mx.argmax(target, axis=-1)
    for wrong in range(4):
        drafted = mx.array([b if i != wrong else (b + 1) % VOCAB for i, b in enumerate(best[:3])])
        count, follower = Sampler().verify(target, drafted, None)
        assert (count.item(), follower.item()) == (wrong, best[wrong].item())


def test_no_draft_is_a_plain_draw():
    count, follower = Sampler().verify(logprobs(1, 2), mx.array([], mx.uint32), None)
    assert (count.item(), follower.item()) == (0, mx.argmax(logprobs(1, 2)).item())


def pairs_of_tokens(sampler, drafts_from, rounds=800):
    """How often each pair of tokens comes out of rounds of two drafts, and how often it should.

    The model has three states: at the start, and after an even or an odd token. A round that
    keeps no draft yields one token, and a plain draw adds the second.
    """
    table = logprobs(3, 5)
    target, draft = sampler.logits(table), sampler.logits(logprobs(3, 6))
    mx.random.seed(11)
    pairs = []
    for _ in range(rounds):
        if drafts_from == "model":
            first = sampler.draw(draft[:1])
            rows = mx.concatenate([draft[:1], draft[1 + first % 2]])
            drafted = mx.concatenate([first, sampler.draw(rows[1:])])
        else:
            drafted, rows = mx.array([2, 1]), None
        seen = mx.concatenate([table[:1], table[1 + drafted % 2]])
        count, follower = sampler.verify(seen, drafted, rows)
        more = sampler.draw(target[1 + follower % 2][None])[0]
        text = [mx.where(count > 0, drafted[0], follower)]
        text.append(mx.where(count > 1, drafted[1], mx.where(count > 0, follower, more)))
        pairs.append(mx.stack(text))
    first, *after = np.array(mx.softmax(target, axis=-1), np.float64)
    expected = np.stack([first[i] * after[i % 2] for i in range(VOCAB)])
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(np.array(mx.stack(pairs)).T), 1)
    return counts.ravel(), expected.ravel() / expected.sum() * rounds


@pytest.mark.parametrize("drafts_from", ["model", "lookup"])
@pytest.mark.parametrize("settings", [{"temp": 1.0}, {"temp": 0.7, "top_k": 3}])
def test_sampled_tokens_have_the_models_own_distribution(settings, drafts_from):
    counts, expected = pairs_of_tokens(Sampler(**settings), drafts_from)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert chisquare(counts[possible], expected[possible]).pvalue > 1e-3


def test_equal_distributions_keep_every_draft():
    sampler = Sampler(temp=1.0)
    rows = logprobs(9, 4)
    logits = sampler.logits(rows)
    for seed in range(20):
        mx.random.seed(seed)
        drafted = sampler.draw(logits[:8])
        assert sampler.verify(rows, drafted, logits[:8])[0].item() == 8
