"""What is assumed of mlx-lm beyond its documented interface: one test for each assumption."""

from __future__ import annotations

import argparse
import copy
import inspect
import queue
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from conftest import make, relative_error, tokens
from mlx_lm import server
from mlx_lm.generate import (
    generate_step,
    maybe_quantize_kv_cache,
    speculative_generate_step,
)
from mlx_lm.models import cache as caches
from mlx_lm.models.cache import KVCache, LRUPromptCache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from transformers import PreTrainedTokenizerBase
from zoo import build

import mlx_loop
from mlx_loop import LoopConfig, UserError, upstream, upstream_server
from mlx_loop.models import get_classes


def written(cache, length, at=0):
    keys = mx.random.normal((2, 2, length, 32), key=mx.random.key(at))
    cache.update_and_fetch(keys, 2 * keys)
    return cache


def test_a_name_that_mlx_lm_no_longer_has_is_told_in_one_line():
    with pytest.raises(UserError, match=r"mlx-lm 0\..* has no utils:_gone.*pip install"):
        upstream._need("utils:_gone")


def test_nothing_private_of_mlx_lm_is_reached_from_another_module():
    package = Path(mlx_loop.__file__).parent
    private = re.compile(r"mlx_lm[\w.]*\._\w|\.(_idx|_offset|_lengths|_temporal_order|rotated)\b")
    found = [
        f"{file.relative_to(package)}: {line.strip()}"
        for file in package.rglob("*.py")
        if file.name != "upstream.py"
        for line in file.read_text().splitlines()
        if private.search(line)
    ]
    assert found == []


def test_every_cache_derives_from_base_cache():
    # _BaseCache
    classes = [c for c in vars(caches).values() if isinstance(c, type) and "Cache" in c.__name__]
    assert sum(issubclass(c, upstream.BaseCache) for c in classes) >= 10
    assert {c.__name__ for c in classes if not issubclass(c, upstream.BaseCache)} == {
        "LRUPromptCache"
    }


def test_rotating_caches_keep_four_leading_tokens(model):
    # make_prompt_cache
    assert caches.make_prompt_cache(model, 16)[0].keep == upstream.ROTATING_KEEP


@pytest.mark.parametrize(
    ("cache", "length", "expected"),
    [
        (caches.KVCache(), 3, 3),
        (caches.QuantizedKVCache(group_size=32), 3, 3),
        (caches.RotatingKVCache(4), 9, 9),
        (caches.BatchKVCache([1, 0]), 3, 3),  # _idx
        (caches.BatchRotatingKVCache(4, [1, 0]), 9, 9),  # _offset
        (caches.ChunkedKVCache(4), 9, 9),
    ],
)
def test_position_is_how_many_tokens_were_written(cache, length, expected):
    assert upstream.position(written(cache, length)) == expected


def test_recurrent_state_does_not_count_tokens_and_a_list_counts_by_its_members():
    assert upstream.position(caches.ArraysCache(2)) is None
    both = caches.CacheList(caches.ArraysCache(2), written(caches.KVCache(), 3))
    assert upstream.position(both) == 3


@pytest.mark.parametrize("before", [3, 8, 11])
@pytest.mark.parametrize(
    "cache",
    [lambda: caches.RotatingKVCache(8, 2), lambda: caches.BatchRotatingKVCache(8, [1, 0])],
)
def test_one_step_back_undoes_one_token(cache, before):
    # trim, rotated, left_padding
    found, expected = cache(), cache()
    for other in (found, expected):
        for i in range(before):
            written(other, 1, i)
    written(found, 1, 98)
    upstream.one_step_back(found)
    for other in (found, expected):
        written(other, 1, 99)
    for name, value in vars(expected).items():
        same = mx.array_equal if isinstance(value, mx.array) else lambda a, b: a == b
        assert same(getattr(found, name), value), name


