"""Everything that mlx-lm does with a model works with a looped one."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import mlx.core as mx
import mlx_lm
import pytest
from conftest import make, relative_error, tokens
from mlx.utils import tree_flatten
from mlx_lm.generate import batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    LRUPromptCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

import mlx_loop
from mlx_loop import Guard, LoopConfig
from mlx_loop.method.cache import leaves

POLICIES = ("first", "last", "own")
PROMPT = tokens(1, 13, seed=3)[0]


class Tokenizer:
    """As much of one as batch_generate asks for."""

    eos_token_ids = frozenset()

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(params=POLICIES)
def looped(model, request):
    return model.with_loop(LoopConfig(window=(2, 6), loops=3, cache=request.param))


def generated(model, prompt=PROMPT, max_tokens=8, **kwargs):
    return [token for token, _ in generate_step(prompt, model, max_tokens=max_tokens, **kwargs)]


def by_hand(model, prompt, count):
    """Greedy tokens from the model's own calls, fed as mlx-lm feeds them."""
    cache = make_prompt_cache(model)
    if len(prompt) > 1:
        model(prompt[None, :-1], cache=cache)
    token, out = prompt[None, -1:], []
    for _ in range(count):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        out.append(token.item())
    return out


def test_generate(looped):
    assert generated(looped) == by_hand(looped, PROMPT, 8)


def test_generate_differs_from_the_unlooped_model(model):
    assert generated(model.with_loop(LoopConfig(loops=4, integrator="naive"))) != generated(model)


def test_a_decode_step_reads_no_value_and_so_never_waits_for_the_device(looped):
    cache = make_prompt_cache(looped)
    looped(PROMPT[None], cache=cache)
    token = mx.array([[5]])
    # While MLX traces a function, reading a value of anything that depends on its input fails.
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda token: token if token.item() else 2 * token)(token)
    assert mx.compile(lambda token: looped(token, cache=cache))(token).shape == (1, 1, 320)


def test_chunked_prefill_under_own_changes_nothing(model):
    looped = model.with_loop(LoopConfig(loops=3, cache="own"))
    expected = generated(looped)
    for step in (1, 4, 5, 12):
        assert generated(looped, prefill_step_size=step) == expected


def test_batches_of_prompts_of_different_lengths(looped):
    prompts = [PROMPT.tolist(), [5, 6, 7], [9], PROMPT.tolist()[2:8]]
    found = batch_generate(looped, Tokenizer(), prompts, max_tokens=6, return_token_ids=True)
    assert found.token_ids == [by_hand(looped, mx.array(p), 6) for p in prompts]


def test_a_batch_that_takes_prompts_in_as_others_end(looped):
    prompts = [[5 + i, 6, 7, 8 + i] for i in range(6)]
    lengths = [2, 7, 3, 5, 4, 6]
    found = batch_generate(
        looped,
        Tokenizer(),
        prompts,
        max_tokens=lengths,
        return_token_ids=True,
        completion_batch_size=3,
        prefill_batch_size=2,
    )
    expected = [by_hand(looped, mx.array(p), n) for p, n in zip(prompts, lengths, strict=True)]
    assert found.token_ids == expected


def test_a_batch_goes_on_from_prompt_caches(looped):
    prompts = [PROMPT.tolist(), [5, 6, 7]]
    first = batch_generate(looped, Tokenizer(), prompts, max_tokens=3, return_prompt_caches=True)
    more = [[11, 12], [13, 14, 15]]
    found = batch_generate(
        looped,
        Tokenizer(),
        more,
        prompt_caches=copy.deepcopy(first.caches),
        max_tokens=4,
        return_token_ids=True,
    )
    for tokens_, cache, prompt in zip(found.token_ids, first.caches, more, strict=True):
        assert tokens_ == generated(looped, mx.array(prompt), 4, prompt_cache=cache)


