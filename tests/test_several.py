"""Models split over several processes, which a ring on this machine connects."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
from conftest import make

import mlx_loop
from mlx_loop import LoopConfig, UserError, several
from mlx_loop.checkpoints.loading import split
from mlx_loop.generation.prompt import render
from mlx_loop.screens.cli import main

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="Metal does not survive a fork")
# Run by each process: the largest difference to the whole model, by model.
LOGITS = """
import json, sys
import mlx.core as mx
from conftest import make, relative_error
from mlx_loop import LoopConfig
from mlx_loop.checkpoints.loading import split
from mlx_loop.models.pipeline import into_stages

group = mx.distributed.init()
found = {}
policies = ("first", "last", "own")[: 3 if group.size() == 2 else 1]
for asked in sys.argv[1:]:
    name, _, pipeline = asked.partition("/")
    mx.random.seed(0)  # Biases are drawn before `make` seeds.
    model = make(name, num_key_value_heads=4)
    more = {"window": (4, 6), "scope": "block"} if pipeline else {}
    settings = [None] + [LoopConfig(loops=3, cache=c, **more) for c in policies]
    if pipeline:  # Layers that loop one by one are on several machines.
        settings += [LoopConfig(loops=3, cache=c, window=(1, 7), scope="layer") for c in policies]

    def logits(loop):
        view = model.with_loop(loop)
        cache, parts = view.new_cache(), []
        for text in ([5, 6, 7, 8, 9], [10], [11]):
            parts.append(view(mx.array([text]), cache=cache))
            # As mlx-lm does: in a pipeline nothing else keeps one pass behind the other.
            mx.eval(parts)
        return mx.concatenate(parts, axis=1)

    whole = [logits(loop) for loop in settings]
    (into_stages if pipeline else split)(model, group)
    found[asked] = max(relative_error(logits(s), w) for s, w in zip(settings, whole))
if group.rank() == 0:
    print(json.dumps(found))
"""
STORY = "Tell me a story about a small dog."


def ports(count):
    """Some that are free."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return found


@pytest.fixture
def start(tries, tmp_path):
    return partial(_start, tries, tmp_path)