def test_rows_of_a_batch_are_those_of_filter_and_the_batch_stays(model):
    caches = [model.new_cache()[0] for _ in range(3)]
    for n, entry in enumerate(caches):
        entry.update_and_fetch(*mx.random.normal((2, 1, 2, 3 + n, 8)))
    whole = caches[0].merge(caches)
    before = [mx.array(array) for array in whole.state[:4]]
    some = upstream.rows_before(whole, mx.array([2, 0]), 1)
    expected = copy.deepcopy(whole)
    expected.filter([2, 0])
    expected.trim(1)
    new = mx.random.normal((2, 2, 2, 1, 8))
    pairs = zip(some.update_and_fetch(*new), expected.update_and_fetch(*new), strict=True)
    assert all(mx.array_equal(a, b) for a, b in pairs)
    assert some.offset.tolist() == expected.offset.tolist()
    assert some.left_padding.tolist() == expected.left_padding.tolist()
    assert all(mx.array_equal(a, b) for a, b in zip(whole.state[:4], before, strict=True))


def test_a_snapshot_is_not_harmed_by_later_writes_and_copies_nothing():
    cache = written(caches.KVCache(), 3)
    mx.eval(cache.state[:2])
    before, keys = mx.get_active_memory(), mx.array(cache.keys)
    kept = upstream.snapshot(cache)
    mx.eval(kept["keys"])
    assert mx.get_active_memory() == before
    written(cache, 2, 1)
    upstream.restore(cache, kept)
    assert cache.offset == 3
    assert mx.array_equal(cache.keys, keys)


def test_prompt_cache_files_look_classes_up_by_name(tmp_path):
    # globals()[name] in load_prompt_cache
    file = str(tmp_path / "cache.safetensors")
    for ours in (upstream.KVCache(), upstream.CacheList(caches.KVCache(), caches.KVCache())):
        for leaf in getattr(ours, "caches", (ours,)):
            written(leaf, 3)
        caches.save_prompt_cache(file, [ours])
        (loaded,) = caches.load_prompt_cache(file)
        assert type(loaded).__name__ == type(ours).__name__
        assert type(loaded).__module__ == caches.__name__


def test_quantising_a_cache_replaces_the_entry_and_keeps_its_mark():
    # maybe_quantize_kv_cache: to_quantized, offset
    for entry in (caches.KVCache(), upstream.CacheList(caches.KVCache(), caches.KVCache())):
        for leaf in getattr(entry, "caches", (entry,)):
            written(leaf, 3)
        cache = [entry]
        upstream.mark(cache, "here")
        maybe_quantize_kv_cache(cache, 0, 32, 8)
        assert cache[0] is not entry
        assert upstream.marked(cache) == "here"
        maybe_quantize_kv_cache(cache, 0, 32, 8)  # What is quantised stays as it is.
        assert upstream.marked(cache) == "here"


def test_the_call_that_asks_for_a_cache_is_known(model):
    # make_prompt_cache: its name, its argument max_kv_size, and that it calls make_cache
    asked = []

    class Asking:
        layers = model.layers

        def make_cache(self):
            asked.append(upstream.request())
            return [caches.KVCache() for _ in self.layers]

    caches.make_prompt_cache(Asking(), max_kv_size=7)
    view = model.with_loop(LoopConfig(loops=2))
    view.make_cache = Asking().make_cache
    next(generate_step(tokens(1, 4)[0], view, max_tokens=1, max_kv_size=9))
    assert asked == [upstream.Request(7, False), upstream.Request(9, True)]
    assert upstream.request() == upstream.Request()


@pytest.mark.parametrize("name", upstream.NOT_CAUSAL)
def test_a_type_that_is_not_causal(name):
    model, text = build(name), tokens(1, 9)
    assert relative_error(model(text[:, :8]), model(text)[:, :8]) > 1e-3


def test_model_types_are_the_files_of_mlx_lm():
    types = upstream.model_types()
    assert {"llama", "qwen3", "gemma3_text", "lfm2-vl", "nemotron-nas"} < set(types)
    assert not {"base", "cache", "rope_utils", "switch_layers"} & set(types)
    assert set(upstream.REMAPPING.values()) <= set(types)


