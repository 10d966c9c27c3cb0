"""What an attack found, kind by kind: nothing lost, nothing silent, nothing raw."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from tries import CONTROLS, Tries

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.generation import prompt
from mlx_loop.generation.conversation import Conversation
from mlx_loop.measure.results import Results
from mlx_loop.screens.chat_session import Chat
from mlx_loop.screens.cli import main

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="Metal does not survive a fork")
PROMPT = ["--prompt", "What is 12 + 30?", "--max-tokens", "8"]
PROGRAM = [sys.executable, "-m", "mlx_loop.screens.cli"]
KILLS = int(os.environ.get("MLX_LOOP_KILLS", 2))  # moments at which each writer is killed

EVIL = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x202E]))
EVIL += "\x1b]0;title\x07\x1b[2J<script>alert(1)</script>|[bold]x[/bold][/x]2"


@pytest.fixture
def model(tmp_path):
    """A copy of the demo checkpoint that a test may damage."""
    return Path(shutil.copytree(DEMOS["demo"], tmp_path / "model"))


def change(file, **changes):
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | changes))


def change_weights(model, change):
    file = model / "model.safetensors"
    weights = dict(mx.load(str(file)))
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})


def error(tries, model, *words, command="generate", **more):
    """The one line of a command that must fail."""
    words = (*PROMPT, *words) if command == "generate" else words
    found = tries(command, "--model", model, *words, cwd=model.parent, **more).check()
    assert found.status == 2, found
    return found.err


# --- 1. Results lost ---


@pytest.fixture
def evil(model):
    """A model that answers `What is 12 + 30?` with all that a terminal obeys."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    evil = {"type": "Replace", "pattern": {"String": "4"}, "content": EVIL[:-1]}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], evil]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    row = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "answer": EVIL}
    (model.parent / "q[x]|<b>.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    return model


def test_answers_that_a_terminal_obeys_leave_screens_and_files_clean(tries, evil):
    place, task = evil.parent, "q[x]|<b>.jsonl"
    shown = tries("generate", "--model", evil, *PROMPT, cwd=place).check()
    assert "\u241b]0;title\u2407\u241b[2J<script>alert(1)</script>|[bold]x[/bold][/x]2" in shown.out
    told = tries("generate", "--model", evil, *PROMPT, "--json", cwd=place).check()
    assert json.loads(told.out)["text"] == EVIL
    chat = b"What is 12 + 30?\n/save talk.json\n/load talk.json\n/info\n"
    assert tries("chat", "--model", evil, stdin=chat, cwd=place).check().status == 0
    assert json.loads((place / "talk.json").read_text())["messages"][1]["content"] == EVIL
    for name in ("session.md", "session.json"):
        words = f"What is 12 + 30?\n/save {name}\n".encode()
        tries("compare", "--model", evil, "--loops", 2, stdin=words, cwd=place).check()
    assert json.loads((place / "session.json").read_text())[0]["answers"][0]["text"] == EVIL
    sweep = ["sweep", "--model", evil, "--task", task, "--loops", 2, "--plot", "p.png"]
    first, again = (tries(*sweep, cwd=place).check() for _ in range(2))
    assert (first.status, again.status, again.out) == (0, 0, first.out)
    rows = list(map(json.loads, (place / "sweep.jsonl").read_text().split("\n")[1:-1]))
    assert [(row["text"], row["right"]) for row in rows] == [(EVIL, 1)] * 2
    study = ["evaluate", "--model", evil, "--tasks", f"questions:{task}", "--loops", 2]
    first, again = (tries(*study, cwd=place).check() for _ in range(2))
    assert (first.status, again.status, again.out) == (0, 0, first.out)
    for file in ("talk.json", "session.md", "session.json", "sweep.jsonl", "evaluation/report.md"):
        text = (place / file).read_text()
        assert not CONTROLS.search(text), file
        assert "<script>" not in text or file.endswith((".json", ".jsonl"))
    assert "<b>" not in (place / "evaluation" / "report.html").read_text()


HEADER = {"model": "m"}


def results(path, *rows):
    made = Results.open(path, HEADER)
    for row in rows:
        made.add(None, row)
    return made


def test_a_first_line_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / "r.jsonl"
    results(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        results(path)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b'{"loop": nu{"loop": null}', b"null", b"[]", b"\xc2\x85", b"{}"])
