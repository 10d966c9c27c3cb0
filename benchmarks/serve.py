"""`mlx_loop serve` under load, on loopback.

    python benchmarks/serve.py load --model demo       against mlx-lm's server, in turn
    python benchmarks/serve.py memory --model demo     of the process, over 1 000 requests
    python benchmarks/serve.py hostile --model demo    1 000 of them beside a stream

`load` runs the same streams on mlx-lm's server and here: all un-looped, all with one setting, and
spread over three. A loop costs passes, so the throughput to be had is that of mlx-lm's server over
the mean number of layer passes (`bound`). Named are the longest wait for a first token and the
longest gap between two tokens of any stream. Tables are Markdown, of medians over the rounds.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.checkpoints.loading import find
from mlx_loop.method.loop import layer_passes

SETTINGS = ("loops=1", "loops=3", "loops=6")
PROMPT = "Tell me a story about a small dog."


@dataclass
class Stream:
    """When the tokens of an answer came, in seconds since it was asked for."""

    times: list[float]

    @property
    def gap(self) -> float:
        return max((b - a for a, b in itertools.pairwise(self.times)), default=0.0)


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], port: int):
        self.port = port
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while True:
            try:
                if self.get("/health") == 200:
                    return
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit(f"it has ended: {' '.join(command)}") from None
            time.sleep(0.1)

    def get(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", path)
        return connection.getresponse().status

    def post(self, body: object, path: str = "/v1/chat/completions") -> tuple[int, bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def stream(self, model: str, number: int, tokens: int) -> Stream:
        """A story of exactly so many tokens: none of them may end it."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"{number}. {PROMPT}"}],
            "max_tokens": tokens,
            "logit_bias": self.bias,
            "stream": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        asked, times = time.perf_counter(), []
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - asked)
        return Stream(times)

    bias: dict[str, float] = {}  # noqa: RUF012

    def resident(self) -> float:
        """Megabytes that the process holds."""
        ps = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        return int(subprocess.run(ps, capture_output=True, text=True, check=True).stdout) / 1024

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def ours(model: str, port: int, *more: str) -> Iterator[Server]:
    server = Server(
        [sys.executable, "-m", "mlx_loop", "serve", "--model", model, "--port", str(port), *more],
        port,
    )
    try:
        yield server
    finally:
        server.close()


@contextmanager
def theirs(model: str, port: int) -> Iterator[Server]:
    path = str(find(model))
    server = Server(
        [sys.executable, "-m", "mlx_lm", "server", "--model", path, "--port", str(port)], port
    )
    try:
        yield server
    finally:
        server.close()


