"""Which tokens loop: `prompt="plain"` and `gate`, against independent formulations."""

import copy

import mlx.core as mx
import mlx_lm
import pytest
import zoo
from conftest import relative_error, tokens
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import make_prompt_cache
from reference import Reference, plain

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.generation.batch import batched
from mlx_loop.method.cache import leaves
from mlx_loop.models.gate import entropy
from mlx_loop.models.together import states

WINDOW, PROMPT, LENGTH = (2, 5), 6, 14


def loop(**settings):
    return LoopConfig(window=WINDOW, loops=3, beta=0.3, routing="live", **settings)


def limit_of(model, text):
    """An entropy between those of the answer's tokens, so that some loop and some do not."""
    found = sorted(entropy(plain(model)(text))[0, PROMPT - 1 :].tolist())
    return (found[len(found) // 2 - 1] + found[len(found) // 2]) / 2


def answered(view, text, chunks=(PROMPT - 1,)):
    """Logits of a text whose first tokens are the prompt, the rest fed one by one."""
    cache, at, outs = view.new_cache(), 0, []
    view = view.for_prompt(cache, PROMPT)
    for length in (*chunks, *[1] * (text.shape[1] - sum(chunks))):
        outs.append(view(text[:, at : at + length], cache=cache))
        at += length
    return mx.concatenate(outs, axis=1), cache


def expected_of(model, view, text, limit=None, prompt="looped"):
    """The same, by its definition: a plain pass, and where that is unsure a loop instead."""
    bare, outs = plain(model), []
    cache = make_prompt_cache(bare)
    looping = Reference(plain(model), view.loop)
    outs.append((bare if prompt == "plain" else looping)(text[:, : PROMPT - 1], cache=cache))
    looped = []
    for i in range(PROMPT - 1, text.shape[1]):
        before, token = copy.deepcopy(cache), text[:, i : i + 1]
        logits = bare(token, cache=cache)
        looped.append(limit is None or bool(entropy(logits[0, -1]) >= limit))
        if looped[-1]:
            cache = before
            logits = looping(token, cache=cache)
        outs.append(logits)
    return mx.concatenate(outs, axis=1), looped


@pytest.fixture(params=["qwen3", "sliding_llama", "qwen3_moe", "deepseek_v2"])
def family(request):
    from conftest import make

    return make(request.param)


@pytest.mark.parametrize("policy", ["first", "last"])
@pytest.mark.parametrize("prompt", ["looped", "plain"])
def test_a_gated_answer_is_that_of_its_definition(family, policy, prompt):
    text = tokens(1, LENGTH)
    limit = limit_of(family, text)
    view = family.with_loop(loop(cache=policy, prompt=prompt, gate=f"entropy:{limit}"))
    expected, looped = expected_of(family, view, text, limit, prompt)
    found, _ = answered(view, text)
    assert relative_error(found, expected) < 1e-4
    assert view.take_share() == (sum(looped), len(looped))
    assert sum(looped) > 0
    assert policy == "last" or sum(looped) < len(looped)


@pytest.mark.parametrize("policy", ["first", "last"])
def test_a_plain_prompt_is_that_of_its_definition(family, policy):
    text = tokens(1, LENGTH)
    view = family.with_loop(loop(cache=policy, prompt="plain"))
    expected, _ = expected_of(family, view, text, prompt="plain")
    for chunks in ((PROMPT - 1,), (PROMPT,), (2, 1, 2)):
        assert relative_error(answered(view, text, chunks)[0], expected) < 1e-4


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "gemma3_text", "jamba"])
def test_recurrent_state_and_windows_are_gated_too(name):
    model = zoo.build(name)
    text = tokens(1, LENGTH)
    limit = limit_of(model, text)
    view = model.with_loop(
        LoopConfig(window=(1, 3), loops=2, routing="live", gate=f"entropy:{limit}")
    )
    expected, _ = expected_of(model, view, text, limit)
    assert relative_error(answered(view, text)[0], expected) < 1e-4


@pytest.mark.parametrize("chunks", [(PROMPT,), (2, 1, 2), (LENGTH,)])
def test_where_a_prompt_ends_is_known_of_caches_that_do_not_count(chunks):
    model, text = zoo.build("mamba2"), tokens(1, LENGTH)
    gate = f"entropy:{(limit := limit_of(model, text))}"
    view = model.with_loop(LoopConfig(window=(1, 3), loops=2, prompt="plain", gate=gate))
    expected, looped = expected_of(model, view, text, limit, "plain")
    assert relative_error(answered(view, text, chunks)[0], expected) < 1e-4
    assert view.take_share() == (sum(looped), len(looped))


@pytest.mark.parametrize("policy", ["first", "last", "own"])
def test_a_gate_that_is_always_open_or_shut_is_a_loop_or_none(model, policy):
    text = tokens(1, LENGTH)
    always, never = loop(cache=policy, prompt="plain"), LoopConfig(loops=1)
    for gate, same in (("entropy:1e-6", always), ("entropy:99", never)):
        view = model.with_loop(loop(cache=policy, gate=gate, prompt="plain"))
        expected, _ = answered(model.with_loop(same), text)
        assert relative_error(answered(view, text)[0], expected) < 1e-5