def test_a_line_that_is_no_result_loses_itself_only(tmp_path, line):
    path = tmp_path / "r.jsonl"
    results(path, {"item": 1, "right": 1}, {"item": 2, "right": 0})
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    again = results(path)
    assert [again.has(None, {"item": i}, ["right"]) for i in (1, 2, 3)] == [True, True, False]


def test_a_result_without_its_number_is_measured_again(tmp_path):
    made = results(tmp_path / "r.jsonl", {"item": 1}, {"item": 2, "right": "1"})
    made.add(None, {"item": 3, "right": float("nan")})
    again = results(tmp_path / "r.jsonl")
    assert not any(again.has(None, {"item": i}, ["right"]) for i in (1, 2, 3))


def test_a_number_beyond_all_numbers_is_measured_again(tries, tmp_path):
    words = "evaluate --tasks niah_single_1 --lengths 208 --limit 1 --loops 2 --out e".split()
    first = tries(*words, cwd=tmp_path).check()
    for name, field in (("results", "score"), ("seconds", "seconds"), ("drift", "kl")):
        file = tmp_path / "e" / f"{name}.jsonl"
        rows = list(map(json.loads, file.read_text().split("\n")[:-1]))
        rows[-1][field] = 10**400
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = tries(*words, cwd=tmp_path).check()
    assert (again.status, again.out) == (0, first.out)


@pytest.mark.parametrize("text", ["hello\n", "hello", '{"model": "other"}\n', "[]\n", "\n"])
def test_what_is_truly_someone_elses_is_refused(tmp_path, text):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="give --out another name"):
        results(path)
    assert path.read_text() == text


def test_a_row_is_written_whole_or_not_at_all(tmp_path):
    """The disk fills in the middle of a row."""
    path = tmp_path / "r.jsonl"
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from mlx_loop.measure.results import Results, append\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = Path(sys.argv[1]); r = Results.open(path, {'model': 'm'})\n"
        "r.add(None, {'item': 0}); size = path.stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))\n"
        "try: r.add(None, {'item': 1, 'text': 'x' * 99})\n"
        "except ValueError as error: print(error)\n"
        "sys.exit(path.stat().st_size != size)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (done.returncode, "cannot write" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("cut", [3, 10**6])
def test_an_evaluation_survives_torn_files(tries, tmp_path, cut):
    words = "evaluate --tasks niah_single_1 --lengths 208 --limit 1 --loops 2 --out e".split()
    first = tries(*words, cwd=tmp_path).check()
    files = [
        tmp_path / "e" / f"{name}.jsonl" for name in ("results", "seconds", "drift", "examples")
    ]
    for file in files:
        file.write_bytes(file.read_bytes()[:-cut])
    again = tries(*words, cwd=tmp_path).check()
    assert (again.status, again.out) == (0, first.out)
    for file in files:
        file.write_bytes(file.read_bytes() + b'{"foreign": true}\nnull\n{"torn')
    again = tries(*words, cwd=tmp_path).check()
    assert (again.status, again.out) == (0, first.out)


# --- 2. Folders destroyed ---


def test_only_a_checkpoint_is_replaced(tries, tmp_path):
    words = ["quantize", "--mlx-path", "q", "--q-bits", 8, "--force"]
    place = tmp_path / "q"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "thesis.tex").write_text("years")
    found = tries(*words, cwd=tmp_path).check()
    assert (found.status, "thesis.tex" in found.err) == (2, True)
    assert (place / "thesis.tex").read_text() == "years"
    (place / "thesis.tex").unlink()
    assert tries(*words, cwd=tmp_path).check().status == 0
    assert tries(*words, cwd=tmp_path).check().status == 0
    for name in (".", "..", "", "/"):
        words[2] = name
        assert tries(*words, cwd=tmp_path).check().status == 2


WRITERS = {
    "quantize": "quantize --model {old} --q-bits 8 --mlx-path {path} --force",
    "save": "import mlx_loop; mlx_loop.save('{path}', *mlx_loop.load('{old}'), overwrite=True)",
    "evaluate": "evaluate --tasks niah_single_1 --lengths 208 --limit 3 --loops 2 --out {path}",
}


