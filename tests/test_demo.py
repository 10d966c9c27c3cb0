"""The checkpoints that ship with the package: what they are, what they can do, what loops do."""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.checkpoints.loading import DEMOS

ROOT = Path(__file__).parent.parent
QUESTIONS = ROOT / "mlx_loop" / "demo" / "questions.jsonl"
SKILLS = ("facts", "two_hop", "fallback", "repeat")
EACH = 6  # questions of each skill


@pytest.fixture(scope="module", params=list(DEMOS))
def demo(request):
    """Each demo in turn, un-looped, in float32, and its tokenizer."""
    return mlx_loop.load(request.param, loop=None, dtype="float32")


@pytest.fixture(scope="module")
def questions():
    """The first few of each skill."""
    by_skill = defaultdict(list)
    for line in QUESTIONS.read_text().splitlines():
        question = json.loads(line)
        by_skill[question["skill"]].append(question)
    return [question for skill in SKILLS for question in by_skill[skill][:EACH]]


def share_right(model, tokenizer, questions):
    """Share of questions whose whole answer is what the model finds likeliest, token by token."""
    right = 0
    for question in questions:
        prompt = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True)
        answer = tokenizer.encode(question["answer"])
        logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]
        right += mx.argmax(logits, axis=-1).tolist() == answer
    return right / len(questions)


def test_naive_loops_destroy_what_damped_loops_keep(demo, questions):
    plain = share_right(*demo, questions)
    model, tokenizer = demo
    naive = model.with_loop(LoopConfig(integrator="naive", loops=4, scope="block"))
    anchored = model.with_loop(LoopConfig(integrator="anchored", loops=4, scope="block"))
    assert share_right(naive, tokenizer, questions) < plain - 0.2
    # Questions are few; the tables in docs/studies/results.md are the measurement.
    assert share_right(anchored, tokenizer, questions) > plain - 0.06


def test_a_demo_keeps_what_it_was_taught(demo, questions):
    facts = [question for question in questions if question["skill"] in ("facts", "two_hop")]
    assert share_right(*demo, facts) > 0.8


def test_the_folder_is_a_published_checkpoint(demo):
    model, _ = demo
    plain, tokenizer = mlx_lm.load(str(model.checkpoint.path))
    plain.set_dtype(mx.float32)
    ids = mx.array([tokenizer.encode("what is 12 + 30?")])
    assert mx.array_equal(plain(ids), model(ids))
    assert tokenizer.has_chat_template
    config = json.loads((model.checkpoint.path / "config.json").read_text())
    assert config["model_type"] in ("qwen3", "qwen3_moe", "deepseek_v3")


def test_matrices_can_be_quantised_in_groups_of_64(demo):
    model, _ = demo
    weights = mx.load(str(model.checkpoint.path / "model.safetensors"))
    assert all(w.shape[-1] % 64 == 0 for w in weights.values() if w.ndim > 1)


def test_all_demos_together_are_small():
    files = [file for file in QUESTIONS.parent.glob("*/*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 15e6


def test_the_card_of_a_demo_holds_its_log(demo):
    model, _ = demo
    lines = [json.loads(line) for line in (model.checkpoint.path / "training_log.jsonl").open()]
    final = {line["final"]: line["accuracy"] for line in lines if "final" in line}
    card = (model.checkpoint.path / "README.md").read_text()
    assert all(f"| {skill} | {accuracy:.1%} |" in card for skill, accuracy in final.items())
    assert final


@pytest.fixture(scope="module")
def data():
    """scripts/demo_data.py, which made the questions."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import demo_data
    finally:
        sys.path.pop(0)
    return demo_data


def test_the_questions_are_what_the_script_writes(data):
    published = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    for skill in data.CHECKED:
        made = data.questions(data.QUESTION_SEED, skill, 300)
        assert made == [question for question in published if question["skill"] == skill], skill


def test_training_never_sees_a_held_out_question(data):
    # Skills whose last message is the whole question.
    alone = ("facts", "two_hop", "add", "sum", "sort", "reverse", "count", "repeat")
    published = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    held_out = {q["messages"][-1]["content"] for q in published if q["skill"] in alone}
    seen = set()
    for i in range(500):
        talk = data.conversation(random.Random(f"test {i}"), data.Stage(hops=data.MAX_HOPS))
        seen |= {message["content"] for _, message in zip(range(24), talk, strict=False)}
    assert len(seen) > 5000
    assert sorted(seen & held_out) == []
