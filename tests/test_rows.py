"""Rows of one batch under settings of their own: each as if it were alone."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import make
from mlx_lm.generate import BatchGenerator, generate_step
from zoo import build

from mlx_loop import Guard, LoopConfig
from mlx_loop.method.anatomy import StandIn, with_layers
from mlx_loop.models.mixed import Mixed, Settings

SETTINGS = [
    None,
    LoopConfig(loops=3),
    LoopConfig(loops=6, beta=0.25),
    LoopConfig(loops=2, horizon=2.0),
    LoopConfig(loops=2, integrator="naive"),
    LoopConfig(loops=3, integrator="euler", scope="layer"),
    LoopConfig(loops=1, integrator="rk4"),
    LoopConfig(loops=4, integrator="anderson"),
    LoopConfig(loops=2, integrator="aitken"),
    LoopConfig(loops=3, integrator="uniform"),
    LoopConfig(loops=3, norm="interpolated"),
    LoopConfig(loops=4, guard=Guard(0.5)),
    LoopConfig(loops=3, window=(0, 2)),
    LoopConfig(loops=2, window=((1, 3), (4, 6))),
]
PROMPTS = [[5, 9, 2, 7, 11], [8, 3], [4, 4, 6, 1, 9, 12, 30], [17, 2, 3]]


def alone(view, prompt, count):
    """Tokens and log-probabilities of a row by itself, (count, vocab)."""
    cache = view.new_cache()
    steps = generate_step(mx.array(prompt), view, max_tokens=count, prompt_cache=cache)
    return [(token, logprobs) for token, logprobs in steps]


def together(model, rows):
    """The same of rows (loop, prompt, count) in mlx-lm's batches, half of them joining later."""
    mixed = Mixed(model)
    batch = BatchGenerator(mixed, stop_tokens=[])
    found = {}

    def insert(some):
        for loop, prompt, count in some:
            mixed.loop = loop
            (uid,) = batch.insert([prompt], [count])
            found[uid] = []

    half = len(rows) // 2
    insert(rows[:half])
    for step in range(100):
        if step == 3:
            insert(rows[half:])
        for response in batch.next()[1]:
            found[response.uid].append((response.token, response.logprobs))
            if response.finish_reason:
                *_, settings = response.prompt_cache
                assert settings.rows == [rows[response.uid][0]]
    batch.close()
    return [found[uid] for uid in range(len(rows))]


def check(model, settings):
    views = [model.with_loop(loop) for loop in settings]
    assert all(map(Mixed.takes, views))
    rows = [
        (None if view.is_unlooped else view.loop, PROMPTS[n % 4], 3 + n % 5)
        for n, view in enumerate(views)
    ]
    for view, row, found in zip(views, rows, together(model, rows), strict=True):
        expected = alone(view, *row[1:])
        assert [token for token, _ in found] == [token for token, _ in expected], view.loop
        for (_, a), (_, b) in zip(found, expected, strict=True):
            assert mx.abs(a - b).max() < 1e-4 * mx.abs(b).max(), view.loop


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_rows_of_any_settings_answer_as_alone(name):
    check(make(name), SETTINGS)


def test_rows_with_frozen_and_live_routing_answer_as_alone():
    both = [LoopConfig(loops=k, routing=r) for k in (2, 3) for r in ("live", "frozen")]
    check(make("qwen3_moe"), [None, *both])


def test_a_layer_is_read_as_often_as_the_longest_loop_needs_it(model):
    shapes = {i: [] for i in range(len(model.layers))}

    def counted(i, layer):
        def call(x, *rest, **more):
            shapes[i].append(x.shape[0])
            return layer(x, *rest, **more)

        return StandIn(layer, call)

    places = {
        where.path: counted(i, layer)
        for i, (where, layer) in enumerate(zip(model.anatomy.layers, model.layers, strict=True))
    }
    loops = [None, *(model.with_loop(LoopConfig(loops=k)).loop for k in (2, 3, 6))]
    cache = [entry.merge([entry] * 4) for entry in model.new_cache()]
    Mixed(with_layers(model, places))(mx.array([[1], [2], [3], [4]]), [*cache, Settings(loops)])
    for i, rows in shapes.items():
        assert rows == ([4, 3, 2, 1, 1, 1] if i in loops[1].layers else [4])


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("qwen3", LoopConfig(loops=3, cache="last")),
        ("qwen3", LoopConfig(loops=3, cache="own")),
        ("qwen3", LoopConfig(loops=3, decode="bypass")),
        ("qwen3", LoopConfig(loops=3, prompt="plain")),
        ("qwen3", LoopConfig(loops=3, gate="entropy:1")),
        ("gemma3_text", LoopConfig(loops=3)),
        ("gemma3n", LoopConfig(loops=3, window=(0, 2))),
        ("jamba", LoopConfig(loops=3)),
    ],
)
def test_what_rows_cannot_share_is_known_before(name, loop):
    model = make(name) if name == "qwen3" else build(name)
    assert not Mixed.takes(model.with_loop(loop))
