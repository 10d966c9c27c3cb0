"""Questions with choices: how files are read, what is asked, what counts as right."""

from __future__ import annotations

import json
import math

import pytest
from test_harness import TASK
from test_likelihood import alone

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.measure.comparison import distinct
from mlx_loop.measure.results import Results
from mlx_loop.measure.study import RESULTS, gather, run
from mlx_loop.measure.tasks.choices import ChatChoices, Choices, judge, read_choices
from mlx_loop.measure.tasks.harness import Harness
from mlx_loop.screens.cli import main

LINES = [
    {
        "question": "Where does Mia live?",
        "choices": ["Norwick", "Larkton, by the sea"],
        "answer": 1,
    },
    {"question": "What is 12 + 30?", "choices": ["42", "43", "no number"], "answer": 0},
    {"question": "Tom is a", "choices": ["baker", "teacher"], "answer": 0},
]
SETTINGS = [LoopConfig(loops=3, cache=cache) for cache in ("first", "own")]


def write(path, lines=LINES):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def demo():
    return mlx_loop.load("demo", dtype="float32")


def measured(task, views, tokenizer, folder):
    results = Results.open(folder / RESULTS, {"model": "demo"})
    run(views, tokenizer, task, results, lambda count: None)
    return results


# --- What is read and asked ---


def test_the_right_choice_is_a_number_or_a_letter(tmp_path):
    path = write(tmp_path / "c.jsonl", [LINES[0], LINES[1] | {"answer": "C"}])
    assert [item["answer"] for item in read_choices(path, None)] == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        *({"answer": answer} for answer in (3, -1, "D", "AB", 1.0, True)),
        *({"choices": choices} for choices in (["42"], ["42", ""], "42")),
        {"question": ""},
    ],
)
def test_a_line_of_another_form_is_refused(tmp_path, changes):
    path = write(tmp_path / "c.jsonl", [LINES[0], LINES[1] | changes])
    with pytest.raises(UserError, match=r"line 2 of .* is not a question with choices"):
        read_choices(path, None)


def test_plain_text_is_asked_as_the_harness_asks_arc(demo, tmp_path):
    _, tokenizer = demo
    (item, *_) = Choices.read(write(tmp_path / "c.jsonl"), tokenizer, None).items
    assert tokenizer.decode(item["prompt"]).endswith("Question: Where does Mia live?\nAnswer:")
    assert list(map(tokenizer.decode, item["endings"])) == [" Norwick", " Larkton, by the sea"]


