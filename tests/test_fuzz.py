"""Whatever is given, a command runs right or says one line and ends with status 2.

`MLX_LOOP_TRIES=1000 pytest tests/test_fuzz.py -k checkpoints` tries more than the test run does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.screens.cli import build_parser

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="Metal does not survive a fork")

ASKED = os.environ.get("MLX_LOOP_TRIES")
SECONDS = 1e9 if ASKED else 6  # of each kind
tried = settings(
    max_examples=int(ASKED or 12),
    deadline=None,
    database=None,
    derandomize=not ASKED,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def folder(place):
    """A new, empty folder each time; and the end of the time that there is."""
    end = time.monotonic() + SECONDS

    def fresh():
        if time.monotonic() > end:
            return None
        shutil.rmtree(place / "in", ignore_errors=True)
        (place / "in").mkdir()
        return place / "in"

    return fresh


# --- What is given ---

TEXTS = st.one_of(
    st.sampled_from(
        "|[/x]|[bold]|\x1b[2J\x1b]0;t\x07|\x85|\u2028|\udcff|a\nb|~nobody/x|/dev/null|{}|[]|null|-|$x_{|"
        "../|none.jsonl|<script>|%s|{0}".split("|")
    ),
    st.text(max_size=8),
)
NUMBERS = st.sampled_from(
    "0 1 2 3 7 -1 0.5 1.5 nan inf -inf 1e400 1e-9 0x10 \u0661 1_0 1,2 4:8 x".split()
)
HUGE = st.sampled_from(["9" * 20, "9" * 400, "9" * 5000, "1e308"])
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 70),
        st.sampled_from([2**31, 2**63, -(2**63), 10**30, 0.0, -1.5, 1e308, float("nan")]),
        st.sampled_from(["", "llama", "x\x1b[2J", "\ud800", "yarn", "default"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
# Each ends soon, whatever else is asked for.
COMMANDS = {
    "generate": ["--prompt", "hello", "--max-tokens", "4"],
    "chat": ["--max-tokens", "4"],
    "compare": ["--prompt", "hello", "--loops", "2", "--max-tokens", "4"],
    "trace": ["--prompt", "hello"],
    "sweep": ["--task", "demo", "--limit", "1", "--loops", "2", "--max-tokens", "4"],
    "evaluate": ["--tasks", "niah_single_1", "--lengths", "208", "--limit", "1", "--loops", "2"],
    "cache_prompt": ["--prompt", "hello", "--prompt-cache-file", "c.safetensors"],
    "quantize": ["--mlx-path", "q", "--q-bits", "8"],
    "plan": [],
    "upload": ["--path", "q", "--upload-repo", "a/b"],
}
# What takes as long as its number says is asked for in small ones.
COUNTS = ("--loops", "--memory", "--max-tokens", "--limit", "--lengths", "--weights", "--trace")


def _options():
    """Command -> its options, by their longest names."""
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: [a for a in commands.choices[name]._actions if a.option_strings and a.dest != "help"]
        for name in COMMANDS
    }


OPTIONS = _options()


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(list(COMMANDS)))
    given = dict(zip(COMMANDS[name][::2], COMMANDS[name][1::2], strict=True))
    for action in draw(st.lists(st.sampled_from(OPTIONS[name]), max_size=4)):
        option = max(action.option_strings, key=len)
        values = [TEXTS, NUMBERS]
        values += [] if option in COUNTS else [HUGE, JSON.map(json.dumps)]
        values += [st.sampled_from(list(map(str, action.choices)))] * 2 if action.choices else []
        given[option] = None if action.nargs == 0 else draw(st.one_of(values))
    words = [name]
    for option, value in given.items():
        words += [option] if value is None else [f"{option}={value}"]
    return words


@tried
@given(command_lines(), st.binary(max_size=12) | st.sampled_from([b"/help\n", b"/save [/x]\n"]))
def test_arguments(tries, folder, words, stdin):
    if (at := folder()) is not None:
        tries(*words, stdin=stdin, cwd=at).check()


# --- Checkpoints ---

CONFIG = json.loads((DEMOS["demo"] / "config.json").read_text())
FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
FIELDS = [*CONFIG, "quantization", "quantization_config", "loop", "architectures", "model_file"]
FIELDS += ["sliding_window", "rope_scaling", "text_config", "num_experts", "attention_bias"]
BYTES = st.binary(max_size=6) | st.sampled_from([b"\xff", b"\x00", b"[" * 5000, b"{}", b"null"])


@st.composite
def damages(draw):
    """Does something to the folder of a checkpoint."""
    kind = draw(st.sampled_from(["config", "bytes", "header", "length", "json", "template"]))
    if kind == "config":
        changes = draw(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2))
        return lambda at: (at / "config.json").write_text(json.dumps(CONFIG | changes))
    if kind == "bytes":
        name = draw(st.sampled_from([*FILES, "model.safetensors", "chat_template.jinja"]))
        where, new = draw(st.floats(0, 1)), draw(BYTES)
        return lambda at: _splice(at / name, where, new, draw_cut)
    if kind == "template":
        text = draw(TEXTS | st.sampled_from(["{{ 1/0 }}", "{{ messages[3].content }}", "{% for"]))
        return lambda at: (at / "chat_template.jinja").write_bytes(text.encode(errors="replace"))
    if kind == "json":
        name, value = draw(st.sampled_from(FILES)), draw(JSON)
        return lambda at: (at / name).write_text(json.dumps(value))
    if kind == "length":
        step = draw(st.sampled_from([-8, -2, -1, 1, 2, 8, 2**40]))
        return lambda at: _change_header(at, lambda tensors: None, step)
    number, field = draw(st.integers(0, 30)), draw(st.sampled_from(["dtype", "shape", "gone"]))
    types = st.sampled_from(["F32", "F16", "BF16", "I32", "U8", "BOOL", "F64", "X"])
    value = draw(
        types if field == "dtype" else st.lists(st.sampled_from([0, 1, 64, 2**40]), max_size=3)
    )

    def change(tensors):
        name = sorted(set(tensors) - {"__metadata__"})[number]
        if field == "gone":
            del tensors[name]
        else:
            tensors[name][field] = value

    return lambda at: _change_header(at, change, 0)


draw_cut = 3  # bytes that make room for others


def _splice(file, where, new, cut):
    data = file.read_bytes()
    at = int(where * len(data))
    file.write_bytes(data[:at] + new + data[at + cut :])


def _change_header(at, change, step):
    file = at / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + length])
    change(tensors)
    header = json.dumps(tensors).encode()
    size = (len(header) + step) % 2**64
    file.write_bytes(size.to_bytes(8, "little") + header + data[8 + length :])


@tried
@given(
    st.lists(damages(), min_size=1, max_size=2), st.sampled_from(["generate", "plan", "quantize"])
)
def test_checkpoints(tries, folder, damage, name):
    if (at := folder()) is None:
        return
    model = shutil.copytree(DEMOS["demo"], at / "model")
    for one in damage:
        try:
            one(model)
        except ValueError:
            return  # The other one has damaged it beyond that.
    words = ["plan", model] if name == "plan" else [name, "--model", model]
    words += ["--prompt", "hello", "--max-tokens", "2"] if name == "generate" else []
    tries(*words, cwd=at).check()


# --- Prompt caches, results, questions, conversations ---


@pytest.fixture(scope="module")
def made(tries, place):
    """Files as they should be."""
    at = place / "made"
    at.mkdir()
    cache = ["cache_prompt", "--prompt", "What is 12", "--prompt-cache-file", "cache.safetensors"]
    assert tries(*cache, cwd=at).status == 0
    assert tries(*SWEEP, cwd=at).status == 0
    assert tries("chat", "--max-tokens", 4, stdin=b"hello\n/save talk.json\n", cwd=at).status == 0
    return at


SWEEP = "sweep --task demo --limit 3 --loops 2 --max-tokens 4 --out results.jsonl".split()


@st.composite
def splices(draw):
    return draw(st.floats(0, 1)), draw(BYTES), draw(st.sampled_from([0, 1, 3, 10**6]))


@tried
@given(splices(), st.data())
def test_prompt_caches(tries, folder, made, splice, data):
    if (at := folder()) is None:
        return
    raw = (made / "cache.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if data.draw(st.booleans()):
        said = header["__metadata__"]
        said[data.draw(st.sampled_from(sorted(said)))] = str(data.draw(JSON))
    else:
        name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        header[name]["shape"] = data.draw(st.lists(st.integers(0, 64), max_size=4))
    text = json.dumps(header).encode()
    (at / "c.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    if data.draw(st.integers(0, 3)) == 0:
        _splice(at / "c.safetensors", *splice)
    words = ["--prompt", " + 30?", "--prompt-cache-file", "c.safetensors", "--max-tokens", "4"]
    tries("generate", *words, cwd=at).check()


@tried
@given(st.lists(splices(), min_size=1, max_size=2), st.booleans(), JSON)
def test_results(tries, folder, made, damage, adds, value):
    """What was measured is kept, and what was lost is measured again."""
    if (at := folder()) is None:
        return
    file = at / "results.jsonl"
    shutil.copy(made / "results.jsonl", file)
    for splice in damage:
        _splice(file, *splice)
    if adds:
        file.write_text(file.read_text(errors="replace") + json.dumps(value) + "\n")
    before = file.read_bytes()
    found = tries(*SWEEP, cwd=at).check()
    if found.status == 2:
        assert file.read_bytes() == before
    else:
        again = tries(*SWEEP, cwd=at).check()
        assert (again.status, again.out) == (0, found.out)


@tried
@given(
    st.lists(JSON | st.fixed_dictionaries({"messages": JSON, "answer": JSON}), max_size=3), BYTES
)
def test_questions_and_conversations(tries, folder, rows, tail):
    if (at := folder()) is None:
        return
    good = {"messages": [{"role": "user", "content": "\u2028\x85 hello \x1b[2J"}], "answer": "x"}
    text = "".join(json.dumps(row) + "\n" for row in [good, *rows]).encode() + tail
    for name in ("q.jsonl", "[4]q.jsonl"):
        (at / name).write_bytes(text)
        words = ["--task", name, "--loops", "2", "--max-tokens", "2", "--limit", "2"]
        tries("sweep", *words, cwd=at).check()
    talk = {"messages": rows, "system": None, "loop": None}
    (at / "talk.json").write_bytes(json.dumps(talk).encode() + tail)
    tries("chat", "--max-tokens", "2", stdin=b"/load talk.json\nhello\n", cwd=at).check()
