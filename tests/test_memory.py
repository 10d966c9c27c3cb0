"""The plan's numbers are those that MLX then allocates."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import make
from huggingface_hub import constants
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.checkpoints import memory
from mlx_loop.checkpoints.loading import DEMOS, open_checkpoint
from mlx_loop.checkpoints.memory import GIB, Footprint, usable, weights_bytes
from mlx_loop.checkpoints.quantise import Quantization, choose, parameters
from mlx_loop.method.cache import leaves
from mlx_loop.screens import plan_tables
from mlx_loop.screens.cli import main

LOOPS = [None, LoopConfig(loops=3), LoopConfig(loops=3, cache="own")]


def prefill(model, length, step, **settings):
    """Feed a prompt. Returns the cache and MLX's peak, less what was there besides the model."""
    mx.eval(model.parameters())
    elsewhere = mx.get_active_memory() - sum(a.nbytes for a in parameters(model).values())
    cache = model.new_cache()
    mx.reset_peak_memory()
    view = model.for_prompt(cache, length)
    steps = generate_step(
        mx.zeros((length,), mx.int32),
        view,
        max_tokens=0,
        prompt_cache=cache,
        prefill_step_size=step,
        **settings,
    )
    list(steps)
    mx.synchronize()
    return cache, mx.get_peak_memory() - elsewhere


@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.parametrize("loop", LOOPS)
def test_weights_and_caches_are_exact_and_peaks_within_a_tenth(name, loop):
    model = mlx_loop.load_model(name, loop=loop)
    check(model, Footprint(model), 601)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "deepseek_v2"])
def test_so_they_are_for_other_families(name):
    model = make(name).with_loop(LoopConfig(loops=3))
    check(model, Footprint(model), 601)


def check(model, footprint, length, step=256):
    cache, peak = prefill(model, length, step)
    assert footprint.weights == sum(array.nbytes for array in parameters(model).values())
    assert footprint.cache(length) == sum(entry.nbytes for entry in cache)
    assert footprint.peak(length, step) == pytest.approx(peak, rel=0.10)


