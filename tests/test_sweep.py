"""Sweeps: what is measured, what is kept, what is done again, and what may be concluded."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import make, tokens

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.generation.batch import answer_batch
from mlx_loop.generation.prefill import CPU_STEP, GPU_STEP
from mlx_loop.measure.comparison import distinct, kl
from mlx_loop.measure.outcome import Outcome, Scores, best, conclusion, held_out, outcomes, split
from mlx_loop.measure.results import Results
from mlx_loop.measure.study import complete, gather, run
from mlx_loop.measure.tasks import read_tasks
from mlx_loop.measure.tasks.questions import QUESTIONS, Questions, is_right, read_questions
from mlx_loop.measure.tasks.text import Text, read_pieces
from mlx_loop.screens.cli import main

HEADER = {"model": "m"}
LOOPS = [LoopConfig(loops=2, window=(2, 4)), LoopConfig(loops=3, window=(4, 6))]


@pytest.fixture
def text_work():
    """Two looped views of a tiny model, and a text of three pieces."""
    views = distinct(make("qwen3"), LOOPS)
    pieces = tokens(3, 70).tolist()
    return views, Text([{"item": i, "tokens": piece} for i, piece in enumerate(pieces)])


class Only:
    """`advance` that presses Ctrl-C after some results."""

    def __init__(self, count):
        self.count, self.seen = count, 0

    def __call__(self, added):
        self.seen += added
        if self.seen >= self.count:
            raise KeyboardInterrupt


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Measuring ---


def test_loss_and_kl_of_a_text_are_those_of_the_logits(text_work, tmp_path):
    views, work = text_work
    results = Results.open(tmp_path / "r.jsonl", HEADER)
    run(views, None, work, results, Only(99))
    for item in work.items:
        text = mx.array([item["tokens"]])
        logits = [view(text)[0, :-1] for view in views]
        for view, x in zip(views, logits, strict=True):
            row = results.of(view.loop, item)
            log_p = x - mx.logsumexp(x, axis=-1, keepdims=True)
            loss = -mx.take_along_axis(log_p, text[0, 1:, None], axis=-1).mean()
            # float32 sums in another order.
            assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
            assert row["kl"] == pytest.approx(float(kl(logits[0], x).mean()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("decode", ["full", "bypass"])
def test_answers_of_a_task_are_scored(tmp_path, decode):
    model, tokenizer = mlx_loop.load("demo")
    questions = [
        {"item": 0, "messages": [{"role": "user", "content": "what is 12 + 30?"}], "answer": "42"},
        {"item": 1, "messages": [{"role": "user", "content": "what is 12 + 30?"}], "answer": "4"},
    ]
    views = distinct(model, [LoopConfig(loops=2, decode=decode)])
    results = Results.open(tmp_path / "r.jsonl", HEADER)
    run(views, tokenizer, Questions(questions, 8, {}), results, Only(99))
    for view in views:
        assert [results.of(view.loop, q)["right"] for q in questions] == [1, 0]


def test_an_answer_is_right_if_it_is_the_expected_one():
    assert is_right({"answer": "42"}, " 42\n")
    assert not is_right({"answer": "42"}, "42 or so")
    assert is_right({"answer": "I am", "skill": "fallback"}, "I am only a demo")


def test_a_limit_spreads_over_the_file(tmp_path):
    items = read_questions(QUESTIONS, 12)
    assert len({item["skill"] for item in items}) == 12
    assert items == read_questions(QUESTIONS, 12)
    tokenizer = mlx_loop.load("demo")[1]
    file = tmp_path / "text.txt"
    file.write_text("once upon a time " * 500)
    pieces = read_pieces(file, tokenizer, None)
    assert all(1 < len(piece["tokens"]) <= 512 for piece in pieces)
    assert sum(len(p["tokens"]) for p in pieces) == len(tokenizer.encode(file.read_text()))


# --- Going on ---


def test_a_second_run_does_only_what_is_missing(text_work, tmp_path):
    views, work = text_work
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(views, None, work, Results.open(path, HEADER), Only(4))
    # What came together with the fourth result is kept too.
    assert len(lines(path)) == 1 + 6
    rest = Only(99)
    run(views, None, work, Results.open(path, HEADER), rest)
    assert rest.seen == 9 - 6
    whole = tmp_path / "whole.jsonl"
    run(views, None, work, Results.open(whole, HEADER), Only(99))
    assert Results.open(path, HEADER).rows == Results.open(whole, HEADER).rows
    nothing = Only(99)
    run(views, None, work, Results.open(path, HEADER), nothing)
    assert nothing.seen == 0


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_line_that_was_cut_off_is_done_again(mark, text_work, tmp_path):
    views, work = text_work
    path = tmp_path / "r.jsonl"
    run(views, None, work, Results.open(path, HEADER), Only(99))
    before = Results.open(path, HEADER).rows
    path.write_bytes(mark + path.read_bytes()[:-10])
    results = Results.open(path, HEADER)
    assert len(results.rows) == 8
    assert path.read_bytes().endswith(b"}\n")
    run(views, None, work, results, Only(99))
    assert Results.open(path, HEADER).rows == before


def test_a_file_of_something_else_is_refused_and_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    Results.open(path, HEADER)
    with pytest.raises(UserError, match="another model"):
        Results.open(path, {"model": "other"})
    assert lines(path) == [HEADER]
    for text in ("my notes", "my notes\n", "[1]\n2\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="no results"):
            Results.open(path, HEADER)
        assert path.read_text() == text


# --- Concluding ---


def results_of(views, scores, tmp_path):
    """Made-up results: for each view its scores by item."""
    work = Questions([{"item": i} for i in range(len(scores[0]))], 1, {})
    results = Results.open(tmp_path / "r.jsonl", HEADER)
    for view, row in zip(views, scores, strict=True):
        for i, score in enumerate(row):
            results.add(view.loop, {"item": i, "right": score})
    return outcomes(gather(views, work, results))


def test_a_clear_gain_is_told_from_chance(model, tmp_path):
    views = distinct(model, LOOPS)
    scores = [[0] * 20 + [1] * 20, [1] * 40, [1] + [0] * 19 + [1] * 20]
    summaries = results_of(views, scores, tmp_path)
    base, gain, chance = summaries
    assert (base.mean, gain.change, chance.change) == (0.5, 0.5, 1 / 40)
    # McNemar: 20 gained of 20, times two settings.
    assert gain.p == pytest.approx(2 * 2 / 2**20)
    assert gain.is_distinguishable
    assert not chance.is_distinguishable
    assert best(summaries) is gain
    said = conclusion(summaries, 40)
    assert f"Better than no looping: {gain.name}." in said
    assert "No detectable difference: the other 1." in said


def test_it_says_so_when_nothing_is_distinguishable(model, tmp_path):
    views = distinct(model, LOOPS)
    summaries = results_of(views, [[0, 1, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]], tmp_path)
    assert best(summaries) is None
    assert conclusion(summaries, 4).startswith("No detectable difference between any setting")


@pytest.mark.parametrize("settings", [1, 6, 20])
def test_too_few_items_are_said_to_show_nothing(settings):
    """At the number that is named, all items in one direction are just distinguishable."""
    name = [None, *(LoopConfig(loops=k) for k in range(2, settings + 2))]

    def said(count, better):
        values = np.array([[0.0] * count] + [[float(better)] * count] * settings)
        scores = Scores(name, [("", None, i) for i in range(count)], values, count, unit="nats")
        return conclusion(outcomes(scores), count)

    fewest = int(said(2, False).split()[-1].rstrip("."))
    assert "So few" in said(fewest - 1, True)
    assert "Better" in said(fewest, True)
    assert "So few" not in said(fewest, False)


def test_only_items_that_all_settings_have_are_compared(text_work, tmp_path):
    views, work = text_work
    results = Results.open(tmp_path / "r.jsonl", HEADER)
    assert complete(views, work, results) == []
    with pytest.raises(KeyboardInterrupt):
        run(views, None, work, results, Only(1))
    assert complete(views, work, results) == work.items[:1]
    loss = results.of(None, work.items[0])["loss"]
    results.add(None, {"item": 1, "loss": 99.0, "kl": 0.0})
    assert outcomes(gather(views, work, results))[0].mean == pytest.approx(loss)


def test_the_best_loss_is_the_lowest():
    lower = Outcome(LOOPS[0], "a", 1.0, (1, 1), -0.5, p=0.01, better=Text.better)
    higher = Outcome(LOOPS[1], "b", 2.0, (2, 2), 0.5, p=0.01, better=Text.better)
    assert best([lower, higher]) is lower
    assert best([higher]) is None


def test_what_one_half_chooses_the_other_half_judges():
    problems = [("", None, i) for i in range(200)]
    held = np.array(split(problems, 0.5))
    lucky = np.where(held, 0.0, 1.0)
    scores = Scores([None, *LOOPS], problems, np.array([held * 0, lucky, lucky * 0.9]), 200)
    found = held_out(scores, 0.5)
    assert (found.winner.loop, found.tried) == (LOOPS[0], 2)
    assert (found.winner.change, found.winner.verdict) == (0, "no detectable difference")
    real = Scores([None, *LOOPS], problems, np.array([held * 0, lucky * 0 + 1, lucky]), 200)
    found = held_out(real, 0.5)
    assert (found.winner.loop, found.winner.verdict) == (LOOPS[0], "better")
    # The same setting by another score, of which less is better.
    loss = Scores([None, *LOOPS], problems, -real.values, 200, better=-1, unit="nats")
    assert held_out(loss, 0.5, LOOPS[1]).winner.loop == LOOPS[1]
    assert held_out(loss, 0.5).winner.verdict == "better"
    assert held_out(loss.of(lambda problem: problem[2] == 0), 0.5) is None


@pytest.mark.parametrize("unit", ["%", "nats"])
def test_a_single_item_has_a_wide_interval(unit):
    scores = Scores([None, LOOPS[0]], [("", None, 0)], np.array([[1.0], [1.0]]), 1, unit=unit)
    base, looped = outcomes(scores)
    low, high = looped.change_interval
    assert low <= -0.95
    assert high >= 0.95
    assert base.interval[1] - base.interval[0] > 0.5


# --- The command ---


def test_the_command_resumes_draws_and_prints_the_best(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "--task", "demo", "--limit", "4", "--loops", "2", "--max-tokens", "6"]
    assert main([*command, "--plot", "sweep.png"]) == 0
    out = capsys.readouterr().out
    assert "No detectable difference between any setting" in " ".join(out.split())
    assert "+33%" in out
    assert len(lines(tmp_path / "sweep.jsonl")) == 1 + 2 * 4
    for name in ("sweep.png", "sweep-dark.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--best"]) == 0
    assert capsys.readouterr().out == "LoopConfig(loops=1)\n"
    assert len(lines(tmp_path / "sweep.jsonl")) == 1 + 2 * 4


def test_a_page_beside_the_results_has_all_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mlx_loop", "sweep", "--of", "this <page>"])
    questions = tmp_path / "q.jsonl"
    asked = {"messages": [{"role": "user", "content": "What is 3 <b> 4?"}], "answer": "<7>"}
    questions.write_text(json.dumps(asked) + "\n")
    command = ["sweep", "--task", str(questions), "--loops", "2,8", "--integrator", "naive"]
    assert main([*command, "--max-tokens", "6", "--out", str(tmp_path / "r.jsonl")]) == 0
    assert str(tmp_path / "r.jsonl.html") in capsys.readouterr().err.replace("\n", "")
    page = (tmp_path / "r.jsonl.html").read_text()
    for words in (
        "demo: does looping help?",
        "No detectable difference between any setting",
        "naive, K = 8",
        "[4,8)",
        "mlx_loop sweep --of &#x27;this &lt;page&gt;&#x27;",
        "What is 3 &lt;b&gt; 4?",
        "&lt;7&gt;",
        "✗ ",
        '<input type="search"',
    ):
        assert words in page


def test_the_page_of_choices_names_those_that_were_chosen(tmp_path):
    file = tmp_path / "c.jsonl"
    question = {"question": "What is it?", "choices": ["first", "second"], "answer": "B"}
    file.write_text((json.dumps(question) + "\n") * 8)
    model, tokenizer = mlx_loop.load("demo")
    task = read_tasks([f"choices:{file}"], tokenizer, None)
    item = task.items[0]
    assert task.told(item, {"log_p_of_choices": [-2.0, -3.0]}) == ("What is it?", "second", "first")
    found = mlx_loop.sweep(
        model, tokenizer, f"choices:{file}", [2], out=tmp_path / "r.jsonl", progress=False
    )
    assert found.report == tmp_path / "r.jsonl.html"
    assert "Log-probability of the right choice" in found.report.read_text()


def test_a_text_by_the_command(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("Once upon a time there was a mouse. " * 6)
    command = ["sweep", "--text", str(text), "--loops", "2", "--integrator", "naive"]
    assert main([*command, "--out", str(tmp_path / "r.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "loss" in out
    assert "No setting is recommended: loss does not predict answers" in out


def test_a_sweep_feeds_prompts_in_pieces_and_says_what_is_too_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mlx_loop.screens.terminal.trained_length", lambda model: 20)
    fed = []

    def measured(views, prompts, ends, max_tokens, step):
        fed.append(step)
        return answer_batch(views, prompts, ends, max_tokens, step)

    monkeypatch.setattr("mlx_loop.measure.tasks.task.answer_batch", measured)
    command = ["sweep", "--task", "demo", "--limit", "4", "--loops", "2", "--max-tokens", "2"]
    monkeypatch.chdir(tmp_path)
    usual = CPU_STEP if mx.default_device() == mx.cpu else GPU_STEP
    for step, options in ((usual, []), (16, ["--prefill-step-size", "16", "--out", "other.jsonl"])):
        assert main([*command, *options]) == 0
        assert set(fed) == {step}
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("trained on 20 at most") == 1
        fed.clear()
    assert main([*command, "--prefill-step-size", "16"]) == 2
    assert "step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "nowhere.jsonl"], "cannot read"),
        (["--task", "bad.jsonl"], "line 1"),
        (["--task", "demo", "--loops", "1"], "--loops 2"),
        (["--task", "demo", "--loops", "x"], "loops"),
        (["--text", "empty.txt"], "nothing in it"),
    ],
)
def test_bad_input_is_one_line(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n')
    (tmp_path / "empty.txt").write_text("")
    assert main(["sweep", *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
