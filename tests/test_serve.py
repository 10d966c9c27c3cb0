"""The server: settings in names, answers as `mlx_loop generate` gives them, hostile requests."""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.generation.prompt import render
from mlx_loop.models.mixed import Mixed
from mlx_loop.screens.cli import build_parser
from mlx_loop.screens.commands import serve as command
from mlx_loop.screens.serve import checks
from mlx_loop.screens.serve.desk import MOST_SETTINGS
from mlx_loop.screens.serve.server import Server
from mlx_loop.screens.serve.turns import Turns

QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]
STORY = [{"role": "user", "content": "Tell me a story about a small dog."}]
SETTINGS = {
    "demo": {},
    "demo:loops=1": {"loops": 1},
    "demo:loops=6,beta=0.3,cache=own": {"loops": 6, "beta": 0.3, "cache": "own"},
    "demo:cache=last": {"cache": "last"},
    "demo:integrator=ema,loops=2,alpha=0.5;0.3": {
        "integrator": "ema",
        "loops": 2,
        "alpha": (0.5, 0.3),
    },
    "demo:window=3:5+7:9": {"window": ((3, 5), (7, 9))},
    "demo:decode=bypass": {"decode": "bypass"},
    "demo:gate=entropy:0.5": {"gate": "entropy:0.5"},
}


