"""The looped stack: what a loop computes, shares and costs."""

from __future__ import annotations

import gc
import re

import mlx.core as mx
import pytest
from conftest import embed, make, relative_error, tokens
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import does_model_support_input_embeddings as takes_embeddings
from reference import plain

from mlx_loop import LoopConfig, UserError
from mlx_loop.method.cache import leaves
from mlx_loop.method.loop import layer_passes

POLICIES = ("first", "last", "own")
WINDOW = (2, 6)


def decode(model, text, chunks):
    """Logits of `text` (batch, length) fed in pieces of the given lengths, then one by one."""
    cache, outs, at = make_prompt_cache(model), [], 0
    for length in (*chunks, *[1] * (text.shape[1] - sum(chunks))):
        outs.append(model(text[:, at : at + length], cache=cache))
        at += length
    return mx.concatenate(outs, axis=1)


def operations(arrays):
    """How often each operation stands in the graph that the arrays still need, by name."""
    mx.export_to_dot("graph.dot", *arrays)
    with open("graph.dot") as file:
        names = re.findall(r'label ?="(\w+)"', file.read())
    return {name: names.count(name) for name in set(names)}


# --- K = 1 ---


@pytest.mark.parametrize(
    ("policy", "integrator", "scope"),
    [
        ("first", "naive", "block"),
        ("last", "euler", "block"),
        ("own", "anchored", "block"),
        ("first", "anchored", "layer"),
        ("last", "naive", "layer"),
        ("own", "euler", "layer"),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_loop_is_mlx_lm_to_the_bit(any_model, policy, integrator, scope, dtype):
    if any_model.anatomy.mixes_experts and dtype != mx.float32:
        pytest.skip("MLX gathers experts on the CPU in float32 only")
    text = tokens(2, 12)
    any_model.set_dtype(dtype)
    one = any_model.with_loop(LoopConfig(loops=1, integrator=integrator, cache=policy, scope=scope))
    expected = decode(plain(any_model), text, (6, 3))
    assert mx.array_equal(decode(one, text, (6, 3)), expected)
    # The stand-ins, which a single loop does not need, change nothing either.
    cache, walk = one.new_cache(), one.walk()
    one.run(cache).put_into(walk)
    assert mx.array_equal(walk.run(text, cache), plain(any_model)(text))
    any_model.set_dtype(mx.float32)


def test_anchored_with_beta_1_is_the_unlooped_model(any_model):
    text = tokens(1, 10)
    looped = any_model.with_loop(LoopConfig(loops=6, beta=1.0, cache="last"))
    assert mx.array_equal(decode(looped, text, (6,)), decode(plain(any_model), text, (6,)))


def test_looping_off_is_the_unlooped_model(any_model):
    text = tokens(1, 10)
    assert mx.array_equal(any_model.with_loop(None)(text), plain(any_model)(text))


# --- Views ---


def test_a_view_shares_every_array(model):
    view = model.with_loop(LoopConfig(loops=6))
    arrays, others = (dict(tree_flatten(m.parameters())) for m in (model, view))
    assert arrays.keys() == others.keys()
    assert all(arrays[name] is others[name] for name in arrays)
    assert (model.loop, view.loop.loops) == (None, 6)


def test_views_cost_no_memory():
    model = make("llama")
    mx.eval(model(tokens(1, 4)))
    gc.collect()
    before = mx.get_active_memory()
    views = [model.with_loop(LoopConfig(loops=k)) for k in range(1, 9)]
    mx.eval([view.parameters() for view in views])
    assert mx.get_active_memory() == before


def test_settings_switch_live(model):
    text = tokens(1, 8)
    view = model.with_loop(LoopConfig(loops=2))
    two = view(text)
    view.loop = LoopConfig(loops=6, integrator="naive")
    six = view(text)
    view.loop = LoopConfig(loops=2)
    assert mx.array_equal(view(text), two)
    assert not mx.allclose(six, two)
    view.loop = None
    assert mx.array_equal(view(text), model(text))


def test_a_window_outside_the_model_is_refused_and_changes_nothing(model):
    view = model.with_loop(LoopConfig())
    before = view.loop
    with pytest.raises(UserError, match="8 layers"):
        view.loop = LoopConfig(window=(6, 9))
    assert view.loop == before


# --- Keys and values ---


@pytest.mark.parametrize(
    ("integrator", "scope"),
    [
        ("euler", "block"),
        ("anchored", "layer"),
        ("anchored", "block"),
        ("rk4", "layer"),
        ("anderson", "block"),
        ("uniform", "layer"),
    ],
)
def test_own_gives_the_same_logits_however_the_text_is_fed(any_model, integrator, scope):
    text = tokens(2, 12)
    looped = any_model.with_loop(
        LoopConfig(window=WINDOW, loops=3, integrator=integrator, scope=scope, cache="own")
    )
    whole = looped(text)
    for chunks in ((12,), (1, 6, 3)):
        assert relative_error(decode(looped, text, chunks), whole) < 1e-4


@pytest.mark.parametrize("policy", ["first", "last"])
def test_first_and_last_depend_on_how_the_text_is_fed(model, policy):
    # Not wanted, but what the policies say: it is why `own` exists.
    text = tokens(1, 24)
    looped = model.with_loop(LoopConfig(window=WINDOW, loops=3, cache=policy))
    assert relative_error(decode(looped, text, ()), looped(text)) > 1e-4


def test_without_a_cache_the_policy_does_not_matter(model):
    text = tokens(2, 12)
    outs = [
        model.with_loop(LoopConfig(loops=3, integrator="heun", cache=policy))(text)
        for policy in POLICIES
    ]
    assert mx.array_equal(outs[0], outs[1])
    assert mx.array_equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("policy", "extra_attention", "extra_products"),
    # Per evaluation a layer has 9 matrix products. `last` adds three layers and, of the window's
    # last layer, the two products that give keys and values.
    [("first", 0, 0), ("own", 0, 0), ("last", 3, 3 * 9 + 2)],
)
def test_a_step_computes_its_passes_and_nothing_else(
    model, policy, extra_attention, extra_products, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    counts = {}
    for loops in (1, 3):
        looped = model.with_loop(LoopConfig(window=WINDOW, loops=loops, cache=policy))
        cache = make_prompt_cache(looped)
        looped(tokens(1, 4), cache=cache)
        mx.eval([entry.state for entry in cache])
        logits = looped(tokens(1, 1), cache=cache)
        kept = [array for leaf in leaves(cache) for array in leaf.state[:2]]
        counts[loops] = operations([logits, *kept])
    assert counts[3]["Softmax"] == counts[1]["Softmax"] + 2 * 4 + extra_attention
    assert counts[3]["Matmul"] == counts[1]["Matmul"] + 2 * 4 * 9 + extra_products


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, 8),
        (LoopConfig(loops=1), 8),
        (LoopConfig(loops=3), 8 + 2 * 4),
        (LoopConfig(loops=3, cache="own"), 8 + 2 * 4),
        (LoopConfig(loops=3, cache="last"), 8 + 2 * 4 + 3),
        (LoopConfig(loops=3, cache="last", scope="layer"), 8 + 2 * 4),
        (LoopConfig(loops=2, integrator="rk4"), 8 + 7 * 4),
        (LoopConfig(loops=6, beta=1.0), 8),
        (LoopConfig(loops=3, window=((1, 2), (3, 6))), 8 + 2 * 4),
        (LoopConfig(loops=3, window=((1, 2), (3, 6)), cache="last"), 8 + 2 * 4 + 2),
        (LoopConfig(loops=3, gate="entropy:1"), 8 + 8 + 2 * 4),
    ],
)
def test_layer_passes(model, settings, expected):
    assert layer_passes(model.with_loop(settings).loop, 8) == expected