def _start(tries, folder, count, *words):
    """`count` processes in a ring, all started with the same words."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(count)]))
    return [
        tries.start(
            *words, cwd=folder, environment={"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        )
        for rank in range(count)
    ]


def ended(processes, typed=None):
    """What each has written, (standard output, standard error), after `typed` to the first."""
    texts = [typed, *[None] * (len(processes) - 1)]
    return [p.communicate(text, timeout=120) for p, text in zip(processes, texts, strict=True)]


def assert_ends(processes, command):
    """Killing the second of two processes ends the first, with one line and status 3."""
    first, second = processes
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, err = first.communicate(timeout=60)
    second.communicate()
    assert time.monotonic() - began < 30
    assert first.returncode == 3
    # MLX's own lines come from another thread, and stand between and within ours.
    assert f"mlx_loop {command}: error: another machine has gone, so this one ends too" in err
    assert err.count("mlx_loop") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (2, "qwen3 qwen3_moe gpt_oss deepseek_v3 deepseek_v3/pipeline"),
        (4, "qwen3 deepseek_v3/pipeline"),
    ],
)
def test_a_split_model_has_the_logits_of_the_whole(start, count, names):
    names = names.split()
    processes = start(count, "-c", LOGITS, *names)
    (out, err), *_ = ended(processes)
    assert [process.returncode for process in processes] == [0] * count, err
    found = json.loads(out)
    assert found.keys() == set(names)
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("options", [[], ["--pipeline"]])
def test_two_processes_give_the_answer_of_one_and_the_first_speaks(start, capsys, options):
    words = ["generate", "--prompt", STORY, "--loops", "4", "--max-tokens", "8"]
    words += ["--model", "demo-mla"] if options else []
    assert main(words) == 0
    first, second = ended(start(2, *words, *options))
    assert first[0] == capsys.readouterr().out
    assert "tokens/s" in first[1]
    assert second == ("", "")


# --- Problems that machines share ---

SWEEP = "sweep --task demo --limit 12 --batch-size 2 --loops 2 --max-tokens 4".split()
EVALUATE = "evaluate --tasks niah_single_1 --lengths 384 --batch-size 1 --loops 2 --trace 1".split()


def test_a_sweep_on_several_writes_the_file_that_one_writes(start, tmp_path, capsys):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main([*SWEEP, "--out", str(alone)]) == 0
    # The header and some of the results: another number of machines goes on.
    shared.write_text("".join(alone.read_text().splitlines(keepends=True)[:9]))
    processes = start(2, *SWEEP, "--out", str(shared))
    (out, err), *others = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], err
    assert shared.read_bytes() == alone.read_bytes()
    assert out == capsys.readouterr().out
    assert others == [("", "")]


def test_an_evaluation_on_several_has_the_files_of_one(start, tmp_path, capsys):
    words = [*EVALUATE, "--limit", "2", "--out"]
    assert main([*words, str(tmp_path / "alone")]) == 0
    processes = start(2, *words, str(tmp_path / "shared"))
    (out, err), _ = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], err
    assert out == capsys.readouterr().out
    for name in ("examples.jsonl", "results.jsonl", "drift.jsonl"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("alone", "shared"))
        assert one == two, name
    assert (tmp_path / "shared" / "report.html").is_file()


def test_what_one_of_several_cannot_measure_ends_all_of_them(start, tmp_path):
    """The mistake is in a batch of the second, and the first one tells."""
    file = tmp_path / "mine.jsonl"
    question = {"messages": [{"role": "user", "content": "what is 12 + 30?"}], "answer": "42"}
    wrong = {**question, "messages": [{"role": "nobody", "content": {"no": "text"}}]}
    file.write_text("".join(json.dumps(q) + "\n" for q in (question, wrong)))
    words = ["sweep", "--task", str(file), "--batch-size", "1", "--out", str(tmp_path / "out")]
    processes = start(2, *words)
    (_, first), (_, second) = ended(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert first.count("\n") == 1
    assert second == ""


def test_a_process_that_is_killed_ends_an_evaluation_with_one_line(start, tmp_path):
    out = tmp_path / "out"
    processes = start(2, *EVALUATE, "--limit", "50", "--out", str(out))
    while not (out / "seconds.jsonl").exists():
        assert processes[0].poll() is None
        time.sleep(0.05)
    assert_ends(processes, "evaluate")
    rows = (out / "results.jsonl").read_text().splitlines()[1:]
    assert len(rows) < 100
    assert all(map(json.loads, rows))


def test_what_does_not_run_on_several_is_refused(start):
    processes = start(2, "trace", "--prompt", "Hello")
    (_, first), (_, second) = ended(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "trace runs on one machine" in first
    assert first.count("\n") == 1
    assert second == ""


def test_a_model_that_cannot_be_split_evenly_is_refused(model):
    class Three:
        def size(self):
            return 3

    with pytest.raises(UserError, match="3 machines cannot share the 4 num_attention_heads"):
        split(model, Three())
    with pytest.raises(UserError, match="cannot split models of the type 'mixtral'"):
        split(make("mixtral"), Three())


# --- Serving ---

SETTINGS = {
    "demo:loops=1": {"loops": 1},
    "demo:loops=6,cache=own": {"loops": 6, "cache": "own"},
    "demo:decode=bypass": {"decode": "bypass"},  # which is served alone
}


def ask(port, path="/v1/chat/completions", **body):
    """A connection with an answer to come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    asked = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 6, **body}
    connection.request("POST", path, json.dumps(asked))
    return connection


def said(connection):
    answer = connection.getresponse()
    body = json.loads(answer.read())
    return body["choices"][0]["message"]["content"] if answer.status == 200 else body["error"]