class Client:
    """A client of one server, with nothing but the standard library."""

    def __init__(self, server):
        self.server, self.port = server, server.server_address[1]

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, raw, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def get(self, path, **headers):
        status, body = self.request("GET", path, **headers)
        return status, json.loads(body)

    def post(self, body, path="/v1/chat/completions", **headers):
        status, raw = self.request("POST", path, body, **headers)
        return status, json.loads(raw)

    def chat(self, model="demo", messages=QUESTION, **more):
        status, answer = self.post({"model": model, "messages": messages, **more})
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]

    @contextmanager
    def stream(self, body, path="/v1/chat/completions"):
        """Yields the events of a stream as they come; leaving closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps({**body, "stream": True}))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        lines = (line.decode().strip() for line in answer)
        try:
            yield (line[6:] for line in lines if line.startswith("data: "))
        finally:
            answer.close()
            connection.close()

    def is_idle(self):
        """Whether no request holds memory or a place in a batch."""
        return all(not s.needs and not s.asked for s in self.server.desk._settings.values())


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@contextmanager
def running(*options):
    args = build_parser().parse_args(["serve", "--port", "0", *options])
    server = Server(command.open_desk(args), (args.host, args.port))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Client(server)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def client():
    with running("--prompt-cache-size", "0") as client:
        yield client


@pytest.fixture(scope="module")
def loaded():
    return mlx_loop.load("demo")


def generated(loaded, messages=QUESTION, max_tokens=512, **fields):
    model, tokenizer = loaded
    view = model.with_loop(LoopConfig(**fields))
    return mlx_loop.generate(view, tokenizer, render(tokenizer, messages), max_tokens=max_tokens)


# --- Settings ---


@pytest.mark.parametrize("name", SETTINGS)
def test_an_answer_is_that_of_generate(client, loaded, name):
    expected = generated(loaded, STORY, 40, **SETTINGS[name])
    assert client.chat(name, STORY, max_tokens=40) == expected


def test_settings_at_once_answer_as_alone(client, loaded):
    cases = [
        (name, [{"role": "user", "content": f"What is {a} + 3{a}?"}])
        for a in range(3)
        for name in SETTINGS
    ]
    expected = [generated(loaded, m, 24, **SETTINGS[name]) for name, m in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(lambda case: client.chat(*case, max_tokens=24), cases))
    assert found == expected


def test_a_loop_object_says_what_a_name_says(client):
    asked = {"model": "demo:loops=2", "messages": QUESTION, "loop": {"loops": 6, "window": [3, 6]}}
    status, answer = client.post(asked)
    assert status == 200
    assert answer["model"].startswith("demo:loops=6,window=3:6,")


def test_equal_settings_have_one_name_and_it_reads_back(client):
    names = client.server.desk.names
    for name in SETTINGS:
        view = names.view(name)
        canonical = names.canonical(view)
        assert names.view(canonical).loop == view.loop or view.is_unlooped
        assert names.canonical(names.view(canonical)) == canonical
    same = ["demo", "default_model", "demo:loops=3", "demo:beta=0.5,loops=3", "demo:recipe=paper"]
    assert len({names.canonical(names.view(name)) for name in same}) == 1
    assert names.canonical(names.view("demo:beta=1")) == "demo:loops=1"


def test_a_bare_name_stands_for_the_options_and_settings_add_to_them(loaded):
    with running("--beta", "0.2", "--loop-names", "loops=2 cache=own") as client:
        listed = client.get("/v1/models")[1]["data"]
    assert [model["id"] for model in listed] == ["demo", "demo:loops=2", "demo:cache=own"]
    assert [(m["loop"]["loops"], m["loop"]["beta"]) for m in listed] == [
        (3, 0.2),
        (2, 0.2),
        (3, 0.2),
    ]


def test_a_single_model_can_be_asked_for(client):
    status, model = client.get("/v1/models/demo:loops=6")
    assert (status, model["id"], model["loop"]["loops"]) == (200, "demo:loops=6", 6)
    assert client.get("/v1/models/other")[0] == 404


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("demo:loops=0", "loops=0 is not valid"),
        ("demo:loops=many", "write a whole number"),
        ("demo:loops", "is not FIELD=VALUE"),
        ("demo:speed=2", "unknown loop setting 'speed'"),
        ("demo:recipe=cake", "write one of paper"),
        ("demo:window=3:40", "the model has 12 layers"),
        ("demo:integrator=euler,beta=0.5", "beta does nothing with integrator euler"),
        ("demo:loops=65", "64 are the most"),
        ("demo-moe", "there is no model 'demo-moe' here"),
        ("/etc/passwd", "there is no model '/etc/passwd' here"),
        ("../demo", "there is no model '../demo' here"),
        ("demofoo:loops=2", "there is no model"),
    ],
)
def test_a_name_that_cannot_be_understood_is_refused(client, name, said):
    status, answer = client.post({"model": name, "messages": QUESTION})
    assert status == 400
    assert said in answer["error"]


def test_a_setting_that_nobody_asks_makes_room_for_another(client):
    for loops in range(2, 4 + MOST_SETTINGS):
        assert client.chat(f"demo:loops={loops},window=5:6,cache=last", max_tokens=2)
    assert len(client.server.desk._settings) == MOST_SETTINGS


def test_no_caches_cross_settings(loaded):
    with running() as client:
        for name in ("demo", "demo:loops=2", "demo:cache=own", "demo:loops=1"):
            first = client.post({"model": name, "messages": STORY, "max_tokens": 8})[1]
            again = client.post({"model": name, "messages": STORY, "max_tokens": 8})[1]
            cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (first, again)]
            assert cached[0] == 0
            assert cached[1] > 0


def test_a_text_that_is_wholly_in_the_cache_is_gone_on_with(loaded):
    # mlx-lm's own server ends its generation thread here.
    _, tokenizer = loaded
    with running() as client:
        tokens = tokenizer.encode("Hello!")
        body = {"model": "demo:loops=1", "prompt": "Hello!", "max_tokens": 4}
        status, answer = client.post(body, "/v1/completions")
        text = "Hello!" + answer["choices"][0]["text"]
        assert tokenizer.encode(text)[: len(tokens)] == tokens
        status, answer = client.post({**body, "prompt": text}, "/v1/completions")
        assert status == 200
        assert client.get("/health") == (200, {"status": "ok"})


# --- Streams ---


def test_a_stream_says_what_an_answer_says(client):
    with client.stream({"model": "demo:loops=6", "messages": STORY, "max_tokens": 30}) as events:
        *chunks, end = list(events)
    assert end == "[DONE]"
    deltas = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert len(deltas) > 10
    assert "".join(deltas) == client.chat("demo:loops=6", STORY, max_tokens=30)


def test_settings_take_turns(client):
    # Each stream has a setting of its own; none waits for another to run dry.
    names = ["demo:loops=1", "demo:loops=3", "demo:loops=6", "demo:decode=2"]
    began, ended = {}, {}

    def read(name):
        with client.stream({"model": name, "messages": STORY, "max_tokens": 100}) as events:
            for _ in events:
                ended[name] = time.monotonic()
                began.setdefault(name, ended[name])

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(read, names))
    assert max(began.values()) < min(ended.values())


def test_no_setting_waits_for_the_queue_of_another():
    with running("--decode-concurrency", "2") as client, ThreadPoolExecutor(9) as pool:
        ended = {}

        def ask(number, name, tokens):
            client.chat(name, STORY, max_tokens=tokens)
            ended[number] = time.monotonic()

        queue = [pool.submit(ask, n, "demo:loops=3", 40) for n in range(8)]
        until(lambda: client.server.desk._settings and not client.is_idle())
        pool.submit(ask, "other", "demo:loops=2", 5).result()
        for each in queue:
            each.result()
    assert sum(when < ended["other"] for when in ended.values()) <= 4


def test_settings_at_once_are_one_batch(client, monkeypatch):
    names = [f"demo:loops={loops}" for loops in (1, 2, 3)]
    sizes, call = set(), Mixed.__call__

    def watched(self, tokens, cache):
        sizes.add((len(tokens), len(set(cache[-1].rows))))
        return call(self, tokens, cache)

    monkeypatch.setattr(Mixed, "__call__", watched)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda name: client.chat(name, STORY, max_tokens=60), names))
    assert (3, 3) in sizes


def test_a_client_that_goes_away_frees_its_work(client):
    body = {"messages": STORY, "max_tokens": 2000}
    for name in ("demo:loops=3", "demo:decode=bypass"):
        with client.stream({"model": name, **body}) as events:
            next(events)
        until(client.is_idle, 10)
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": name, **body}))
        until(lambda: not client.is_idle())
        connection.close()
        until(client.is_idle, 10)


def test_turns_go_to_whoever_waited_longest():
    turns, order = Turns(), []
    start = threading.Barrier(1)

    def take(number):
        with turns:
            order.append(number)

    threads = []
    with turns:
        for number in range(5):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            until(lambda: len(turns._waiting) == number + 1)  # noqa: B023
        turns.hand_on()
        assert order == [0, 1, 2, 3, 4]
    for thread in threads:
        thread.join()
    start.wait()


# --- What it withstands ---


CHAT = {"model": "demo", "messages": QUESTION}
HOSTILE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"null",
    b"[]",
    b'"text"',
    b'{"messages": NaN}',
    json.dumps({**CHAT, "temperature": float("nan")}).encode(),
    json.dumps({**CHAT, "temperature": float("inf")}).encode(),
    b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "seed": '
    + b"9" * 5000
    + b"}",
    {**CHAT, "temperature": 10**400},
    {**CHAT, "temperature": -1},
    {**CHAT, "temperature": "hot"},
    {**CHAT, "top_k": 10**6},
    {**CHAT, "top_p": 2},
    {**CHAT, "presence_penalty": 10**30},
    {**CHAT, "repetition_context_size": 10**30},
    {**CHAT, "repetition_penalty": -1},
    {**CHAT, "max_tokens": 0},
    {**CHAT, "max_tokens": -5},
    {**CHAT, "max_tokens": 1.5},
    {**CHAT, "seed": -1},
    {**CHAT, "seed": 2**70},
    {**CHAT, "seed": "x"},
    {**CHAT, "logit_bias": {"99999999": 1}},
    {**CHAT, "logit_bias": {"-1": 1}},
    {**CHAT, "logit_bias": {"x": 1}},
    {**CHAT, "logit_bias": {"1": 10**400}},
    {**CHAT, "loop": {"beta": 10**400}},
    {**CHAT, "temperature": 1, "xtc_probability": 1, "xtc_threshold": 0.9},
    {**CHAT, "logit_bias": {"1": "y"}},
    {**CHAT, "logit_bias": [1]},
    {**CHAT, "top_logprobs": 10**6},
    {**CHAT, "logprobs": "yes"},
    {**CHAT, "stop": ""},
    {**CHAT, "stop": [""]},
    {**CHAT, "stop": [1, 2]},
    {**CHAT, "stop": {"a": 1}},
    {**CHAT, "stop": ["x" * 10_000]},
    {**CHAT, "stop": ["x"] * 1000},
    {**CHAT, "n": 2},
    {**CHAT, "stream": "yes"},
    {**CHAT, "stream_options": [1]},
    {**CHAT, "model": 7},
    {**CHAT, "model": ["demo"]},
    {**CHAT, "draft_model": "/etc"},
    {**CHAT, "adapters": "/etc"},
    {**CHAT, "loop": "loops=6"},
    {**CHAT, "loop": [6]},
    {**CHAT, "loop": {"loops": "6"}},
    {**CHAT, "loop": {"loops": 10**9}},
    {**CHAT, "loop": {"loops": True}},
    {**CHAT, "loop": {"recipe": 4}},
    {**CHAT, "loop": {"window": [[[3]]]}},
    {**CHAT, "loop": {"guard": {"growth": "x"}}},
    {**CHAT, "loop": {"weights": [float("1e308")] * 4}},
    {**CHAT, "tools": "x"},
    {**CHAT, "tools": [1]},
    {**CHAT, "role_mapping": [1]},
    {**CHAT, "chat_template_kwargs": [1]},
    {**CHAT, "chat_template_kwargs": {"tokenize": False}},
    {**CHAT, "chat_template_kwargs": {"chat_template": "{% for i in range(99999) %}x{% endfor %}"}},
    {**CHAT, "response_format": 3},
    {**CHAT, "response_format": {"type": "poem"}},
    {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
    {"model": "demo"},
    {"model": "demo", "messages": []},
    {"model": "demo", "messages": "hello"},
    {"model": "demo", "messages": {"role": "user"}},
    {"model": "demo", "messages": ["hello"]},
    {"model": "demo", "messages": [{"content": "x"}]},
    {"model": "demo", "messages": [{"role": 1, "content": "x"}]},
    {"model": "demo", "messages": [{"role": "user", "content": 5}]},
    {"model": "demo", "messages": [{"role": "user", "content": {"a": 1}}]},
    {"model": "demo", "messages": [{"role": "user", "content": ["x"]}]},
    {"model": "demo", "messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {
        "model": "demo",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}],
            }
        ],
    },
    {"model": "demo", "messages": [{"role": "user", "content": "word " * 20_000}]},
    {
        "model": "demo",
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
    },
    {"model": "demo", "messages": [{"role": "assistant", "tool_calls": [1]}]},
]
HOSTILE_TEXTS = [
    {"model": "demo"},
    {"model": "demo", "prompt": ""},
    {"model": "demo", "prompt": 3},
    {"model": "demo", "prompt": ["a", "b"]},
    {"model": "demo", "prompt": [1, 2]},
    {"model": "demo", "prompt": {}},
]


def test_hostile_bodies_are_refused_and_disturb_no_stream(client, loaded):
    expected = generated(loaded, STORY, 300, loops=2)
    with client.stream({"model": "demo:loops=2", "messages": STORY, "max_tokens": 300}) as events:
        next(events)
        for path, bodies in (
            ("/v1/chat/completions", HOSTILE),
            ("/v1/completions", HOSTILE_TEXTS),
            ("/compare", [*HOSTILE[:8], {}, {"prompt": "x", "settings": ["loops=x"]}]),
        ):
            for body in bodies:
                status, answer = client.post(body, path)
                assert status == 400, (body, answer)
                assert answer["error"]
                assert "Traceback" not in answer["error"]
        rest = [json.loads(event) for event in events if event != "[DONE]"]
    found = "".join(event["choices"][0]["delta"].get("content", "") for event in rest)
    assert expected.endswith(found)
    assert client.get("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 411),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 411),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n",
            413,
        ),
        (b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", 404),
        (b"GET /page/../../desk.py HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /v1/models HTTP/1.1\r\nHost: [::\r\n\r\n", 403),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[::\r\n\r\n", 403),
        (b"GET http://[::/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /error HTTP/1.1\r\nHost: host.docker.internal:8080\r\n\r\n", 404),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\r\n", 403),
        (b"BREW /coffee HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_a_request_that_is_no_request_is_refused(client, raw, status):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(raw)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    found = re.search(rb" (\d{3}) ", head)
    assert (found and int(found[1])) == status or (b"nonsense" in raw and b"error" in answer)
    assert b"error" in body or b"error" in head
    assert b"Access-Control" not in head


def test_a_body_that_ends_early_is_refused(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        connection.sendall(b"Content-Length: 100\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        assert b" 400 " in connection.recv(65536)


def test_a_key_is_asked_for_where_there_is_one():
    with running("--api-key", "secret") as client:
        assert client.get("/health")[0] == 200
        assert client.request("GET", "/")[0] == 200
        assert client.get("/v1/models")[0] == 401
        assert client.post(CHAT)[0] == 401
        assert client.post(CHAT, Authorization="Bearer wrong")[0] == 401
        assert client.post(CHAT, Authorization="Bearer secret")[0] == 200


def test_other_sites_pages_may_ask_only_if_they_were_named():
    with running("--allowed-origins", "https://chat.example") as client:
        status, _ = client.request("OPTIONS", "/v1/models", Origin="https://chat.example")
        assert status == 204
        assert client.post(CHAT, Origin="https://chat.example")[0] == 200
        assert client.post(CHAT, Origin="https://evil.example")[0] == 403
        assert client.post(CHAT, Origin=f"http://127.0.0.1:{client.port}")[0] == 200


def test_what_does_not_fit_is_refused_with_a_reason():
    with running("--max-context", "64", "--prompt-cache-bytes", "1500000") as client:
        status, answer = client.post(
            {"model": "demo", "messages": [{"role": "user", "content": "word " * 80}]}
        )
        assert status == 400
        assert "64 is the most" in answer["error"]
        # An answer ends where the context does.
        status, answer = client.post({"model": "demo", "messages": STORY, "max_tokens": 500})
        assert answer["usage"]["total_tokens"] <= 64
        status, answer = client.post({"model": "demo:loops=60,cache=own", "messages": STORY})
        assert status == 400
        assert "--prompt-cache-bytes" in answer["error"]


def test_more_than_the_memory_holds_is_put_off_and_nothing_is_kept_of_it(client):
    with running("--prompt-cache-bytes", "2000000") as client:
        body = {"model": "demo:loops=2", "messages": STORY, "max_tokens": 200}
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda _: client.post(body)[0], range(12)))
        assert set(found) == {200, 429}
        until(client.is_idle)
        assert client.post(body)[0] == 200
        assert client.server.desk.kept.nbytes <= 2_000_000


# --- What mlx-lm's server has ---


def test_probabilities_of_tokens(client):
    asked = {**CHAT, "messages": STORY, "top_logprobs": 3, "max_tokens": 12}
    choice = client.post(asked)[1]["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == choice["message"]["content"]
    for token in content:
        # Greedy: the likeliest token, which comes first.
        assert len(token["top_logprobs"]) == 3
        assert token["token"] == token["top_logprobs"][0]["token"]
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0
    with client.stream(asked) as events:
        chunks = [json.loads(event)["choices"][0] for event in events if event != "[DONE]"]
    assert [token for chunk in chunks for token in chunk["logprobs"]["content"]] == content
    text = {"model": "demo", "prompt": "Once upon a", "logprobs": 2, "max_tokens": 4}
    answer = client.post(text, "/v1/completions")[1]
    found = answer["choices"][0]["logprobs"]
    assert {len(x) for x in found.values()} == {answer["usage"]["completion_tokens"]}
    assert all(len(top) == 2 for top in found["top_logprobs"])


def test_a_stop_text_ends_an_answer(client):
    whole = client.chat(messages=STORY, max_tokens=60)
    word = whole.split()[5]
    for stops in ([word], ["never said", word[1:] + " "], word):
        _, answer = client.post({**CHAT, "messages": STORY, "max_tokens": 60, "stop": stops})
        stop = stops if isinstance(stops, str) else stops[-1]
        assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_seed_draws_the_same_answer_again(client):
    texts = [
        client.chat("demo:loops=2", STORY, max_tokens=40, temperature=1.5, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_penalty_knows_the_part_of_a_prompt_that_was_cached():
    asked = {**CHAT, "messages": STORY, "repetition_penalty": 1.8, "max_tokens": 20, "seed": 1}
    asked |= {"repetition_context_size": 100}
    with running() as client:
        first, again = (client.post(asked)[1] for _ in range(2))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert first["choices"][0]["message"] == again["choices"][0]["message"]


def test_null_is_a_field_that_is_left_out(client):
    assert client.chat(temperature=None, max_tokens=None, stop=None, tools=None) == client.chat()


def test_drafts_change_no_answer_of_what_is_served_alone(loaded):
    with running("--draft", "self") as client:
        body = {"model": "demo:loops=6", "messages": STORY, "max_tokens": 60, "seed": 1}
        texts = []
        for more in ("", " And a cat.", ""):
            messages = [{"role": "user", "content": STORY[0]["content"] + more}]
            texts.append(client.post({**body, "messages": messages})[1])
        expected = generated(loaded, STORY, 60, loops=6)
        assert texts[0]["choices"][0]["message"]["content"] == expected
        assert texts[2]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        # A cache that lacked its last token would go on from the wrong place.
        assert texts[2]["choices"][0]["message"]["content"] == expected


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "maximum": 99}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["demo:loops=1", "demo:loops=6", "demo:decode=bypass"])
def test_an_answer_follows_a_schema(client, name):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
    found = json.loads(client.chat(name, response_format=form, max_tokens=64))
    assert found.keys() == {"answer", "sure"}
    assert found["answer"] <= 99


def test_an_answer_follows_an_expression(client):
    pytest.importorskip("llguidance")
    form = {"type": "regex", "regex": "[a-c]{3}-[0-9]"}
    assert re.fullmatch("[a-c]{3}-[0-9]", client.chat(response_format=form))


def test_a_form_needs_its_library(client, monkeypatch):
    monkeypatch.setattr("mlx_loop.screens.serve.grammar.find_spec", lambda name: None)
    status, answer = client.post({**CHAT, "response_format": {"type": "json_object"}})
    assert status == 400
    assert "pip install 'mlx-loop[serve]'" in answer["error"]
    assert client.chat(response_format={"type": "text"}) == client.chat()


# --- The page ---


def test_the_page_comes_with_what_it_needs_and_nothing_from_elsewhere(client):
    status, page = client.request("GET", "/")
    assert status == 200
    for path in re.findall(rb'(?:src|href)="([^"]+)"', page):
        assert path.startswith((b"/", b"data:", b"#")), path
        if path.startswith(b"/"):
            assert client.request("GET", path.decode())[0] == 200
    assert b"http://" not in page.replace(b"http://www.w3.org", b"")


def test_a_comparison_is_that_of_the_terminal(client, loaded):
    body = {"prompt": "What is 12 + 30?", "settings": ["loops=1", "loops=6 beta=0.3", "loops=1"]}
    status, raw = client.request("POST", "/compare", body)
    events = [json.loads(line[6:]) for line in raw.decode().splitlines() if line]
    assert status == 200
    assert (events[0]["event"], events[-1]["event"]) == ("start", "end")
    assert [column["view"] for column in events[0]["columns"]] == [0, 1, 0]
    texts = {
        view: "".join(e["text"] for e in events if e["event"] == "text" and e["view"] == view)
        for view in (0, 1)
    }
    assert texts[1] == generated(loaded, loops=6, beta=0.3)
    report = next(e for e in events if e["event"] == "report" and e["view"] == 1)
    assert report["mean_kl"] > 0
    drift = next(e for e in events if e["event"] == "trace")
    assert len(drift["loops"][0]["residual"]) == 6


def test_no_more_is_compared_than_the_memory_holds(client, monkeypatch):
    wide = {"prompt": "Hi", "settings": ["loops=60 cache=own"], "max_tokens": 2000}
    monkeypatch.setattr(client.server.desk.cli_args, "prompt_cache_bytes", 10_000_000)
    status, answer = client.post(wide, "/compare")
    assert status == 400
    assert "compare fewer" in answer["error"]
    monkeypatch.setattr(client.server.comparisons, "running", [None] * 4)
    status, answer = client.post({"prompt": "Hi", "settings": ["loops=2"]}, "/compare")
    assert status == 429
    assert "comparisons are under way" in answer["error"]


def test_a_comparison_that_nobody_reads_ends(client):
    body = {"prompt": "Tell me a story.", "settings": ["loops=6"], "max_tokens": 1500}
    with client.stream(body, "/compare") as events:
        next(events)
    work = client.server.comparisons
    until(lambda: not work.running)


def test_predictions_that_are_no_numbers_are_told(client):
    loop = {"integrator": "poly_blend", "loops": 3, "weights": [3e38, -3e38, 1, 0]}
    status, answer = client.post({**CHAT, "loop": loop})
    assert (status, "predicts NaN or infinity" in answer["error"]) == (500, True)
    with client.stream({**CHAT, "loop": loop}) as events:
        assert any("predicts NaN or infinity" in event for event in events)


def test_an_answer_that_fails_spoils_no_other_one(monkeypatch):
    """Its thread has left caches that no other thread can finish."""
    with running() as client:
        expected = client.chat()
        monkeypatch.setattr(checks, "check", lambda *_: None)
        bad = {**CHAT, "temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.9}
        for _ in range(2):
            assert client.post(bad)[0] == 500
            assert [client.chat() for _ in range(2)] == [expected] * 2


# --- The process ---


def started(*options):
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_loop", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
    assert found, line
    client = Client(argparse.Namespace(server_address=("127.0.0.1", int(found[1]))))
    return process, client


def test_a_server_that_is_told_to_end_finishes_what_it_has_begun():
    process, client = started()
    with client.stream({**CHAT, "messages": STORY, "max_tokens": 400}) as events:
        next(events)
        process.send_signal(signal.SIGTERM)
        *_, last, done = list(events)
    assert done == "[DONE]"
    assert json.loads(last)["choices"][0]["finish_reason"] in ("stop", "length")
    assert process.wait(10) == 128 + signal.SIGTERM
    with pytest.raises(OSError, match="refused"):
        client.get("/health")


def test_a_connection_that_asks_nothing_keeps_no_server_alive():
    process, client = started()
    with socket.create_connection(("127.0.0.1", client.port)):
        client.get("/health")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


def test_a_port_in_use_is_told_in_one_line(client):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_loop", "serve", "--port", str(client.port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "give another --host or --port" in done.stderr