@pytest.mark.parametrize("as_list", [True, False])
def test_the_architecture_chooses_the_file_as_in_mlx_lm(as_list):
    # _get_classes
    assert upstream.ARCHITECTURES
    for model_type, name in [*upstream.ARCHITECTURES, ("qwen2_5_vl", "any"), ("llama", "any")]:
        config = {"model_type": model_type, "architectures": [name] if as_list else name}
        looped, args = get_classes(config)
        assert (looped.__bases__[1], args.__bases__[0]) == mlx_lm.utils._get_classes(config)


def test_speculative_decoding_is_told_by_its_name():
    # speculative_generate_step, which makes its caches by make_prompt_cache
    source = inspect.getsource(speculative_generate_step)
    assert "make_prompt_cache" in source


def test_experts_are_called_with_states_and_numbers():
    # SwitchGLU, SwitchMLP: up_proj or fc1, num_experts, output_dims
    for kind, first in ((SwitchGLU, "up_proj"), (SwitchMLP, "fc1")):
        assert kind in upstream.EXPERTS
        experts = kind(32, 16, 4)
        assert (experts[first].num_experts, experts[first].output_dims) == (4, 16)
        assert experts(mx.zeros((1, 3, 32)), mx.zeros((1, 3, 2), mx.uint32)).shape == (1, 3, 2, 32)


# --- Pipelines ---


def test_a_pipeline_keeps_the_numbers_of_its_layers():
    class Group:
        def size(self):
            return 3

        def rank(self):
            return 1

    model = make("qwen2")
    layers = list(model.model.layers)
    assert isinstance(model.model, upstream.Pipeline)
    model.model.pipeline(Group(), [3, 3, 2])
    assert model.model.layers == [None, None, *layers[2:5]]
    assert model.layers == layers[2:5]


# --- The server ---


class OneModel(server.ModelProvider):
    """The demo model, whatever is asked for."""

    def __init__(self, batches):
        self.cli_args = argparse.Namespace(
            adapter_path=None,
            chat_template=None,
            chat_template_args={},
            decode_concurrency=4,
            draft_model=None,
            kv_bits=None,
            kv_group_size=64,
            model=None,
            pipeline=False,
            prefill_step_size=64,
            prompt_cache_bytes=None,
            prompt_concurrency=4,
            quantized_kv_start=0,
            trust_remote_code=False,
        )
        super().__init__(self.cli_args)
        self.model, self.tokenizer = mlx_loop.load("demo", loop=None)
        self.model_key, self.is_batchable = ("demo", None, None), batches

    def load_default(self):
        pass

    def load(self, *_):
        return self.model, self.tokenizer


def asked(batch, **changes):
    """The tokens of a short answer."""
    sampling = server.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.1)
    penalties = server.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20)
    args = server.GenerationArguments(
        server.ModelDescription("m", "m", None), sampling, penalties, [], 4, 3, False, 0, None, None
    )
    vars(args).update(changes)
    request = server.CompletionRequest("text", "Once upon a", [], None, None)
    _, responses = batch.generate(request, args)
    return [response.token for response in responses]


@contextmanager
def serving(batches, admit=lambda *_: None, stream=None, turns=None, most=None):
    batch = upstream_server.Batch(
        OneModel(batches),
        LRUPromptCache(),
        turns or nullcontext(),
        admit,
        stream,
        batches=lambda name: batches,
        whole=lambda name: True,
        most=most,
    )
    try:
        yield batch
    finally:
        batch.stop_and_join()