def test_a_server_on_several_answers_as_one_and_ends_with_one_line_where_one_is_killed(start):
    processes = start(2, "serve", "--port", "0")
    line = processes[0].stderr.readline()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)[1])
    model, tokenizer = mlx_loop.load("demo")
    prompt = render(tokenizer, [{"role": "user", "content": STORY}])

    # Two of each at once.
    asked = {(name, n): ask(port, model=name) for n in range(2) for name in SETTINGS}
    found = {key: said(connection) for key, connection in asked.items()}
    for name, fields in SETTINGS.items():
        view = model.with_loop(LoopConfig(**fields))
        expected = mlx_loop.generate(view, tokenizer, prompt, max_tokens=6)
        assert found[name, 0] == found[name, 1] == expected

    compared = said(ask(port, "/compare", prompt="Hello", settings=["loops=2"]))
    assert compared == "settings are compared on one machine: ask for each in a model's name"

    # Who goes away leaves the machines in step.
    for name in SETTINGS:
        gone = ask(port, model=name, stream=True, max_tokens=400)
        assert b"data" in gone.getresponse().read(400)
        gone.close()
    assert said(ask(port, model="demo:loops=1")) == found["demo:loops=1", 0]

    busy = ask(port, model="demo:loops=60", stream=True, max_tokens=400)
    assert busy.getresponse().read(100)
    assert_ends(processes, "serve")


@pytest.mark.parametrize(
    ("meanwhile", "ends"), [("waits", True), ("computes", False), ("asks", False)]
)
def test_who_waits_in_vain_is_ended_and_nobody_else(meanwhile, ends, monkeypatch):
    # MLX as a rule raises an error, and then there is nobody left to end.
    here, there = socket.socketpair()
    gone = threading.Event()
    monkeypatch.setattr(several, "_asks", [True] if meanwhile == "asks" else [])

    def watch():
        with suppress(EOFError):
            several._watch([here], leave, patience=0.3)

    def leave():
        gone.set()
        raise EOFError

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert not gone.wait(0.7)
    there.close()
    began = time.monotonic()
    while time.monotonic() - began < 2 and not gone.is_set():
        if meanwhile != "computes":
            gone.wait(0.1)
    assert gone.is_set() == ends
    if not ends:
        monkeypatch.setattr(several, "_asks", [])
        assert gone.wait(10)
    thread.join()


def test_connections_are_sockets_that_have_a_peer():
    known = several._connections()
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert several._connections() == known
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as other:
            assert several._connections() - known == {client.fileno(), other.fileno()}


# --- Chat ---


def without_numbers(text):
    return [line for line in text.splitlines() if "tokens/s" not in line]


def test_a_chat_on_several_is_that_of_one(start, tmp_path, monkeypatch, capsys):
    talk = tmp_path / "talk.json"
    note = tmp_path / "note.txt"
    note.write_text("Mia lives in Norwick.")
    lines = (
        f"What is 12 + 30?\n/loop 6\n/file {note}\nWhere does Mia live?\n/retry\n/save {talk}\n"
        f"/load {talk}\n/seed 1\n/temp 1\nTell me a story.\n/load {tmp_path / 'nothing'}\n"
    )
    words = ["chat", "--max-tokens", "6"]
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(words) == 2
    alone = capsys.readouterr()
    talk.unlink()
    processes = start(2, *words)
    (out, err), second = ended(processes, lines)
    assert without_numbers(out) == without_numbers(alone.out)
    assert err == alone.err
    assert "nothing" in err
    assert second == ("", "")
    assert [process.returncode for process in processes] == [2, 2]
    assert len(json.loads(talk.read_text())["messages"]) == 4


def test_ctrl_c_on_one_stops_all_at_the_same_token(start):
    words = ["chat", "--loops", "40", "--max-tokens", "400"]
    processes = start(2, *words)
    first = processes[0]
    first.stdin.write(f"{STORY}\n")
    first.stdin.flush()
    assert first.stdout.read(1) == "O"
    first.send_signal(signal.SIGINT)
    (out, err), second = ended(processes)
    assert [process.returncode for process in processes] == [130, 130], err
    assert "\nstopped\n" in out
    assert second == ("", "")


def test_a_process_that_is_killed_ends_a_chat_with_one_line(start):
    words = ["chat", "--loops", "60", "--max-tokens", "400"]
    processes = start(2, *words)
    processes[0].stdin.write(f"{STORY}\n")
    processes[0].stdin.flush()
    assert processes[0].stdout.read(1) == "O"
    assert_ends(processes, "chat")
