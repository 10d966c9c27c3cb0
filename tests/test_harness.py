"""Tasks of lm-evaluation-harness on a looped model, offline."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.measure.comparison import distinct
from mlx_loop.measure.report import read
from mlx_loop.measure.results import Results
from mlx_loop.measure.study import RESULTS, run
from mlx_loop.measure.tasks.harness import Harness, rows

QUESTIONS = [
    {"question": "Where does Mia live?", "choices": ["Norwick", "Larkton"], "answer": 0},
    {"question": "What is Tom's job?", "choices": ["baker", "teacher"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a task and its data; no network."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(name="tiny_world", data=data))
    return tmp_path


def likelihood(view, tokenizer, question, choice):
    """log p(choice | question), with the chat template, in one forward pass."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    start = tokenizer.encode(prompt, add_special_tokens=False)
    tokens = tokenizer.encode(prompt + choice, add_special_tokens=False)
    logits = view(mx.array([tokens]))[0].astype(mx.float32)
    chances = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sum(chances[i - 1, tokens[i]].item() for i in range(len(start), len(tokens)))


def test_a_local_task_under_every_setting(folder):
    model, tokenizer = mlx_loop.load("demo", dtype="float32")
    views = distinct(model, [LoopConfig(loops=2, cache="own")])
    results = Results.open(folder / RESULTS, {"model": "demo"})
    harness = Harness(["tiny_world"], folder, limit=2)
    run(views, tokenizer, harness, results, lambda count: None)
    scores = read(folder)
    assert scores.problems == [("tiny_world", None, 0), ("tiny_world", None, 1)]
    for i, view in enumerate(views):
        for j, question in enumerate(QUESTIONS):
            found = [
                likelihood(view, tokenizer, question["question"], c) for c in question["choices"]
            ]
            row = results.of(view.loop, {"item": f"tiny_world/{j}"})
            # The adapter scores through a cache, in pieces; `own` is the policy that allows it.
            assert [float(r[0]) for r in row["answer"]] == pytest.approx(found, abs=2e-3)
            assert scores.values[i, j] == (found.index(max(found)) == question["answer"])
    before = (folder / RESULTS).read_text()
    again = Results.open(folder / RESULTS, {"model": "demo"})
    run(views, tokenizer, harness, again, lambda count: None)
    assert (folder / RESULTS).read_text() == before


@pytest.mark.parametrize("settings", [{"prompt": "plain"}, {"gate": "entropy:1"}, {"decode": 2}])
def test_likelihoods_are_refused_where_answers_would_pass_as_prompts(folder, settings):
    model, tokenizer = mlx_loop.load("demo")
    view = model.with_loop(LoopConfig(loops=2, **settings))
    with pytest.raises(UserError, match="choices:FILE"):
        list(
            Harness(["tiny_world"], folder).measure(
                [view], tokenizer, [{"item": "lm_eval:tiny_world"}]
            )
        )


def test_an_unknown_task_is_one_line(folder, model):
    tokenizer = mlx_loop.load("demo")[1]
    results = Results.open(folder / RESULTS, {"model": "demo"})
    with pytest.raises(UserError, match="no_such_task") as caught:
        run([model], tokenizer, Harness(["no_such_task"]), results, lambda count: None)
    assert "\n" not in str(caught.value)


def sample(doc, filter_name="none", **metrics):
    return {
        "doc_id": doc,
        "filter": filter_name,
        "metrics": list(metrics),
        "arguments": [("a prompt", {})],
        "filtered_resps": ["an answer"],
        **metrics,
    }


def test_the_first_filter_and_metric_are_the_score():
    samples = [
        sample(1, "strict", exact_match=True, f1=0.5),
        sample(0, "strict", exact_match=False, f1=0.25),
        sample(0, "loose", exact_match=True, f1=0.25),
        sample(1, "loose", exact_match=True, f1=0.5),
    ]
    found = rows("task", samples)
    assert [(row["index"], row["score"], row["metric"]) for row in found] == [
        (0, 0.0, "exact_match"),
        (1, 1.0, "exact_match"),
    ]
    assert found[1]["metrics"] == {"exact_match": 1.0, "f1": 0.5}


def test_lengths_that_were_not_asked_for_are_no_score():
    assert rows("niah", [sample(0, **{"4096": -1.0, "8192": 0.5})])[0]["score"] == 0.5


def test_a_task_without_scores_of_each_problem_is_refused():
    with pytest.raises(UserError, match="no score"):
        rows("perplexity", [sample(0, word_perplexity=(1.0, 2))])