def test_left_padding_under_own_changes_no_logits(model):
    looped = model.with_loop(LoopConfig(window=(2, 6), loops=3, cache="own"))
    rows = [PROMPT.tolist(), PROMPT.tolist()[:5]]
    cache = [
        type(entry).merge([entry, copy.deepcopy(entry)]) for entry in make_prompt_cache(looped)
    ]
    for entry in cache:
        entry.prepare(left_padding=[0, 8])
    batch = looped(mx.array([rows[0], [0] * 8 + rows[1]]), cache=cache)
    for row, ids in zip(batch, rows, strict=True):
        assert relative_error(row[-len(ids) :], looped(mx.array([ids]))[0]) < 1e-4


def test_a_prompt_cache_extended_over_turns_equals_one_prompt_under_own(model):
    looped = model.with_loop(LoopConfig(loops=3, cache="own"))
    cache = make_prompt_cache(looped)
    for turn in (PROMPT[:6], PROMPT[6:9]):
        looped(turn[None], cache=cache)
    assert generated(looped, PROMPT[9:], prompt_cache=cache) == generated(looped)


def test_a_trimmed_prompt_cache_is_as_if_the_rest_had_never_been(looped):
    cache, other = make_prompt_cache(looped), make_prompt_cache(looped)
    looped(PROMPT[None, :6], cache=cache)
    looped(PROMPT[None, 6:], cache=cache)
    looped(PROMPT[None, :6], cache=other)
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 7) == 7
    more = mx.array([7, 8, 9])
    assert generated(looped, more, prompt_cache=cache) == generated(
        looped, more, prompt_cache=other
    )


def test_a_prompt_cache_survives_mlx_lms_own_files(looped, tmp_path):
    cache = make_prompt_cache(looped)
    looped(PROMPT[None], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    more = mx.array([7, 8, 9])
    assert generated(looped, more, prompt_cache=loaded) == generated(
        looped, more, prompt_cache=cache
    )


def test_the_servers_cache_trie_takes_looped_caches(looped):
    trie, key, ids = LRUPromptCache(), ("m", None, None), PROMPT.tolist()
    cache = make_prompt_cache(looped)
    looped(PROMPT[None], cache=cache)
    trie.insert_cache(key, ids, cache)
    shorter, rest = trie.fetch_nearest_cache(key, [*ids[:8], 99, 98])
    assert rest == [99, 98]
    fresh = make_prompt_cache(looped)
    looped(PROMPT[None], cache=fresh)
    trim_prompt_cache(fresh, 5)
    more = mx.array(rest)
    assert generated(looped, more, prompt_cache=shorter) == generated(
        looped, more, prompt_cache=fresh
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("start", [0, 16])
def test_quantised_kv_cache(looped, bits, start):
    cache = make_prompt_cache(looped)
    found = generated(
        looped, prompt_cache=cache, kv_bits=bits, kv_group_size=32, quantized_kv_start=start
    )
    assert {type(leaf) for leaf in leaves(cache)} == {QuantizedKVCache}
    assert {leaf.bits for leaf in leaves(cache)} == {bits}
    assert len(found) == 8
    if bits == 8:
        # Eight bits leave the logits close: the first token is that of the full cache.
        assert found[0] == generated(looped)[0]


def test_a_quantised_cache_survives_a_file(looped, tmp_path):
    cache = make_prompt_cache(looped)
    generated(looped, prompt_cache=cache, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    more = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    assert generated(looped, prompt_cache=loaded, **more) == generated(
        looped, prompt_cache=cache, **more
    )


def test_max_kv_size_below_its_limit_changes_nothing(model):
    for policy in ("first", "last"):
        looped = model.with_loop(LoopConfig(loops=3, cache=policy))
        assert generated(looped, max_kv_size=32) == generated(looped)


def test_max_kv_size_keeps_the_cache_small(model):
    looped = model.with_loop(LoopConfig(loops=3))
    cache = make_prompt_cache(looped, max_kv_size=16)
    generated(looped, max_tokens=30, prompt_cache=cache)
    assert {entry.size() for entry in cache} == {16}


def test_speculative_decoding_gives_the_same_tokens_under_own(model):
    looped = model.with_loop(LoopConfig(loops=3, cache="own"))
    for draft in (model, looped, make("qwen3", seed=1)):
        found = [out[0] for out in speculative_generate_step(PROMPT, looped, draft, max_tokens=12)]
        assert found == generated(looped, max_tokens=12)


@pytest.mark.parametrize("policy", ["first", "last"])
def test_speculative_decoding_runs_under_first_and_last(model, policy):
    # A chunk of drafted tokens attends among its own iterates, so tokens may differ.
    looped = model.with_loop(LoopConfig(loops=3, cache=policy))
    found = [out[0] for out in speculative_generate_step(PROMPT, looped, model, max_tokens=12)]
    assert len(found) == 12
    assert found[0] == generated(looped)[0]


def test_adapters_apply_to_a_looped_model_and_all_its_views(tmp_path):
    settings = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    source = make("qwen3")
    linear_to_lora_layers(source, 8, settings)
    mx.random.seed(0)
    adapters = {
        name: mx.random.normal(array.shape) * 0.1
        for name, array in tree_flatten(source.parameters())
        if "lora" in name
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), adapters)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 8, "lora_parameters": settings})
    )
    model = make("qwen3")
    view = model.with_loop(LoopConfig(loops=3))
    text = tokens(1, 8)
    before = view(text)
    load_adapters(model, str(tmp_path))
    assert not mx.allclose(view(text), before)
    source.load_weights(list(adapters.items()), strict=False)
    assert mx.array_equal(view(text), source.with_loop(LoopConfig(loops=3))(text))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_and_pickled(looped, again):
    other = again(looped)
    assert (type(other), other.loop) == (type(looped), looped.loop)
    text = tokens(1, 8)
    assert mx.array_equal(other(text), looped(text))
    other.model.embed_tokens.weight = mx.zeros_like(other.model.embed_tokens.weight)
    assert not mx.array_equal(other(text), looped(text))


