"""Studies: resumed ones are the same as those that ran through, every setting sees the same."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
from conftest import make

from mlx_loop import LoopConfig, UserError
from mlx_loop.measure.comparison import distinct
from mlx_loop.measure.results import Results
from mlx_loop.measure.study import EXAMPLES, RESULTS, Study, examples, run
from mlx_loop.measure.tasks import ruler
from mlx_loop.screens.cli import main

STUDY = Study("tiny", ["qa", "vt"], [64], limit=3, batch_size=2)


EXAMPLE = ruler.example


class Bytes:
    """As much of a tokenizer as a study asks for."""

    has_chat_template = False
    bos_token = None
    eos_token_ids = (7,)

    def encode(self, text, add_special_tokens=True, verbose=True):
        return list(text.encode())

    def decode(self, tokens):
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def views():
    settings = [LoopConfig(loops=2), LoopConfig(loops=2, decode="bypass")]
    return distinct(make("qwen3"), settings)


@pytest.fixture(autouse=True, scope="module")
def short_problems():
    """Problems of a few words: what they ask is a matter of test_ruler.py."""

    def example(task, length, index, size, sources, seed):
        prompt = f"{task} {index} " * (index + 1)
        answers = [str(token) for token in range(index, 300, 2)]
        return ruler.Example(task, length, index, prompt, "so", answers, [], size(prompt, "so"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruler, "example", example)
        for name in STUDY.tasks:
            patch.setitem(ruler.TASKS, name, replace(ruler.TASKS[name], max_tokens=5))
        yield


def ran(folder, views, stops=(), study=STUDY):
    """Run the study, interrupted after so many answers each time."""
    for stop in (*stops, 10**9):
        seen = 0

        def advance(count):
            nonlocal seen
            seen += count
            if seen >= stop:  # noqa: B023
                raise KeyboardInterrupt

        problems = examples(study, Bytes(), folder)
        results = Results.open(folder / RESULTS, study.header())
        with suppress(KeyboardInterrupt) if stop < 10**9 else nullcontext():
            run(views, Bytes(), problems, results, advance)
    return {name: (folder / name).read_text() for name in (EXAMPLES, RESULTS)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, views, short_problems):
    return ran(tmp_path_factory.mktemp("whole"), views)


def test_resumed_is_the_same_to_the_byte(tmp_path, views, whole):
    assert ran(tmp_path, views, stops=(1, 3, 5)) == whole


def test_a_run_that_was_killed_in_the_middle_of_a_line_goes_on(tmp_path, views, whole):
    (tmp_path / EXAMPLES).write_text(whole[EXAMPLES])
    for lost in (1, 40, 700):
        (tmp_path / RESULTS).write_text(whole[RESULTS][:-lost])
        assert ran(tmp_path, views) == whole


def test_results_say_everything(whole, views):
    header, *rows = map(json.loads, whole[RESULTS].splitlines())
    problems = {
        (e["task"], e["length"], e["index"]): e
        for e in map(json.loads, whole[EXAMPLES].splitlines()[1:])
    }
    assert {"model", "tasks", "lengths", "limit", "seed", "batch_size"} <= header.keys()
    assert len(rows) == len(views) * len(problems) == 18
    for row in rows:
        problem = problems[row["task"], row["length"], row["index"]]
        assert row["score"] == ruler.score(row["task"], row["answer"], problem["answers"])
        assert row["loop"] is None or row["loop"]["loops"] == 2


def test_another_study_in_the_same_folder_is_refused(tmp_path, whole):
    (tmp_path / EXAMPLES).write_text(whole[EXAMPLES])
    other = Study(**{**vars(STUDY), "limit": 4})
    with pytest.raises(UserError, match="another limit"):
        examples(other, Bytes(), tmp_path)


def test_the_command_answers_resumes_and_reports(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = (
        "evaluate --tasks niah_single_1 --lengths 208 --limit 2 --loops 1,2 --dtype float32 "
        f"--no-answer-prefix --trace 1 --holdout 0.5 --reference --out {tmp_path}"
    ).split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruler, "example", EXAMPLE)
        assert main(command) == 0
    first = capsys.readouterr().out
    assert "no loop" in first
    assert "K = 2" in first
    # The demo model reads needles in a text of the length that it was trained on.
    rows = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()[1:]]
    assert [row["score"] for row in rows] == [1.0] * 4
    page = (tmp_path / "report.html").read_text()
    assert "Drift" in page
    files = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == files


def test_questions_of_a_file_stand_beside_other_tasks(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    question = {"messages": [{"role": "user", "content": "what is 12 + 30?"}], "answer": "42"}
    file.write_text(json.dumps(question) + "\n")
    command = f"evaluate --tasks questions:{file} --loops 2 --out {tmp_path / 'out'}"
    assert main(command.split()) == 0
    assert "100.0 [" in capsys.readouterr().out
    header, *rows = map(json.loads, (tmp_path / "out" / RESULTS).read_text().splitlines())
    assert list(header["files"]) == [f"questions:{file}"]
    assert [row["right"] for row in rows] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tasks nonsense", "unknown task 'nonsense': known are"),
        ("--tasks rulr", "did you mean ruler? known are"),
        ("--tasks niah_single2", "did you mean niah_single_2? known are"),
        ("--tasks qa", "--documents"),
        ("--lengths 0", "whole number"),
        ("--lengths 130", "greater lengths"),
        ("--loops 1", "--loops 2"),
        ("--tasks vt --documents nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_status_2_and_no_study(tmp_path, capsys, options, message):
    tasks = "" if "--tasks" in options else "--tasks vt"
    command = f"evaluate {tasks} --limit 1 --out {tmp_path / 'out'} {options}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruler, "example", EXAMPLE)
        try:
            status = main(command.split())
        except SystemExit as exit:
            status = exit.code
    assert status == 2
    assert not (tmp_path / "out" / RESULTS).exists()
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_ctrl_c_before_the_first_answer_is_no_error(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_loop.screens.measuring.run", interrupted)
    words = ["--tasks", "niah_single_1", "--lengths", "384", "--limit", "1", "--out", str(tmp_path)]
    assert main(["evaluate", *words]) == 130
    assert capsys.readouterr().err.strip().endswith("the same command goes on from here")


def test_a_study_that_is_stopped_is_reported_without_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")  # Pictures take seconds; Ctrl-C is answered within one.
    words = ["--tasks", "niah_single_1", "--lengths", "384", "--loops", "2", "--out", str(tmp_path)]
    assert main(["evaluate", *words, "--limit", "1", "--trace", "0"]) == 0
    assert "<picture>" in (tmp_path / "report.html").read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_loop.screens.measuring.run", interrupted)
    assert main(["evaluate", *words, "--limit", "1", "--trace", "0"]) == 130
    page = (tmp_path / "report.html").read_text()
    assert "does looping help?" in page
    assert "<picture>" not in page