# --- What mlx models can do besides ---


def test_embeddings_may_take_the_place_of_tokens(any_model):
    text = tokens(1, 8)
    assert takes_embeddings(any_model) == takes_embeddings(plain(any_model))
    if not takes_embeddings(any_model):
        pytest.skip("mlx-lm's own model takes tokens only")
    for loop in (None, LoopConfig(loops=3)):
        view = any_model.with_loop(loop)
        embedded = embed(any_model, text)
        for given in (text, None):
            assert mx.array_equal(view(given, input_embeddings=embedded), view(text))


def test_gradients_flow_through_a_loop(model):
    looped = model.with_loop(LoopConfig(loops=3, norm="interpolated"))
    text = tokens(1, 8)

    def loss(embedded):
        return mx.mean(looped(text, input_embeddings=embedded).astype(mx.float32) ** 2)

    at = embed(model, text)
    direction = mx.random.normal(at.shape, key=mx.random.key(0))
    slope = mx.sum(mx.grad(loss)(at) * direction)
    step = 1e-3
    finite = (loss(at + step * direction) - loss(at - step * direction)) / (2 * step)
    # A central difference in float32.
    assert relative_error(finite, slope) < 2e-2


def test_a_pipelined_model_is_refused():
    model = make("qwen2")
    looped = model.with_loop(LoopConfig())
    model.model.pipeline_size = 2
    for split in (lambda: looped(tokens(1, 4)), lambda: model.with_loop(LoopConfig())):
        with pytest.raises(UserError, match="pipeline"):
            split()