@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_any_moment_old_or_new_is_there_whole(tries, tmp_path, name):
    path, old = tmp_path / "path", tmp_path / "old"
    shutil.copytree(DEMOS["demo"], old)
    text = WRITERS[name].format(path=path, old=old)
    words = ["-c", text] if name == "save" else text.split()
    tries("plan", cwd=tmp_path)  # Starting the program takes time too.
    rng, took, killed = random.Random(name), 0.0, 0
    whole: dict[str, bytes] = {}
    while killed < KILLS:
        start = time.perf_counter()
        done = tries(*words, cwd=tmp_path, limit=took * rng.uniform(0.2, 1) or 60)
        if name != "evaluate":
            mlx_loop.load_model(path)  # It is whole.
        killed += done.status is None
        if done.status is not None:
            assert done.check().status == 0
            assert {p.name for p in tmp_path.iterdir()} == {"path", "old"}
            took = time.perf_counter() - start
        if done.status == 0 and name == "evaluate":
            kept = ("results.jsonl", "examples.jsonl", "drift.jsonl")
            found = {file: (path / file).read_bytes() for file in kept}
            whole = whole or found
            assert found == whole
            shutil.rmtree(path)
    assert tries(*words, cwd=tmp_path).status == 0
    assert {p.name for p in tmp_path.iterdir()} == {"path", "old"}


CALLS = int(os.environ.get("MLX_LOOP_CALLS", 0))  # so many calls that write fail, one at a time
SAVERS = {
    # What these write stands there already, and must be kept.
    "quantize": WRITERS["quantize"],
    "cache_prompt": "cache_prompt --prompt hello --prompt-cache-file {path}.safetensors",
    # The second run of these goes on.
    "evaluate": "evaluate --tasks niah_single_1 --lengths 208 --limit 1 --loops 2 --out {path}",
    "sweep": "sweep --task demo --limit 2 --loops 2 --max-tokens 2 --out {path}",
    # This saves when it is told to, but not over a file.
    "chat": "chat --max-tokens 2",
}
BADLY = """import os, sys
os.environ.update(BAD_FOLDER={place!r}, BAD_CALL="{call}")
from mlx_loop.screens.cli import main
sys.exit(main({words!r}))
"""


