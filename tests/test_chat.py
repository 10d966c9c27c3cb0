"""The chat on a screen (a pseudo-terminal) and in a pipe."""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress

import pexpect
import pytest

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.errors import UserError
from mlx_loop.generation.conversation import Conversation
from mlx_loop.integrators import INTEGRATORS
from mlx_loop.screens.chat_session import Chat
from mlx_loop.screens.cli import main
from mlx_loop.screens.terminal import Streamed, extra_cost

CHAT = [sys.executable, "-m", "mlx_loop.screens.cli", "chat"]


def piped(text, *options, status=0):
    """What a chat says, or of a mistake the error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.stdin", io.StringIO(text))
        found = main(["chat", *options])
    assert found == status, err.getvalue()
    return err.getvalue() if status else out.getvalue()


@pytest.fixture
def screen(tmp_path):
    """A chat in a pseudo-terminal of 30 x 100, with a home folder of its own."""
    child = pexpect.spawn(
        CHAT[0],
        CHAT[1:],
        env={
            "HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
            "TERM": "xterm",
            "NO_COLOR": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",
        },
        dimensions=(30, 100),
        encoding="utf-8",
        timeout=60,
    )
    child.ptyproc.delayafterterminate = 5  # A busy machine takes a while to end it.
    child.expect("Ctrl-D leaves")
    child.expect("> ")
    yield child
    child.close(force=True)


def send(screen, line, *expected):
    """Types a line, waits for what must appear, then for the next prompt."""
    screen.send(line + "\r")
    for text in (*expected, "\n[^\n]*> "):
        screen.expect(text)


def test_a_piped_conversation_remembers():
    out = piped("My name is Anna.\nWhat is my name?\n")
    assert "Anna" in out.splitlines()[-2]
    assert out.count("tokens/s") == 2


def test_numbers_under_each_answer():
    out = piped("hello\n", "--loops", "6")
    for words in ("tokens/s", "anchored, 6 loops", "layer passes", "peak"):
        assert words in " ".join(out.split())


def test_drafting_gives_the_same_answer():
    lines = piped("hello\n/reset\n/draft self\nhello\n").splitlines()
    assert lines[0] == lines[-2]
    assert "drafted" in lines[-1]
    assert "drafted" not in lines[1]


def test_commands_work_in_a_pipe_too(tmp_path):
    file = tmp_path / "talk.json"
    piped(f"hello\n/loop 6\n/set beta 0.25\n/save {file}\n")
    saved = json.loads(file.read_text())
    assert saved["loop"]["loops"] == 6
    assert saved["loop"]["beta"] == 0.25
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    out = piped(f"/load {file}\n/info\n")
    assert "2 messages" in out
    assert "6 loops" in out


def test_on_brings_back_what_off_took_however_often_it_was_said():
    out = piped("/set beta 0.2\n/loop 6\n/loop off\n/loop off\n/loop on\n")
    assert "6 loops of [4,8), beta 0.2" in out.splitlines()[-1]


def test_another_number_of_loops_brings_its_own_weights():
    out = piped("/set integrator poly_blend\n/loop 6\n")
    assert "poly_blend, 6 loops" in out


def test_a_question_is_asked_again_or_taken_back(tmp_path):
    file = tmp_path / "talk.json"
    lines = piped(f"what is 7 + 8?\n/retry\nhello\n/undo\n/save {file}\n").splitlines()
    assert lines[0] == lines[2] == "15"
    assert lines[-2] == "forgotten: hello"
    said = [m["content"] for m in json.loads(file.read_text())["messages"]]
    assert said == ["what is 7 + 8?", "15"]


def test_save_without_a_name_goes_to_its_own_file_again(tmp_path):
    file = tmp_path / "talk.json"
    piped(f"hello\n/save {file}\nhow are you?\n/save\n")
    assert len(json.loads(file.read_text())["messages"]) == 4
    piped(f"/load {file}\nthanks\n/save\n")
    assert len(json.loads(file.read_text())["messages"]) == 6
    piped("hello\n/save\n", status=2)


def test_a_file_goes_before_the_next_message_only(tmp_path):
    notes, file = tmp_path / "my notes.txt", tmp_path / "talk.json"
    notes.write_text("The code for amber is 4821.")
    out = piped(f"/file {notes}\nwhat is the code for amber?\nhello\n/save {file}\n")
    assert "\n4821\n" in out
    asked = [m["content"] for m in json.loads(file.read_text())["messages"][::2]]
    assert asked == ["The code for amber is 4821.\n\nwhat is the code for amber?", "hello"]


def test_a_question_that_is_stopped_before_its_answer_keeps_its_file(monkeypatch, capsys):
    stopped = Streamed(stopped=True)
    monkeypatch.setattr("mlx_loop.screens.chat_session.stream", lambda *_: stopped)
    talk = Conversation(*mlx_loop.load("demo"))
    chat = Chat(talk, "demo", {"prefill_step_size": 64})
    chat._texts = ["a file"]
    assert not chat.answer("what is in it?")
    assert chat._texts == ["a file"]
    assert "the conversation is as it was" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [None, UserError("too long"), KeyboardInterrupt()])
def test_a_retry_without_an_answer_leaves_the_old_one(monkeypatch, broken):
    talk = Conversation(*mlx_loop.load("demo"))
    talk.messages = said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]

    def stop(*_):
        if broken:
            raise broken
        return Streamed(stopped=True)

    monkeypatch.setattr("mlx_loop.screens.chat_session.stream", stop)
    with suppress(UserError, KeyboardInterrupt):
        Chat(talk, "demo", {"prefill_step_size": 64}).carry_out("/retry")
    assert talk.messages == said


def test_a_retry_leaves_the_file_to_the_next_message(tmp_path):
    notes, file = tmp_path / "notes.txt", tmp_path / "talk.json"
    notes.write_text("The code for amber is 4821.")
    piped(f"hello\n/file {notes}\n/retry\nwhat is the code for amber?\n/save {file}\n")
    asked = [m["content"] for m in json.loads(file.read_text())["messages"][::2]]
    assert asked == ["hello", "The code for amber is 4821.\n\nwhat is the code for amber?"]


def test_every_setting_is_a_command_and_answers_change_while_it_runs():
    out = piped("/beta 0.3\n/loops 2\n/max-tokens 3\ntell me a story\n/info\n")
    assert "2 loops of [4,8), beta 0.3" in out.splitlines()[1]
    assert "\n3 tokens" in out
    hot = "/temp 5\n/top-p 1\n/seed {}\ntell me a story\n"
    first, again, other = (piped(hot.format(seed)).splitlines()[3] for seed in (1, 1, 2))
    assert first == again != other
    assert "temp 0.7, top_p 0.9, at most 9 tokens" in piped(
        "/temp 0.7\n/top-p 0.9\n/max-tokens 9\n"
    )


def test_sampling_is_as_the_checkpoint_says_unless_asked(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(DEMOS["demo"], folder)
    config = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 7}
    (folder / "generation_config.json").write_text(json.dumps(config))
    for options, said in (([], True), (["--temp", "0"], False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO("hello\n"))
            assert main(["chat", "--model", str(folder), *options]) == 0
        assert ("temp 0.5, top_p 0.9, top_k 7" in capsys.readouterr().err) is said


def test_help_explains_a_setting_and_a_misspelt_word_is_told_with_what_was_meant():
    out = piped("/help integrator\n/help beta\n")
    for name, integrator in INTEGRATORS.items():
        assert f"{name} {integrator.words}" in " ".join(out.split())
    assert "a number from -1 to 2" in out
    assert "answer the last question again" in piped("/help retry\n")
    assert "sampling temperature" in piped("/help /temp\n")
    for line, meant in (
        ("/set temp 0.5", "temp is no loop setting: write /temp 0.5"),
        ("/hlp", "/hlp, did you mean help?"),
        ("/help bet", "did you mean beta?"),
        ("/set integratr rk4", "did you mean integrator?"),
        ("/integrator rk5", "did you mean rk4?"),
    ):
        assert meant in piped(line, status=2)


def test_an_error_in_a_pipe_stops_with_status_2(tmp_path):
    for line in (
        "/nonsense",
        "/loop 0",
        "/window 30:40",
        "/set beta 3",
        "/draft nonsense",
        "/set",
        "/set routing frozen",
        "/retry",
        "/temp -1",
        "/top-p 0.9",
        "/max-tokens 0",
        f"/file {tmp_path}/no",
        f"/load {tmp_path}/no",
    ):
        piped(line + "\n", status=2)


def test_the_screen(screen, tmp_path):
    send(screen, "What is 12 + 30?", "42", "tokens/s", "layer passes")
    send(screen, "/loop 6", "6 loops", "layer passes")
    send(screen, "/window 3:7", r"\[3,7\)")
    send(screen, "/window 30:40", "12 layers")
    send(screen, "/loop off", "loop off")
    send(screen, "What is 12 + 30?", "tokens/s", "no loop")
    send(screen, "/loop on", "6 loops")
    send(screen, "/nonsense", "/help lists")
    send(screen, "/info", "layers", "messages", "cache")
    send(screen, "/help", "/window", "/save", "Alt-Enter")
    send(screen, f"/save {tmp_path}/talk.json", "4 messages saved")
    send(screen, f"/save {tmp_path}/talk.json", "exists already")
    send(screen, "/clear", "new conversation")
    screen.sendeof()
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 0
    assert "What is 12" in (tmp_path / ".cache" / "mlx_loop" / "chat_history").read_text()


def test_ctrl_c_stops_an_answer_and_keeps_the_session(screen):
    screen.send("Tell me a story.\r")
    screen.expect("Once upon")
    screen.sendintr()
    screen.expect("stopped|tokens/s")
    send(screen, "What is 12 + 30?", "tokens/s")


def test_what_is_typed_during_an_answer_waits_unseen_for_the_next_line(screen):
    screen.send("Tell me a story.\r")
    screen.expect("Once upon")
    screen.send("what is 7 + 8?\r")
    screen.expect("tokens/s")
    assert "7 + 8" not in screen.before
    screen.expect("> [^\n]*7 \\+ 8")
    screen.expect("15")
    screen.expect("\n[^\n]*> ")
    send(screen, "/info", "greedy")


def test_edit_puts_the_last_question_at_the_prompt(screen):
    send(screen, "What is 12 + 30?", "42", "tokens/s")
    screen.send("/edit\r")
    screen.expect("> [^\n]*What is 12 \\+ 30\\?")
    screen.send("\x7f" * 3 + "11?\r")
    screen.expect("23")
    screen.expect("\n[^\n]*> ")
    screen.send("exit\r")
    screen.expect(pexpect.EOF)


def test_ctrl_c_at_the_prompt_keeps_the_session(screen):
    screen.send("half a line")
    screen.sendintr()
    send(screen, "What is 12 + 30?", "42", "tokens/s")


def test_a_message_of_several_lines(screen):
    screen.send("hello\\\r")
    send(screen, "What is 12 + 30?", "tokens/s")
    send(screen, "/info", "2 messages")


def test_what_a_loop_costs_says_which_tokens_it_is_of(model):
    plain = model.with_loop(LoopConfig(loops=3, prompt="plain", decode="bypass"))
    assert extra_cost(plain) == "+100% layer passes, the prompt's last token only"
    gated = model.with_loop(LoopConfig(loops=3, prompt="plain", gate="entropy:1"))
    assert extra_cost(gated) == "at most +200% layer passes, not the prompt, where unsure"