def test_a_chat_has_the_choice_as_its_answer(demo, tmp_path):
    _, tokenizer = demo
    path = write(tmp_path / "c.jsonl")
    (item, *_) = ChatChoices.read(path, tokenizer, None, system="Be brief.").items
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where does Mia live?"},
    ]
    assert item["prompt"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert list(map(tokenizer.decode, item["endings"])) == ["Norwick", "Larkton, by the sea"]


def test_batches_are_of_one_length_and_in_no_order(demo, tmp_path):
    questions = [LINES[2] | {"question": "Tom is " + "very " * n + "a"} for n in range(40)]
    path = write(tmp_path / "c.jsonl", questions)
    task = Choices.read(path, demo[1], None, batch=4)
    batches = list(task.batches())
    lengths = [[len(item["prompt"]) for item in batch] for batch in batches]
    assert sorted(item["item"] for batch in batches for item in batch) == list(range(40))
    assert max(max(of) - min(of) for of in lengths) <= 4
    first = [length for of in lengths[:5] for length in of]
    assert min(first) < 20 < max(first)


# --- What counts ---


def test_the_likeliest_choice_by_itself_and_per_character():
    item = {"item": 0, "choices": ["no", "certainly"], "answer": 1}
    row = judge(item, [-4.0, -6.0])
    assert (row["right"], row["right_per_character"]) == (0, 1)
    assert row["log_p"] == -6.0
    assert row["log_p_among"] == pytest.approx(-6 - math.log(math.exp(-4) + math.exp(-6)))


@pytest.mark.parametrize("kind", [Choices, ChatChoices])
def test_likelihoods_are_those_of_one_choice_alone(demo, tmp_path, kind):
    model, tokenizer = demo
    views = distinct(model, SETTINGS)
    task = kind.read(write(tmp_path / "c.jsonl"), tokenizer, None)
    results = measured(task, views, tokenizer, tmp_path)
    for view in views:
        for item in task.items:
            expected = [alone(view, item["prompt"], ending) for ending in item["endings"]]
            row = results.of(view.loop, item)
            assert row["log_p_of_choices"] == pytest.approx(expected, abs=1e-4), view.loop
    better = gather(views, task, results, task.beside[1])
    assert better.unit == "nats"
    assert better.values[0].tolist() == [results.of(None, item)["log_p"] for item in task.items]


@pytest.mark.parametrize("kind", [Choices, ChatChoices])
def test_the_harness_finds_the_same(demo, tmp_path, monkeypatch, kind):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = mlx_loop.load("demo", dtype="float32")
    path = write(tmp_path / "c.jsonl")
    text = TASK.format(name="mine", data=path)
    if kind is Choices:
        text = text.replace("{{question}}", r"Question: {{question}}\nAnswer:")
        tokenizer.has_chat_template = False
    (tmp_path / "mine.yaml").write_text(text)
    views = distinct(model, SETTINGS)
    task = kind.read(path, tokenizer, None)
    ours = measured(task, views, tokenizer, tmp_path / "ours")
    theirs = measured(Harness(["mine"], tmp_path), views, tokenizer, tmp_path / "theirs")
    for view in views:
        for item in task.items:
            mine = ours.of(view.loop, item)
            other = theirs.of(view.loop, {"item": f"mine/{item['item']}"})
            likelihoods = [float(of[0]) for of in other["answer"]]
            assert mine["log_p_of_choices"] == pytest.approx(likelihoods, abs=1e-4)
            assert mine["right"] == other["metrics"]["acc"]
            assert mine["right_per_character"] == other["metrics"]["acc_norm"]


# --- The commands ---


def test_sweep_chooses_on_one_half_and_reports_on_the_other(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", LINES * 2)
    command = "sweep --task choices:a.jsonl,choices:b.jsonl --loops 2,3 --integrator euler".split()
    assert main([*command, "--best"]) == 0
    out, err = capsys.readouterr()
    assert out == "LoopConfig(loops=1)\n"
    said = " ".join(err.split())
    assert "Best of 2 settings on" in said
    assert "By log-probability of the right choice:" in said
    assert "right, %, by file" in said
    assert "choices:b.jsonl (n = 6)" in said
    assert main(command) == 0
    assert "log-probability of the right choice, nats" in capsys.readouterr().out


def test_evaluate_reports_all_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", LINES * 2)
    command = "evaluate --tasks choices:a.jsonl,chat_choices:a.jsonl --loops 2 --holdout 0.5"
    assert main(command.split()) == 0
    assert "log-probability of the right choice, nats" in capsys.readouterr().out
    report = (tmp_path / "evaluation" / "report.md").read_text()
    assert "## Log-probability of the right choice among the choices" in report
    assert "By right, log-likelihood per character:" in report


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("sweep --task choices:nowhere.jsonl", "cannot read"),
        ("sweep --task choices:a.jsonl,questions:a.jsonl", "one kind"),
        ("sweep --task choices:a.jsonl --system-prompt x", "does nothing"),
        ("sweep --task choices:a.jsonl --max-tokens 3", "does nothing"),
        ("evaluate --tasks choices:a.jsonl --system-prompt x", "does nothing"),
        ("sweep --text a.jsonl --best", "does not predict"),
        ("sweep --task text:a.jsonl --best", "does not predict"),
    ],
)
def test_what_makes_no_sense_is_one_line(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl")
    assert main(options.split()) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