@pytest.mark.parametrize("loop", [None, LoopConfig(loops=3), LoopConfig(loops=3, cache="own")])
def test_make_cache_can_be_replaced(model, loop):
    view, other = model.with_loop(loop), model.with_loop(loop)
    view.make_cache = lambda: other.new_cache(16)
    assert {leaf.max_size for leaf in leaves(make_prompt_cache(view))} == {16}
    assert generated(view, max_tokens=20) == generated(other, max_tokens=20, max_kv_size=16)
    view.make_cache = lambda: model.with_loop(None).new_cache(16)
    assert generated(view, max_tokens=20) == generated(other, max_tokens=20, max_kv_size=16)
    del view.make_cache
    assert generated(view, max_tokens=20) == generated(other, max_tokens=20)


def test_max_kv_size_is_honoured_by_mlx_lms_own_functions_under_own(model):
    looped = model.with_loop(LoopConfig(loops=3, cache="own"))
    cache = make_prompt_cache(looped, max_kv_size=16)
    assert {leaf.max_size for leaf in leaves(cache)} == {16}
    assert generated(looped, max_kv_size=16, max_tokens=20) == generated(
        looped, prompt_cache=cache, max_tokens=20
    )
    assert generated(looped, max_kv_size=16, max_tokens=20) != generated(looped, max_tokens=20)


def test_a_model_loaded_in_one_thread_answers_in_another():
    loop = LoopConfig(loops=3, guard=Guard())
    found = {}

    def load():
        found["model"] = mlx_loop.load("demo", loop=loop)

    def generate():
        found["text"] = mlx_lm.generate(*found["model"], "hello", max_tokens=4)

    for work in (load, generate):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    model, tokenizer = found["model"]
    assert found["text"] == mlx_lm.generate(model, tokenizer, "hello", max_tokens=4)


def test_loading_counts_no_token_of_the_guards():
    model = mlx_loop.load_model("demo", loop=LoopConfig(loops=3, guard=Guard()))
    assert model.take_firings() == (0, 0)
