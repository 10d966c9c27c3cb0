"""Every model type that mlx-lm runs, tiny, with random weights: it loops, and rightly."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import relative_error, tokens
from mlx_lm.generate import batch_generate
from mlx_lm.models.cache import make_prompt_cache
from reference import Reference, plain
from zoo import TYPES, build

from mlx_loop import LoopConfig, UserError
from mlx_loop.checkpoints.memory import Footprint
from mlx_loop.generation.speculative import check_drafts
from mlx_loop.method.anatomy import with_layers
from mlx_loop.method.cache import leaves
from mlx_loop.method.loop import Natural
from mlx_loop.method.routing import watch_experts
from mlx_loop.models import halves
from mlx_loop.upstream import model_types

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import models_table  # noqa: E402

REFUSED = {
    "deepseek_v41": "share a LayerCache",
    "iquestloopcoder": "reaches into its layers",
    "nanbeige": "several times",
}
LOOPING = [name for name in TYPES if name not in REFUSED]
WINDOW = (2, 6)
# Longer than the sliding windows and chunks of eight tokens.
TEXT = tokens(1, 13)
PROMPT = 9
# Their last layers use the keys of two layers in the window.
NO_LAST = {"gemma4", "gemma4_text"}
# mlx-lm's own model gives other logits where a text is fed in pieces.
UNLIKE_IN_PIECES = {"phi3small", "plamo3"}


@pytest.fixture(scope="module", params=LOOPING)
def model(request):
    return build(request.param)


def fed(model, chunks, text=TEXT, cache=None):
    """Logits of `text` in pieces of the given lengths, then one by one."""
    cache = make_prompt_cache(model) if cache is None else cache
    outs, at = [], 0
    for length in (*chunks, *[1] * (text.shape[1] - sum(chunks))):
        outs.append(model(text[:, at : at + length], cache=cache))
        mx.eval(outs[-1])
        at += length
    return mx.concatenate(outs, axis=1)


def test_most_types_loop():
    assert len(LOOPING) >= 110


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_cannot_loop_says_why_and_runs_as_it_is(name):
    model = build(name)
    with pytest.raises(UserError, match=f"{name}.* cannot loop.*{REFUSED[name]}"):
        model.with_loop(LoopConfig())
    assert mx.array_equal(model.with_loop(None)(TEXT), plain(model)(TEXT))


def test_a_model_whose_own_forward_pass_fails_says_so():
    model = build("qwen3_next", full_attention_interval=16)  # needs an attention layer for a mask
    with pytest.raises(UserError, match="'qwen3_next' cannot loop: its own forward pass fails, "):
        model.with_loop(LoopConfig())


def test_off_and_one_loop_are_mlx_lm_to_the_bit(model):
    expected = fed(plain(model), (PROMPT,))
    assert mx.array_equal(fed(model, (PROMPT,)), expected)
    for policy in ("first", "own"):  # All three: tests/test_loop.py, on one type of each kind.
        one = model.with_loop(LoopConfig(loops=1, cache=policy))
        assert mx.array_equal(fed(one, (PROMPT,)), expected)


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_a_prompt_is_that_of_an_independent_loop(model, scope):
    looped = model.with_loop(
        LoopConfig(window=WINDOW, loops=3, beta=0.3, scope=scope, routing="live")
    )
    expected = Reference(plain(model), looped.loop)(TEXT)
    assert relative_error(looped(TEXT), expected) < 1e-5
    assert relative_error(model(TEXT), expected) > 1e-3


@pytest.mark.parametrize("policy", ["first", "last"])
def test_decoding_is_that_of_an_independent_loop(model, policy):
    # In layer scope: tests/test_cache.py and test_loop.py, on one type of each kind.
    loop = LoopConfig(window=WINDOW, loops=2, beta=0.3, cache=policy, routing="live", scope="block")
    if policy == "last" and model.model_type in NO_LAST:
        with pytest.raises(UserError, match="cache='last' does not work with window"):
            model.with_loop(loop)
        return
    looped = model.with_loop(loop)
    reference = Reference(plain(model), looped.loop)
    expected = fed(reference, (PROMPT, 2), cache=make_prompt_cache(plain(model)))
    assert relative_error(fed(looped, (PROMPT, 2)), expected) < 1e-5


def test_own_gives_the_same_logits_however_the_text_is_fed(model):
    looped = model.with_loop(LoopConfig(window=WINDOW, loops=3, cache="own"))
    whole = fed(looped, (TEXT.shape[1],))
    error = relative_error(fed(looped, (5, 4)), whole)
    assert (error < 1e-4) != (model.model_type in UNLIKE_IN_PIECES)


class Tokenizer:
    """As much of one as batch_generate asks for."""

    eos_token_ids = frozenset()

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_a_batch_of_prompts_of_different_lengths(model):
    prompts = [TEXT[0, :9].tolist(), TEXT[0, 3:8].tolist()]

    def answers(view, prompts):
        found = batch_generate(view, Tokenizer(), prompts, max_tokens=3, return_token_ids=True)
        return found.token_ids

    def alone(view):
        return [answers(view, [prompt])[0] for prompt in prompts]

    try:
        batchable = answers(plain(model), prompts) == alone(plain(model))
    except (AttributeError, TypeError, ValueError):
        batchable = False
    if not batchable:
        pytest.skip("mlx-lm's own model does not answer batches as it answers prompts alone")
    looped = model.with_loop(LoopConfig(window=WINDOW, loops=2))
    assert answers(looped, prompts) == alone(looped)


def test_frozen_routing_repeats_the_experts_of_the_natural_pass(model):
    layers = model.anatomy.layers
    mixtures = [i for i in range(*WINDOW) if layers[i].routers]
    if not mixtures:
        pytest.skip("no experts in the window")
    chosen = {}
    for routing in ("frozen", "live"):
        looped = model.with_loop(
            LoopConfig(window=WINDOW, loops=3, integrator="naive", routing=routing)
        )
        found = {i: [] for i in mixtures}
        places = {layers[i].path: watch_experts(model.layers[i], found[i].append) for i in mixtures}
        mx.eval(with_layers(looped, places)(TEXT))
        chosen[routing] = found
    if not any(chosen["live"].values()):
        pytest.skip("experts of a kind that cannot be watched")
    for passes in chosen["frozen"].values():
        assert len(passes) == 3
        assert all(mx.array_equal(indices, passes[0]) for indices in passes)
    assert any(
        not mx.array_equal(indices, passes[0])
        for passes in chosen["live"].values()
        for indices in passes
    )


@pytest.mark.parametrize("policy", ["first", "own"])
def test_drafts_are_checked_as_if_each_token_had_been_fed_alone(model, policy):
    looped = model.with_loop(LoopConfig(window=WINDOW, loops=2, cache=policy))
    try:
        check_drafts(looped, looped.new_cache())
    except UserError as refused:
        pytest.skip(str(refused))
    alone, together = looped.new_cache(), looped.new_cache()
    for cache in (alone, together):
        looped(TEXT[:, :PROMPT], cache=cache)
    drafts = [TEXT[:, i : i + 1] for i in range(PROMPT, PROMPT + 3)]
    expected = mx.concatenate([looped(draft, cache=alone) for draft in drafts], axis=1)
    parts = [halves.plain(looped, draft, together)[1] for draft in drafts[:-1]]
    parts.append(halves.enter(looped, drafts[-1], together))
    found = halves.looped(looped, mx.concatenate(drafts, 1), together, Natural.join(parts))
    assert relative_error(found, expected) < 1e-5
    after = TEXT[:, PROMPT + 3 : PROMPT + 4]
    assert relative_error(looped(after, cache=together), looped(after, cache=alone)) < 1e-5


@pytest.mark.parametrize("policy", ["first", "own"])
def test_what_the_plan_says_of_caches_is_what_they_take(model, policy):
    looped = model.with_loop(LoopConfig(window=WINDOW, loops=2, cache=policy))
    cache, footprint = looped.new_cache(), Footprint(looped)
    fed(looped, (PROMPT,), cache=cache)
    taken = sum(leaf.nbytes for leaf in leaves(cache))
    # Chunks are cut back only as the next one begins, and a memory of n-grams has a few numbers.
    rough = model.model_type in ("llama4", "longcat_flash_ngram")
    assert footprint.cache(TEXT.shape[1]) == pytest.approx(taken, rel=0.05 if rough else 0)
    assert footprint.longest(1 << 40) > 0
    assert footprint.read_per_token(1) > 0


@pytest.mark.parametrize("name", model_types())
def test_the_table_in_docs_says_what_is_true(name):
    table = (ROOT / "docs" / "models.md").read_text()
    assert models_table.line(models_table.row(name)) in table.splitlines()


def test_a_copy_is_a_model_of_its_own(model):
    looped = model.with_loop(LoopConfig(window=WINDOW, loops=2))
    other = copy.deepcopy(looped)
    assert mx.array_equal(other(TEXT), looped(TEXT))