@pytest.fixture(scope="module")
def bad_disk(tmp_path_factory):
    """Tries on a machine whose disk can be told to go bad."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and LD_PRELOAD")
    made = tmp_path_factory.mktemp("host") / "bad_disk.so"
    text = Path(__file__).parent / "host" / "bad_disk.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, text], check=True)
    with Tries(LD_PRELOAD=f"{made}:{os.environ.get('LD_PRELOAD', '')}") as running:
        yield running


@pytest.mark.parametrize("name", SAVERS)
def test_whichever_write_fails_nothing_is_lost(bad_disk, tmp_path, name):
    """One call fails of those that write a file, bring it to the disk or name it."""
    place, old = tmp_path / "place", tmp_path / "old"
    shutil.copytree(DEMOS["demo"], old)
    words = SAVERS[name].format(path=place / "path", old=old).split()

    def run(call=0):
        """Call number 0 never comes. What the files hold, but times and the page made of them."""
        code = BADLY.format(place=str(place), call=call, words=words)
        stdin = b"hello\n/save a.json\n"
        found = bad_disk("-c", code, cwd=place, stdin=stdin).check()
        dated = ("seconds", "runs", "report")
        names = [p for p in place.rglob("*") if p.is_file() and p.stem not in dated]
        return found, {file: file.read_bytes() for file in names}

    place.mkdir()
    _, whole = run()
    for call in range(1, CALLS + 1) if CALLS else (5,):
        if name not in ("quantize", "cache_prompt"):
            shutil.rmtree(place)
            place.mkdir()
        found, left = run(call)
        assert name in ("evaluate", "sweep") or left in ({}, whole), (call, found)
        if name == "chat" and left:
            continue
        again, left = run()
        assert (again.status, left) == (0, whole), (call, found, again)


# --- 3. Silent wrong answers ---


def test_a_prompt_cache_of_other_weights_is_refused(tries, model):
    file, place = model.parent / "c.safetensors", model.parent
    words = ["cache_prompt", "--model", model, "--prompt", "What is", "--prompt-cache-file", file]
    assert tries(*words, cwd=place).status == 0
    assert tries("generate", "--model", model, *PROMPT, *words[-2:], cwd=place).status == 0
    name = "model.layers.3.mlp.up_proj.weight"
    change_weights(model, lambda w: w.update({name: w[name] * 1.01}))
    assert "another model" in error(tries, model, *words[-2:])


def test_a_prompt_cache_of_whole_numbers_is_refused(tries, tmp_path):
    words = ["--prompt", "What is 12", "--prompt-cache-file", "c.safetensors"]
    assert tries("cache_prompt", *words, cwd=tmp_path).status == 0
    file = str(tmp_path / "c.safetensors")
    arrays, metadata = mx.load(file, return_metadata=True)
    whole = {name: a.astype(mx.int32) if a.ndim == 4 else a for name, a in arrays.items()}
    mx.eval(whole)
    mx.save_safetensors(file, whole, metadata)
    found = tries("generate", "--prompt", " + 30?", *words[2:], cwd=tmp_path).check()
    assert (found.status, "int32" in found.err) == (2, True)


def test_a_rotating_cache_is_not_given_more_than_it_holds(tries, tmp_path):
    words = ["--prompt", "What is 12", "--max-kv-size", 32, "--prompt-cache-file", "c.safetensors"]
    assert tries("cache_prompt", *words, cwd=tmp_path).status == 0
    more = ["--prompt", " + 30?" * 9, *words[-2:]]
    found = tries("generate", *more, cwd=tmp_path).check()
    assert (found.status, "keeps 32" in found.err) == (2, True)


NORM, UP = "model.norm.weight", "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize("command", ["generate", "chat", "sweep"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_weights_that_are_no_numbers_are_told(tries, model, command, number):
    change_weights(model, lambda w: w.update({UP: w[UP] * float(number)}))
    words = {"sweep": ["--task", "demo", "--limit", 1]}.get(command, [])
    assert "NaN or infinite" in error(tries, model, *words, command=command, stdin=b"hi\n")


def test_logits_that_are_no_numbers_are_told(monkeypatch):
    from mlx_loop.generation.batch import answer_batch
    from mlx_loop.measure.likelihood import log_likelihoods

    model, tokenizer = mlx_loop.load("demo", loop=LoopConfig(loops=2))
    norm = model.model.norm
    norm.weight = norm.weight * mx.array(float("inf"))
    with pytest.raises(UserError, match="predicts NaN or infinity"):
        mlx_loop.generate(model, tokenizer, "hello")
    with pytest.raises(UserError, match="predicts NaN or infinity"):
        list(answer_batch([model], [[5, 6]], set(), 3))
    with pytest.raises(UserError, match="predicts NaN or infinity"):
        log_likelihoods([model], [[5, 6]], [[[7], [8, 9]]])
    talk = Conversation(model, tokenizer)
    with pytest.raises(UserError, match="predicts NaN or infinity"):
        list(talk.reply("hello"))
    assert talk.messages == []


@pytest.mark.parametrize("step", [1, 1_000_000])
def test_words_beyond_the_embedding_are_refused(tries, model, step):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    last = max(words, key=words.get)
    words[last] += step
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "do not belong together" in error(tries, model)


def test_an_added_token_beyond_the_embedding_is_refused_where_it_is_used(tries, model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    new = {**tokenizer["added_tokens"][-1], "id": 1024, "content": "<image>"}
    tokenizer["added_tokens"].append(new)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert tries("generate", "--model", model, *PROMPT, cwd=model.parent).status == 0
    words = ["--ignore-chat-template", "--model", model]
    found = tries("generate", *words, "--prompt", "a <image>", cwd=model.parent).check()
    assert (found.status, "token 1024" in found.err) == (2, True)
    (model.parent / "t").write_text("what is an <image> then? " * 9)
    found = tries("sweep", "--model", model, "--text", "t", cwd=model.parent).check()
    assert (found.status, "token 1024" in found.err) == (2, True)


def test_a_shard_that_the_index_does_not_name_is_not_read(tries, model):
    answer = tries("generate", *PROMPT, "--model", model, cwd=model.parent).out
    names = list(mx.load(str(model / "model.safetensors")))
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    shutil.copy(model / "model.safetensors", model / "model-1.safetensors")
    change_weights(model, lambda w: w.update({UP: w[UP] * 0}))
    # Files come in any order, and of two the last one would win.
    for number in (0, 2, 3, 4):
        shutil.copy(model / "model.safetensors", model / f"model-{number}.safetensors")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tries("generate", *PROMPT, "--model", model, cwd=model.parent).out == answer


def test_integers_where_numbers_belong_are_refused(tries, model):
    change_weights(model, lambda w: w.update({UP: w[UP].astype(mx.int32)}))
    assert f"{UP} is of type" in error(tries, model)


@pytest.mark.parametrize("step", [-1, 1])
def test_a_header_of_another_length_is_refused(tries, model, step):
    file = model / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little") + step
    file.write_bytes(length.to_bytes(8, "little") + data[8:])
    assert "incomplete or damaged" in error(tries, model)


# --- 4. Conversations lost ---


@pytest.fixture(scope="module")
def loaded():
    return mlx_loop.load("demo")


@pytest.fixture
def chat(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generation = {"max_tokens": 4, "prefill_step_size": 64}
    made = Chat(Conversation(*loaded), "demo", generation)
    made.answer("hello")
    return made


@pytest.mark.parametrize(
    "line",
    [
        "/save " + "a" * 300,
        "/save ~nobody-of-this-name/x",
        "/save .",
        "/save /proc/none/x",
        "/load deep",
        "/load mistyped",
        "/load roles",
        "/load numbers",
        "/load .",
        "/load nul\0",
        "/loop " + "9" * 5000,
        "/set gate entropy:x",
    ],
)
def test_a_command_that_fails_is_a_line_and_the_conversation_stays(chat, line):
    message = {"role": "user", "content": "hi"}
    Path("deep").write_text("[" * 100_000)
    Path("mistyped").write_text(json.dumps({"messages": 3, "system": None, "loop": None}))
    Path("roles").write_text(
        json.dumps({"messages": [{**message, "content": 1}], "system": None, "loop": None})
    )
    Path("numbers").write_text(json.dumps({"messages": [message], "system": 3, "loop": None}))
    before, loop = list(chat.conversation.messages), chat.conversation.loop
    with pytest.raises(UserError):
        chat.carry_out(line)
    assert (chat.conversation.messages, chat.conversation.loop) == (before, loop)
    assert chat.answer("thanks")


SHOW = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
REFUSES_CHANNELS = (
    "{% for m in messages %}{% if '<|channel|>' in m.content %}{{ 1/0 }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
DROPS = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [REFUSES + SHOW, DROPS])
def test_a_system_message_that_a_template_does_not_take_is_told(tries, model, template):
    (model / "chat_template.jinja").write_text(template)
    assert "no system message" in error(tries, model, "--system-prompt", "Be kind.")
    talk = tries("chat", "--model", model, "--max-tokens", 2, "--system-prompt", "Be kind.",
                 stdin=b"hello\n", cwd=model.parent)  # fmt: skip
    assert talk.status == 0
    assert "before the first question" in talk.err
    _, tokenizer = mlx_loop.load(model)
    conversation = Conversation(mlx_loop.load_model(model), tokenizer, system="Be kind.")
    asked = [{"role": "user", "content": "hello"}]
    assert "Be kind.\n\nhello" in tokenizer.decode(conversation._render(asked))


def test_a_template_that_refuses_channels_sees_the_last_one(loaded):
    model, tokenizer = loaded
    talk = Conversation(model, tokenizer, template={"chat_template": REFUSES_CHANNELS})
    said = "<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>Forty."
    talk.messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    talk.check_messages()


# --- 5. Work thrown away ---


@pytest.mark.parametrize("name", ["book", "", "no/such\0", "a" * 300 + ".safetensors", "."])
def test_where_a_cache_is_written_is_looked_at_before_the_prompt(tries, tmp_path, name):
    words = ["--prompt", "x", "--prompt-cache-file", name, "--model", "./nowhere"]
    found = tries("cache_prompt", *words, cwd=tmp_path).check()
    assert found.status == 2
    assert "nowhere" not in found.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "sweep --task demo --out .",
        "sweep --task demo --plot p.txt",
        "trace --prompt x --plot p.txt",
        "evaluate --tasks vt --out file",
        "quantize --mlx-path file/x",
        "quantize --bits-per-weight 4 --calibration nofile",
    ],
)
def test_what_will_be_written_and_read_is_looked_at_first(tries, tmp_path, words):
    (tmp_path / "file").write_text("")
    found = tries(*words.split(), "--model", "./nowhere", cwd=tmp_path).check()
    assert found.status == 2
    assert "nowhere" not in found.err


# --- 7. Traces and hangs ---


@pytest.mark.parametrize(
    ("words", "stdin"),
    [
        (["generate"], b"\xff\xfe"),
        (["chat"], "Käse\n".encode("latin-1")),
        (["generate", "--prompt", "a\udcff"], b""),
        (["generate", *PROMPT, "--seed", 2**64, "--temp", 1], b""),
        (["generate", *PROMPT, "--temp", "1e-320"], b""),
        (["generate", *PROMPT, "--model", "a" * 5000], b""),
        (["generate", *PROMPT, "--window", "3:7", "--window", "4:8"], b""),
        (["generate", *PROMPT, "--temp", 1, "--xtc-probability", 1, "--xtc-threshold", 0.9], b""),
        (["generate", *PROMPT, "--model", "demo-moe", "--dtype", "bfloat16"], b""),
        (["generate", *PROMPT, "--alpha", "0.5", "--integrator", "anchored"], b""),
        *(
            (["generate", *PROMPT, "--chat-template-config", config], b"")
            for config in (
                '{"tokenize": true}',
                '{"conversation": []}',
                '{"add_generation_prompt": false}',
                '{"chat_template": "{{ 1/0 }}"}',
                "[" * 100_000,
            )
        ),
    ],
    ids=range(15),
)
def test_arguments_that_ended_in_a_trace(tries, tmp_path, words, stdin):
    assert tries(*words, stdin=stdin, cwd=tmp_path).check().status == 2


def test_a_template_without_end_is_ended(capsys, monkeypatch):
    monkeypatch.setattr(prompt, "TEMPLATE_SECONDS", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    words = ["--chat-template-config", json.dumps({"chat_template": loops})]
    assert main(["generate", *PROMPT, *words]) == 2
    assert "longer than 0.2 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**6, "layer_types": None},
        {"model_type": []},
        {"quantization_config": {"quant_method": "awq"}},
        {"head_dim": 0},
        {"hidden_size": "64"},
    ],
)
def test_a_hostile_config_is_one_line(tries, model, config):
    change(model / "config.json", **config)
    for command in ("generate", "quantize"):
        error(tries, model, command=command)
    assert tries("plan", model, cwd=model.parent).check().status == 2


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "\xff", ""])
def test_a_config_that_is_no_object_is_one_line(tries, model, text):
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in error(tries, model)


def test_a_tokenizer_that_fails_in_use_is_one_line(tries, model):
    change(model / "tokenizer_config.json", model_max_length="many")
    assert "cannot load the tokenizer" in error(tries, model)


def test_what_libraries_log_of_a_checkpoint_is_shown_without_effect(tries, model):
    change(model / "config.json", rope_parameters={"rope_type": "\x1b[2J", "rope_theta": 1e4})
    found = tries("generate", "--model", model, *PROMPT, cwd=model.parent)
    assert "'rope_type'='\u241b[2J'" in found.err
    assert not CONTROLS.search(found.err)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tries, model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    assert str(model) in error(tries, model)


@pytest.mark.parametrize("file", ["pipe", "/dev/zero"])
def test_a_pipe_or_a_device_in_the_place_of_a_text_does_not_hang(tries, tmp_path, file):
    os.mkfifo(tmp_path / "pipe")
    for words, stdin in [
        (["sweep", "--text", file], ""),
        (["sweep", "--task", file], ""),
        (["evaluate", "--tasks", "vt", "--filler", file], ""),
        (["chat", "--max-tokens", 2], f"/file {file}\n"),
        (["chat", "--max-tokens", 2], f"/load {file}\n"),
        (["compare"], f"/prompts {file}\n"),
    ]:
        found = tries(*words, stdin=stdin.encode(), cwd=tmp_path).check()
        assert (found.status, "is not a file" in found.err) == (2, True), found


def test_adapters_are_called_adapters(tries, model):
    place = model.parent / "peft"
    place.mkdir()
    (place / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    assert "PEFT" in error(tries, model, "--adapter-path", place)
    (place / "adapter_config.json").write_text("{}")
    (place / "adapters.safetensors").write_text("none")
    assert "cannot load the adapters in" in error(tries, model, "--adapter-path", place)


# --- 8. Streams and signals ---


def shell(command, **more):
    words = ["bash", "-c", command.replace("mlx_loop", " ".join(PROGRAM))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, **more)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("mlx_loop generate -p hi -m 4 2> /dev/full", 2, ""),
        ("mlx_loop generate --model ./none -p hi 2> /dev/full", 2, ""),
        ("mlx_loop generate --help > /dev/full", 2, "No space left"),
        ("mlx_loop generate -p hi -m 4 > /dev/full", 2, "No space left"),
        ("mlx_loop generate -p hi -m 4 >&-", 2, "standard output is closed"),
        ("mlx_loop generate -p hi -m 4 <&-", 0, "tokens/s"),
        ("mlx_loop generate -p hi -m 200 | true; exit ${PIPESTATUS[0]}", 141, ""),
    ],
)
def test_streams_that_are_full_or_closed(command, status, said):
    done = shell(command)
    assert (done.returncode, said in done.stderr) == (status, True), done


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_model_loads_is_no_trace(signum):
    run = subprocess.Popen(
        [*PROGRAM, "chat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(1)
    run.send_signal(signum)
    _, said = run.communicate(timeout=60)
    assert run.returncode in (128 + signum, -signum)  # The latter before there is a command.
    assert "Traceback" not in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "deaf",
    [
        "class Deaf:\n    def __del__(self): come()\nend = Deaf",
        # What importlib calls at the end of each import.
        "code = compile('def cb(): come()', '<frozen importlib._bootstrap>', 'exec')\n"
        "exec(code)\nend = cb",
        "def end():\n    try: come()\n    except SystemExit: raise ValueError",
    ],
)
def test_a_signal_is_heard_wherever_it_comes(signum, deaf):
    code = (
        "import os, sys, time\nfrom mlx_loop.screens import cli\n"
        f"def come():\n    os.kill(os.getpid(), {int(signum)}); time.sleep(0.1)\n{deaf}\n"
        "class Command:\n    command = 'x'\n    @staticmethod\n    def run(args):\n"
        "        end(); time.sleep(1); return 0\n"
        "cli.check_idle = lambda args: None\n"
        "class Parser:\n    parse_args = lambda self, typed: Command\n"
        "cli.build_parser = Parser\nsys.exit(cli.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (128 + signum, ""), done


def test_a_hangup_that_is_ignored_ends_nothing():
    """As `nohup` asks."""
    run = "trap '' HUP; mlx_loop generate -p 'Tell me a story.' -m 500 &"
    done = shell(f"{run} while kill -HUP $!; do sleep 0.1; done 2> /dev/null; wait $!")
    assert (done.returncode, "tokens/s" in done.stderr) == (0, True), done


def test_a_signal_while_the_program_itself_is_imported_is_no_trace():
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mlx_loop.screens.cli':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import mlx_loop.__main__\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_an_end_by_signal_gives_the_screen_back():
    """`compare` draws on the alternate screen, without a cursor."""
    words = [*PROGRAM, "compare", "-p", "Tell me a story.", "--max-tokens", "2000"]
    child, screen = pty.fork()
    if child == 0:
        os.execvpe(words[0], words, {**os.environ, "TERM": "xterm"})
    said = b""
    while b"\x1b[?1049h" not in said:
        said += _read(screen)
    os.kill(child, signal.SIGTERM)
    while piece := _read(screen):
        said += piece
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
    assert said.rindex(b"\x1b[?1049l") > said.rindex(b"\x1b[?1049h")
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l")


def _read(screen):
    assert select.select([screen], [], [], 60)[0]
    try:
        return os.read(screen, 65536)
    except OSError:  # The other end is closed.
        return b""