def test_rows_of_a_batch_decide_by_themselves(model):
    texts = mx.concatenate([tokens(1, LENGTH, seed=1), tokens(1, LENGTH, seed=2)])
    gate = f"entropy:{limit_of(model, texts)}"
    view = model.with_loop(loop(gate=gate, prompt="plain"))
    together, cache = answered(view, texts)
    shares = view.take_share()
    alone = [answered(view, texts[i : i + 1])[0] for i in range(2)]
    assert relative_error(together, mx.concatenate(alone)) < 1e-4
    assert shares == view.take_share()
    assert {leaf.offset for leaf in leaves(cache)} == {LENGTH}


def test_rows_keep_their_own_recurrent_state():
    # Of recurrent_gemma it has two axes, where that of other types has more.
    model = zoo.build("recurrent_gemma")
    texts = mx.concatenate([tokens(1, LENGTH, seed=1), tokens(1, LENGTH, seed=2)])
    gate = f"entropy:{limit_of(model, texts)}"
    view = model.with_loop(LoopConfig(window=(2, 5), loops=2, gate=gate, prompt="plain"))
    cache = batched(view, [PROMPT, PROMPT], [0, 0])
    view = view.for_prompt(cache, PROMPT)
    pieces = [texts[:, : PROMPT - 1], *mx.split(texts[:, PROMPT - 1 :], LENGTH - PROMPT + 1, 1)]
    together = mx.concatenate([view(piece, cache=cache) for piece in pieces], axis=1)
    alone = [answered(view, texts[i : i + 1])[0] for i in range(2)]
    assert relative_error(together, mx.concatenate(alone)) < 1e-4


def test_entropy_of_a_prediction_that_rules_tokens_out():
    logits = mx.array([[0.0, 0.0, -mx.inf], [0.0, -mx.inf, -mx.inf]])
    assert mx.allclose(entropy(logits), mx.array([0.6931472, 0.0]))


# --- What other functions make of it ---


@pytest.fixture(scope="module")
def demo():
    return mlx_loop.load("demo")


def asked(tokenizer, text="What is 12 + 30?"):
    message = {"role": "user", "content": text}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True)


SETTINGS = {"loops": 4, "prompt": "plain", "gate": "entropy:0.05"}


def test_drafting_for_itself_changes_nothing(demo):
    model, tokenizer = demo
    view = model.with_loop(LoopConfig(**SETTINGS))
    prompt = asked(tokenizer)
    alone = mlx_loop.generate(view, tokenizer, prompt)
    looped, count = view.take_share()
    assert mlx_loop.generate(view, tokenizer, prompt, draft="self") == alone
    assert view.take_share() == (looped, count)
    with pytest.raises(UserError, match="un-looped pass is the draft"):
        mlx_loop.generate(view, tokenizer, prompt, draft="lookup")


def test_mlx_lms_functions_take_such_models(demo):
    model, tokenizer = demo
    view = model.with_loop(LoopConfig(**SETTINGS))
    prompt = asked(tokenizer)
    expected = mlx_loop.generate(view, tokenizer, prompt, max_tokens=20)
    assert mlx_lm.generate(view, tokenizer, prompt, max_tokens=20) == expected
    batch = batch_generate(view, tokenizer, [prompt, prompt], max_tokens=20)
    assert batch.texts == [expected, expected]
    assert len(list(generate_step(mx.array(prompt), view, max_tokens=3))) == 3
    with pytest.raises(UserError, match="draft='self'"):
        mlx_lm.generate(view, tokenizer, prompt, draft_model=model.with_loop(None))


def test_drafts_under_a_plain_prompt_give_the_same_tokens(demo):
    model, tokenizer = demo
    for policy in ("first", "own"):
        view = model.with_loop(LoopConfig(loops=4, prompt="plain", cache=policy))
        prompt = asked(tokenizer)
        alone = mlx_loop.generate(view, tokenizer, prompt)
        assert mlx_loop.generate(view, tokenizer, prompt, draft="self") == alone


@pytest.mark.parametrize("policy", ["first", "last", "own"])
def test_settings_share_a_whole_plain_prompt(model, policy):
    views = [model.with_loop(None), model.with_loop(loop(cache=policy, prompt="plain"))]
    views.append(model.with_loop(LoopConfig(window=(4, 6), loops=2, prompt="plain")))
    caches, text = [view.new_cache() for view in views], tokens(1, LENGTH)
    found = states(views, text[:, :-1], caches)
    assert all(mx.array_equal(state, found[0]) for state in found)
    for view, cache in zip(views, caches, strict=True):
        after = view.for_prompt(cache, 1)(text[:, -1:], cache=cache)
        alone = view.new_cache()
        phased = view.for_prompt(alone, LENGTH)
        phased(text[:, :-1], cache=alone)
        assert relative_error(after, phased(text[:, -1:], cache=alone)) < 1e-6
