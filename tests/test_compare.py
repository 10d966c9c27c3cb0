"""`mlx_loop compare` and `mlx_loop trace` as they are used: in one shot, in a pipe, on a screen."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pexpect
import pytest
from rich.console import Console

from mlx_loop import Guard
from mlx_loop.checkpoints.loading import load
from mlx_loop.measure.comparison import Answer, Measures
from mlx_loop.screens.board import MARK, Board, marked
from mlx_loop.screens.cli import main
from mlx_loop.screens.compare_session import read_prompts

PROGRAM = [sys.executable, "-m", "mlx_loop.screens.cli"]
QUESTION = ["--prompt", "What is 12 + 30?", "--max-tokens", "6"]


# --- compare ---


def test_one_shot_json_has_every_setting_with_its_cost(capsys):
    assert (
        main(["compare", *QUESTION, "--loops", "1,2", "--integrator", "naive,euler", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    plain, naive, euler = report["answers"]
    assert plain["loop"] is None
    assert (naive["loop"]["integrator"], euler["loop"]["integrator"]) == ("naive", "euler")
    assert plain["text"] == "42"
    assert plain["mean_kl"] == 0
    for answer in (naive, euler):
        assert answer["layer_passes"] == answer["layers"] + 4
        assert answer["mean_kl"] > 0
        assert 0 <= answer["agreement"] <= 1


def test_a_setting_may_be_given_whole(capsys):
    settings = ["--setting", "loops=2 cache=own", "--setting", "loops=2 integrator=rk4 guard=on"]
    assert main(["compare", *QUESTION, *settings, "--json"]) == 0
    loops = [answer["loop"] for answer in json.loads(capsys.readouterr().out)["answers"]]
    assert [loop and loop["cache"] for loop in loops] == [None, "own", "first"]
    assert loops[2]["guard"] == Guard().__dict__ | {"band": list(Guard().band)}


def test_drafts_are_counted_and_can_be_switched(capsys, monkeypatch):
    assert main(["compare", *QUESTION, "--loops", "6", "--draft", "self", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["draft"] == "self"
    assert [bool(answer["draft_tokens"]) for answer in report["answers"]] == [False, True]
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("hello\n/draft self\n/again\n/draft off\n/again\n")
    )
    assert main(["compare", "--loops", "6", "--max-tokens", "6", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert [line["draft"] for line in lines] == [None, "self", None]
    assert len({line["answers"][1]["text"] for line in lines}) == 1


def test_a_pipe_gets_plain_text_and_commands_work_there(tmp_path):
    file, notes, page = (tmp_path / f"s.{end}" for end in ("json", "md", "html"))
    lines = ["/max-tokens 4", "What is 12 + 30?", "/loops 2", "/again", f"/save {file}"]
    done = subprocess.run(
        [*PROGRAM, "compare"],
        input="\n".join([*lines, f"/save {notes}", f"/save {page}"]),
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    out = done.stdout
    assert not [c for c in out if ord(c) < 32 and c != "\n"]
    assert "no loop" in out
    assert "+33% layer passes" in out
    first, second = json.loads(file.read_text())
    assert [len(first["answers"]), len(second["answers"])] == [4, 2]
    text = notes.read_text()
    assert "| answer | 42 | 42 | 42 | 42 |" in text
    assert "| 2 loops | [4,8) | 2 | anchored | 0.5 |" in text
    assert "mlx-lm" in text
    assert '<input type="search"' in page.read_text()


@pytest.mark.parametrize(
    "line",
    [
        "/nonsense",
        "/draft nonsense",
        "/loops 0",
        "/loops 2,x",
        "/loops 2,3,4,5,6,7,8,9,10,11,12,13,14",
        "/window 30:40",
        "/add beta",
        "/add beta=3",
        "/again",
        "/temp -1",
        "/save",
        "/prompts nowhere.txt",
    ],
)
def test_a_mistake_is_one_line(line, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(line + "\n"))
    assert main(["compare"]) == 2
    assert len(capsys.readouterr().err.splitlines()) <= 3


@pytest.mark.parametrize("options", [["--setting", "loops"], ["--loops", "1,0"], ["--prompt", " "]])
def test_bad_options_are_one_line(options, capsys):
    assert main(["compare", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_prompts_come_from_lines_or_questions(tmp_path):
    text, questions = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\ntwo\n")
    questions.write_text(json.dumps({"messages": [{"role": "user", "content": "three"}]}) + "\n")
    assert read_prompts(text) == ["one", "two"]
    assert read_prompts(questions) == ["three"]


@pytest.fixture(scope="module")
def answers():
    """Two answers that depart at the second token."""
    model = load("demo")[0]
    made = []
    for view, words in (
        (model.with_loop(None), ["Good", " night", " 👩‍🚀", " שלום"]),
        (model, ["Good", " day", " every one" * 30]),
    ):
        answer = Answer(view)
        for number, word in enumerate(words):
            answer.starts.append(len(answer.text))
            answer.tokens.append(hash(word) if number else 0)
            answer.text += word
        answer.measures = Measures(0.1, 0.2, 0.5)
        made.append(answer)
    made[1].compare_to(made[0])
    return made


def test_the_token_that_departs_is_marked(answers):
    assert marked(answers[0]).plain == answers[0].text
    assert marked(answers[1]).plain.startswith(f"Good{MARK} day every")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_columns_where_there_is_room_else_rows(answers, width):
    console = Console(width=width, height=24, record=True, file=io.StringIO())
    console.print(Board(answers))
    lines = console.export_text().splitlines()
    side_by_side = any("no loop" in line and "3 loops" in line for line in lines)
    assert side_by_side == (width >= 80)
    assert all(console.measure(line).maximum <= width for line in lines)
    words = " ".join(" ".join(lines).split())
    assert all(word in words for word in ("layer passes", "KL 0.1 first", "agreement 50%"))


def test_a_live_board_fits_the_screen_and_shows_the_ends(answers):
    for width, height in ((80, 24), (30, 24), (200, 12)):
        console = Console(width=width, height=height, force_terminal=True)
        options = console.options.update(height=height)
        lines = console.render_lines(Board(answers), options, pad=False)
        assert len(lines) <= height + 1
        assert "one" in "".join(segment.text for line in lines for segment in line)


def test_the_screen(tmp_path):
    child = pexpect.spawn(
        PROGRAM[0],
        [*PROGRAM[1:], "compare", "--loops", "2"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "TERM": "xterm"}
        | {"NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1"},
        dimensions=(30, 100),
        encoding="utf-8",
        timeout=60,
    )
    child.expect("Ctrl-D leaves")
    child.expect("> ")
    for line, *expected in (
        ("What is 12 + 30?", "42", "agreement", "100%"),
        ("/loops 3", "3 loops", "42", "agreement"),
        ("/window 30:40", "12 layers"),
        ("/settings", "3 loops"),
        ("/help", "/max-tokens", "/integrator"),
    ):
        child.send(line + "\r")
        for text in (*expected, "\n[^\n]*> "):
            child.expect(text)
    child.send("Tell me a story.\r")
    child.expect("Once")
    child.sendintr()
    child.expect("stopped|agreement")
    child.expect("\n[^\n]*> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


# --- trace ---


def test_trace_prints_a_table_draws_and_judges(tmp_path, capsys):
    plot = str(tmp_path / "t.png")
    assert main(["trace", *QUESTION[:2], "--tokens", "--plot", plot]) == 0
    out = capsys.readouterr().out
    for words in (
        "residual",
        "contraction",
        "lens KL",
        "result",
        "'assistant'",
        "drifting: residual",
    ):
        assert words in out
    assert (tmp_path / "t.png").exists()
    assert (tmp_path / "t-dark.png").exists()


def test_trace_json_has_numbers_for_each_token_and_no_nan(capsys):
    main(["trace", *QUESTION[:2], "--model", "demo-moe", "--loops", "2", "--json"])
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    count = len(report["tokens"])
    assert len(report["loops"]) == 4
    for loop in report["loops"]:
        assert len(loop["growth"]) == count
        first, second = loop["passes"]
        assert first["contraction"] == [None] * count
        assert len(second["residual"]) == len(second["before"]["cosine"]) == count
        assert 0 <= second["experts_changed"] <= 1


def test_trace_needs_a_loop(capsys):
    assert main(["trace", *QUESTION[:2], "--loops", "1"]) == 2
    assert "set loops to 2" in capsys.readouterr().err