@pytest.mark.parametrize("policy", ["first", "last", "own"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_caches_are_exact_under_every_policy(model, policy, bits):
    looped = model.with_loop(LoopConfig(loops=3, cache=policy))
    cache, _ = prefill(looped, 300, 64, kv_bits=bits, kv_group_size=32, quantized_kv_start=0)
    found = sum(entry.nbytes for entry in cache)
    assert not any(isinstance(leaf, KVCache) for leaf in leaves(cache))
    assert Footprint(looped).cache(300, bits, 32) == found


def test_sliding_layers_keep_their_window_only():
    model = make("sliding_llama")
    footprint = Footprint(model)
    cache, _ = prefill(model, 300, 64)
    assert footprint.cache(300) == sum(entry.nbytes for entry in cache)


def test_weights_of_a_recipe_are_those_of_the_quantised_model():
    for name in DEMOS:
        model = open_checkpoint(DEMOS[name])
        planned = weights_bytes(model, choose(model, Quantization(3, recipe="window8")))
        loaded = mlx_loop.load_model(
            name, quantize=Quantization(3, recipe="window8"), dtype="bfloat16"
        )
        # The bias of a router's choice is stored in float32, and `dtype` is for everything.
        assert planned == pytest.approx(weights_bytes(loaded), rel=1e-4)


def test_a_plan_reads_no_weight(tmp_path):
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = open_checkpoint(DEMOS["demo-moe"])
    Footprint(model, choose(model, Quantization(4))).longest(8 * GIB)
    assert mx.get_peak_memory() - before < 0.05 * weights_bytes(model)


def test_the_longest_context_is_the_longest_that_fits(model):
    footprint = Footprint(model.with_loop(LoopConfig(loops=3)))
    limit = footprint.peak(3000)
    longest = footprint.longest(limit)
    assert footprint.peak(longest) <= limit < footprint.peak(longest + memory.CACHE_STEP)
    assert footprint.longest(footprint.weights) == 0


def test_a_token_reads_looped_layers_once_per_loop_and_only_its_experts():
    dense = open_checkpoint(DEMOS["demo"], LoopConfig(loops=3, window=(4, 8)))
    looped, plain = Footprint(dense), Footprint(dense.with_loop(None))
    layer = sum(a.nbytes for n, a in parameters(dense).items() if "layers.5." in n)
    assert looped.read_per_token(1) - plain.read_per_token(1) == 2 * 4 * layer
    moe = open_checkpoint(DEMOS["demo-moe"], None)
    experts = sum(a.nbytes for n, a in parameters(moe).items() if "switch_mlp" in n)
    footprint = Footprint(moe)
    # 2 of 8 experts.
    expected = footprint.weights - experts * 6 / 8 + footprint.cache(1)
    assert footprint.read_per_token(1) == pytest.approx(expected, abs=len(moe.layers))


def test_load_refuses_before_it_reads_what_cannot_fit(monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: 4_000_000)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(UserError, match=r"mlx_loop plan .*--force"):
        mlx_loop.load("demo")
    assert mx.get_peak_memory() - before < 1_000_000
    assert mlx_loop.load("demo", force=True)
    assert mlx_loop.load("demo", lazy=True)


def test_macs_keep_some_memory_for_themselves():
    assert usable(16 * GIB) == pytest.approx(10.67 * GIB, rel=1e-3)
    assert usable(64 * GIB) == 48 * GIB


@pytest.mark.parametrize("name", DEMOS)
def test_plan_prints_its_tables(name, capsys):
    assert main(["plan", name, "--ram", "8", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("8 bits", "own", "512 GB", "M5 Pro", "wired_limit_mb"))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (1 << 40, "Fits on 8 GB: as stored"),
        (21_500_000, "Fits on 8 GB: 4 bits"),
        (1_000_000, "Does not fit on 8 GB"),
    ],
)
def test_plan_answers_first(limit, words, monkeypatch, capsys):
    monkeypatch.setattr(plan_tables, "usable", lambda ram: limit if ram == 8 * GIB else 1 << 40)
    assert main(["plan", "demo", "--ram", "8"]) == 0
    name, answer, macs, *rest = capsys.readouterr().out.splitlines()
    assert name.startswith("demo: ")
    assert answer.startswith(words)
    assert f"as stored from {16 if limit < 1 << 40 else 8} GB" in macs
    assert len(rest) == 1


def test_a_model_in_the_cache_is_planned_without_the_hub(tmp_path, monkeypatch, capsys):
    repo = tmp_path / "models--someone--cached"
    shutil.copytree(DEMOS["demo"], repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # Nobody listens there.
    assert main(["plan", "someone/cached"]) == 0
    assert "Fits" in capsys.readouterr().out


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's interface to serve one folder, and to count the bytes it gives."""

    folder: Path
    sent = 0

    def log_message(self, *args):
        pass

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command != "HEAD":
            type(self).sent += len(body)
            self.wfile.write(body)

    def do_GET(self):
        file = self.folder / self.path.split("?")[0].rpartition("/")[2]
        if "/api/models/" in self.path and (self.folder / "config.json").exists():
            self.answer(b'{"id": "someone/model"}')
            return
        if "/resolve/" not in self.path or not file.is_file():
            self.answer(b"", 404)
            return
        body = file.read_bytes()
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            self.answer(body[int(first) : int(last) + 1], 206)
        else:
            self.answer(body)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """Serves `hub.folder`; `hub.run` runs a program that takes it for the Hugging Face hub."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}

    def run(*command):
        return subprocess.run(
            [sys.executable, "-m", "mlx_loop.screens.cli", *command],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )

    Hub.run, Hub.sent = staticmethod(run), 0
    yield Hub
    server.shutdown()


def test_a_model_on_the_hub_is_planned_from_its_headers(hub):
    hub.folder = DEMOS["demo-mla"]
    remote = hub.run("plan", "someone/model", "--ram", "24", "--verbose")
    assert remote.returncode == 0, remote.stderr
    local = hub.run("plan", "demo-mla", "--ram", "24", "--verbose")
    # All but the line with the name.
    assert remote.stdout.partition("Fits")[2] == local.stdout.partition("Fits")[2] != ""
    assert hub.sent < 0.1 * (hub.folder / "model.safetensors").stat().st_size


def test_what_the_hub_does_not_have_is_one_line(hub, tmp_path):
    hub.folder = tmp_path
    done = hub.run("plan", "nobody/nothing")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "nobody/nothing" in done.stderr