def test_a_request_is_admitted_with_its_tokens_and_what_that_raises_reaches_who_asked():
    # _tokenize
    seen = []

    def admit(request, args, tokens):
        seen.append(tokens)
        if len(seen) > 1:
            raise UserError("no more")

    for batches in (True, False):
        seen.clear()
        with serving(batches, admit, upstream_server._stream_generate) as batch:
            asked(batch)
            with pytest.raises(UserError, match="no more"):
                asked(batch)
            assert batch.is_healthy
            assert seen[0] == batch.model_provider.tokenizer.encode("Once upon a")


@pytest.mark.parametrize("batches", [True, False])
def test_a_requests_own_processors_see_its_logits(batches):
    # _make_logits_processors
    def only(token):
        return lambda _, logits: mx.where(mx.arange(logits.shape[-1]) == token, logits, -mx.inf)

    with serving(batches, stream=upstream_server._stream_generate) as batch:
        assert asked(batch, processors=[only(7)]) == [7] * 4
        assert asked(batch) != [7] * 4


def test_a_request_alone_is_answered_by_the_given_stream():
    # stream_generate, _serve_single
    asked_for = []

    def stream(**kwargs):
        asked_for.append(set(kwargs))
        return upstream_server._stream_generate(**kwargs)

    with serving(False, stream=stream) as batch:
        asked(batch)
    (names,) = asked_for
    assert names == {
        *("model", "tokenizer", "prompt", "max_tokens", "sampler", "logits_processors", "stream"),
        *("prompt_cache", "draft_model", "num_draft_tokens", "input_embeddings", "kv_bits"),
        *("prompt_progress_callback", "prefill_step_size", "kv_group_size", "quantized_kv_start"),
    }


def test_a_shared_batch_makes_the_cache_of_a_request_after_admitting_it():
    # _generate: the model that it compares, and the order of _tokenize and make_cache
    events = []

    def admit(request, args, tokens):
        events.append(args.model.model)

    with serving(True, admit, most=4) as batch:
        batch.prompt_cache._kept.max_size = 0
        model = batch.model_provider.model
        model.make_cache = lambda: events.append("cache") or [KVCache() for _ in model.layers]
        for name in ("a", "b", "a"):
            asked(batch, model=server.ModelDescription(name, None, None))
    assert events == ["a", "cache", "b", "cache", "a", "cache"]


def test_a_request_is_under_way_until_it_ends_or_nobody_wants_it():
    # What _generate puts, and GenerationContext._should_stop
    with serving(True, most=1) as batch:
        assert asked(batch) == asked(batch)
        assert not any(asker.is_under_way for asker in batch._held)
    waiting = queue.Queue()
    asker = upstream_server._Asker(waiting)
    asker.put(server.GenerationContext(False, False, None, None, [], 0))
    assert asker.is_under_way
    waiting.get().stop()
    assert not asker.is_under_way


def test_requests_to_each_model_are_taken_in_turn():
    waiting = upstream_server._ByModel()
    for n, name in enumerate("aaabac"):
        args = argparse.Namespace(model=server.ModelDescription(name, None, None))
        waiting.put((n, None, args))
    assert [waiting.get_nowait()[0] for _ in range(waiting.qsize())] == [0, 3, 5, 1, 2, 4]
    assert waiting.empty()


def test_each_step_of_a_batch_has_a_turn():
    # _time_budget
    class Turns:
        taken = held = 0

        def __enter__(self):
            assert not self.held
            self.taken, self.held = self.taken + 1, 1

        def __exit__(self, *_):
            self.held = 0

    turns = Turns()
    with serving(True, turns=turns) as batch:
        said = asked(batch)
    assert turns.taken > len(said) > 0
    assert not turns.held


def test_mlx_lms_handler_answers_404_whatever_was_wrong():
    # handle_completion
    text = inspect.getsource(server.APIHandler.handle_completion)
    assert re.search(r"except Exception as e:\n\s+self._set_completion_headers\(404\)", text)


def test_the_wrapper_holds_a_tokenizer_of_transformers():
    # _tokenizer
    tokenizer = mlx_loop.load("demo")[1]
    assert isinstance(upstream.hugging_face(tokenizer), PreTrainedTokenizerBase)
