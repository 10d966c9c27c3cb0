"""Options: each one that a command has is read, and one that would do nothing is refused."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from http.server import ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pytest

from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.screens.cli import COMMANDS, build_parser, main

PROMPT = ["--prompt", "What is 12 + 30?"]
# For each command the words with which it runs, in one run or more.
RUNS = {
    "chat": [""],
    "generate": [
        "-p hello --max-tokens 2 --json",
        "-p hello --max-tokens 2 --prompt-cache-file {cache}",
    ],
    "compare": ["-p hello --max-tokens 2 --loops 2 --json"],
    "serve": ["--port 0"],
    "trace": ["-p hello --loops 2 --json", "-p hello --loops 2"],
    "sweep": ["--task demo --limit 1 --loops 2 --max-tokens 2 --out {out}"],
    "evaluate": ["--tasks niah_single_1 --lengths 208 --limit 1 --loops 2 --out {out}-study"],
    "cache_prompt": ["-p hello --prompt-cache-file {new}"],
    "quantize": ["--bits-per-weight 6 --calibration {text} --mlx-path {out}-model"],
    "bench": ["-p 4 -g 2 -n 1"],
    "plan": [""],
    "models": [""],
    "upload": ["--path {folder} --upload-repo a/b"],
}


class Watched(argparse.Namespace):
    """Options that remember which of them were read; `vars` does not count."""

    def __init__(self, **options):
        super().__init__(**options)
        object.__setattr__(self, "_read", set())

    def __getattribute__(self, name):
        if not name.startswith("_"):
            object.__getattribute__(self, "_read").add(name)
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files and folders that commands are given."""
    folder = tmp_path_factory.mktemp("places")
    cache = folder / "cache.safetensors"
    assert main(["cache_prompt", "-p", "hel", "--prompt-cache-file", str(cache)]) == 0
    (folder / "written").mkdir()
    config = (DEMOS["demo"] / "config.json").read_bytes()
    (folder / "written" / "config.json").write_bytes(config)
    (folder / "text").write_text("What is 12 + 30? It is 42.")
    names = {
        "text": folder / "text",
        "new": folder / "new.safetensors",
        "out": folder / "out",
        "folder": folder / "written",
    }
    return {"cache": cache, **names}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_every_option_that_it_has(command, places, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr("mlx_loop.checkpoints.whole.check_whole", lambda *_: None)
    monkeypatch.setattr("mlx_loop.checkpoints.card.upload", lambda *_: "page")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(places["folder"]))
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda *_, **__: None)
    read, declared = set(), set()
    for words in RUNS[command]:
        args = vars(build_parser().parse_args([command, *words.format(**places).split()]))
        # What nobody reads is found: here is one more.
        watched = Watched(**args, unread=None)
        assert args["run"](watched) == 0
        read |= watched._read
        declared |= args.keys() - {"command", "run"} | {"unread"}
    assert declared - read == {"unread"}


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_flag_of_mlx_lm_is_here_or_the_page_says_why_not(command):
    theirs = import_module(f"mlx_lm.{command}").setup_arg_parser()
    page = (Path(__file__).parents[1] / "docs" / "commands.md").read_text()
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    ours = set(commands[command]._option_string_actions)
    missing = set(theirs._option_string_actions) - ours
    assert {flag for flag in missing if flag.startswith("--") and f"`{flag}" not in page} == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate --alpha 0.3", "alpha does nothing with integrator anchored: give it with"),
        ("generate --beta 0.3 --integrator euler", "beta does nothing with integrator euler"),
        ("chat --momentum 0.3", "heavy_ball"),
        ("compare --integrator euler,rk4 --beta 0.3", "integrator euler or rk4"),
        ("compare --setting integrator=euler,beta=0.3", "integrator 'euler,beta=0.3' is not valid"),
        ("sweep --task demo --alpha 0.3", "ema or heavy_ball or norm_stab or input_anchor"),
        ("evaluate --tasks vt --weights 0.5,0.5", "poly_blend"),
        ("quantize --dry-run --damping 0.5", "anderson"),
        ("plan --memory 2", "anderson"),
        ("generate --top-p 0.9", "--top-p does nothing without --temp"),
        ("chat --temp 0.7 --xtc-threshold 0.2", "without --xtc-probability"),
        ("chat --temp 0.7 --min-tokens-to-keep 2", "without --min-p"),
        ("generate --ignore-chat-template --prefill-response x", "with --ignore-chat-template"),
        ("generate --kv-group-size 32", "without --kv-bits"),
        ("cache_prompt --quantized-kv-start 9 --prompt-cache-file x", "without --kv-bits"),
        ("compare --num-draft-tokens 4", "without --draft"),
        ("trace --ignore-chat-template --system-prompt hi", "with --ignore-chat-template"),
        ("generate --prompt-cache-file x --system-prompt hi", "with --prompt-cache-file"),
        ("generate --prompt-cache-file x --max-kv-size 64", "with --prompt-cache-file"),
        ("sweep --text x --max-tokens 4", "--max-tokens does nothing with --text"),
        ("sweep --text x --gate entropy:1", "--gate does nothing with a text"),
        ("trace -p hi --loop-prompt plain", "--loop-prompt does nothing in a trace"),
        ("compare -p hi --horizon 2 --integrator naive,uniform", "horizon does nothing"),
        ("quantize --calibration x", "without the recipe budget"),
        ("evaluate --tasks lm_eval:x --lengths 99 --filler y", "--filler and --lengths do nothing"),
        ("evaluate --tasks lm_eval:x --no-answer-prefix", "--no-answer-prefix does nothing"),
        ("evaluate --tasks lm_eval:x --documents y", "without one of RULER's tasks"),
        ("evaluate --tasks lm_eval:x,vt --system-prompt hi", "in lm_eval: tasks"),
        ("evaluate --tasks vt --include-path x", "without an lm_eval: task"),
    ],
)
def test_what_would_be_ignored_is_refused(words, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


@pytest.mark.parametrize(
    "options",
    [
        ["--integrator", "euler,anchored", "--beta", "0.3"],
        ["--setting", "integrator=ema alpha=0.3", "--beta", "0.3"],
        ["--temp", "0", "--top-p", "0.9"],
    ],
)
def test_what_some_setting_reads_is_taken(options, capsys):
    assert main(["compare", *PROMPT, "--max-tokens", "2", "--json", *options]) == 0


@pytest.mark.parametrize("line", ["/set alpha 0.3", "/set integrator euler\n/set beta 0.3"])
def test_a_session_refuses_it_too(line, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(line))
    assert main(["chat"]) == 2
    assert "does nothing with integrator" in capsys.readouterr().err


def test_options_are_known_without_what_takes_long_to_import():
    code = (
        "import sys; from mlx_loop.screens.cli import build_parser; build_parser(); "
        "print(sorted({'mlx_lm', 'mlx.core', 'transformers', 'rich', 'numpy', 'prompt_toolkit'} "
        "& set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("[]\n", "")