def run(server: Server, names: list[str], tokens: int) -> tuple[float, float, float]:
    """Tokens per second of all streams together, longest first wait and longest gap, seconds."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(names)) as pool:
        jobs = []
        for number, name in enumerate(names):
            jobs.append(pool.submit(server.stream, name, number, tokens))
            time.sleep(0.02)  # mlx-lm's server resets connections that come all at once.
        streams = [job.result() for job in jobs]
    seconds = time.perf_counter() - began
    return (
        len(names) * tokens / seconds,
        max(stream.times[0] for stream in streams),
        max(stream.gap for stream in streams),
    )


def load(args: argparse.Namespace) -> None:
    model, tokenizer = mlx_loop.load(args.model)
    Server.bias = {str(token): -100.0 for token in tokenizer.eos_token_ids}
    layers = len(model.layers)
    costs = [
        layer_passes(model.with_loop(LoopConfig(loops=int(text[6:]))).loop, layers) / layers
        for text in SETTINGS
    ]
    del model
    with theirs(args.model, args.port) as plain, ours(args.model, args.port + 1) as looped:
        spread = list(itertools.islice(itertools.cycle(SETTINGS), args.streams))
        cases = {
            "mlx-lm's server": (plain, ["default_model"] * args.streams, 1.0),
            "un-looped": (looped, ["default_model:loops=1"] * args.streams, 1.0),
            "loops=3": (looped, ["default_model:loops=3"] * args.streams, costs[1]),
            "three settings": (
                looped,
                [f"default_model:{text}" for text in spread],
                statistics.mean(costs[SETTINGS.index(text)] for text in spread),
            ),
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases}
        for _ in range(args.rounds + 1):
            for name, (server, names, _) in cases.items():
                found[name].append(run(server, names, args.tokens))
    print(f"{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds\n")
    print("| | tokens/s | passes | of bound | first token (s) | longest gap (s) |")
    print("|---|---|---|---|---|---|")
    middle = {n: [statistics.median(x) for x in zip(*f[1:], strict=True)] for n, f in found.items()}
    best = middle["mlx-lm's server"][0]
    for name, (_, _, cost) in cases.items():
        speed, first, gap = middle[name]
        share = speed * cost / best
        print(f"| {name} | {speed:.0f} | {cost:.2f} | {share:.2f} | {first:.2f} | {gap:.2f} |")


def memory(args: argparse.Namespace) -> None:
    names = [f"default_model:{text}" for text in (*SETTINGS, "cache=own,loops=2", "decode=2")]
    with ours(args.model, args.port) as server, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> int:
            text = f"What is {number} + {number % 7}?"
            body = {"model": names[number % len(names)], "max_tokens": 8}
            return server.post({**body, "messages": [{"role": "user", "content": text}]})[0]

        print("| requests | MB |\n|---|---|")
        for start in range(0, args.requests, args.requests // 10):
            done = set(pool.map(ask, range(start, start + args.requests // 10)))
            assert done == {200}, done
            print(f"| {start + args.requests // 10} | {server.resident():.0f} |", flush=True)


# What a field may not be, whatever else a request says.
NUMBERS = ["x", [], {}, [1], {"a": 1}, 10**400, 1e300, float("nan"), float("inf"), -1e300]
WRONG = {
    "temperature": [*NUMBERS, -1, -0.1],
    "top_p": [*NUMBERS, 2, -1],
    "min_p": [*NUMBERS, 2, -1],
    "top_k": [*NUMBERS, -1, 10**7, 1.5],
    "max_tokens": [*NUMBERS, 0, -1, 1.5],
    "seed": [*NUMBERS, -1, 2**80, 1.5],
    "repetition_penalty": [*NUMBERS, -1],
    "repetition_context_size": [*NUMBERS, -1, 0.5],
    "presence_penalty": NUMBERS,
    "frequency_penalty": NUMBERS,
    "xtc_probability": [*NUMBERS, 2.0, -1.0],
    "logit_bias": ["x", 1, [1], {"x": 1}, {"-1": 1}, {"99999999": 1}, {"1": "x"}, {"1": None}],
    "top_logprobs": ["x", [], 12, -2, 10**9],
    "logprobs": ["x", [], {}, 99],
    "stop": [1, {}, {"a": 1}, [1], [None], "", [""], ["x"] * 99, "x" * 999, [["x"]]],
    "stream": ["x", 1, [], {}],
    "stream_options": ["x", 1, [1]],
    "n": [2, 0, -1, "x"],
    "model": [1, [], {}, "", "gpt-4", "/etc/passwd", "../demo", "demo-moe"],
    "loop": ["x", 1, [1], {"x": 1}, {"loops": 0}, {"loops": 1e9}, {"window": [9, 3]}],
    "messages": ["x", 1, {}, [], [1], ["x"], [{}], [{"role": 1}], [{"role": "user", "content": 1}]],
    "tools": ["x", 1, {"a": 1}, [1], ["x"]],
    "chat_template_kwargs": ["x", [1], {"tokenize": False}, {"chat_template": "x"}],
    "response_format": ["x", 1, [1], {"type": "x"}, {"type": "json_schema"}],
    "draft_model": ["x", 1],
    "adapters": ["x", 1],
}
SETTINGS_WRONG = [
    "loops=0",
    "loops=x",
    "speed=1",
    "loops",
    "window=9:3",
    "recipe=x",
    "=",
    "loops=999",
]


def hostile_bodies(count: int) -> Iterator[bytes]:
    """Requests none of which is one, the same in each run."""
    draw = random.Random(0)
    good = {"model": "default_model", "messages": [{"role": "user", "content": "Hi"}]}
    whole = json.dumps(good).encode()
    for _ in range(count):
        kind = draw.randrange(6)
        if kind == 0:
            yield whole[: draw.randrange(len(whole))]
        elif kind == 1:
            at = draw.randrange(len(whole))
            yield whole[:at] + bytes([draw.randrange(128, 256)]) + whole[at + 1 :]
        elif kind == 2:
            yield b"[" * draw.randrange(1, 200_000)
        elif kind == 3:
            yield json.dumps(
                {**good, "model": f"default_model:{draw.choice(SETTINGS_WRONG)}"}
            ).encode()
        else:
            field = draw.choice(list(WRONG))
            yield json.dumps({**good, field: draw.choice(WRONG[field])}).encode()


def hostile(args: argparse.Namespace) -> None:
    with ours(args.model, args.port) as server, ThreadPoolExecutor(8) as pool:
        body = {"model": "default_model:loops=3", "max_tokens": 64}
        body |= {"messages": [{"role": "user", "content": PROMPT}]}
        expected = json.loads(server.post(body)[1])["choices"][0]["message"]
        bodies = list(hostile_bodies(args.requests))
        # Each is asked by one of eight, while the others and the good ones are.
        statuses = pool.map(lambda raw: server.post(raw)[0], bodies)
        kept = same = 0
        wrong = []
        for i, (raw, status) in enumerate(zip(bodies, statuses, strict=True)):
            if not 400 <= status < 500:
                wrong.append((status, raw[:200]))
            if i % 50 == 0:
                kept += 1
                same += json.loads(server.post(body)[1])["choices"][0]["message"] == expected
        print(f"{len(bodies) - len(wrong)} of {len(bodies)} refused with 4xx")
        print(f"{same} of {kept} answers asked meanwhile are as before")
        print(f"/health: {server.get('/health')}")
        for status, raw in wrong[:20]:
            print(status, raw)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("what", choices=("load", "memory", "hostile"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1000)
    args = parser.parse_args()
    {"load": load, "memory": memory, "hostile": hostile}[args.what](args)


if __name__ == "__main__":
    main()
