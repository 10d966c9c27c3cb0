"""The command line: what works, and one clear line with exit status 2 for what cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from tries import Try, shared

from mlx_loop.checkpoints.loading import DEMOS
from mlx_loop.screens.cli import COMMANDS, build_parser, main

GOLDEN = Path(__file__).parent / "data" / "golden" / "models"
PROMPT = ["--prompt", "What is 12 + 30?"]


def run(*args, stdin="", status=0):
    """Run `mlx_loop` as a process of its own."""
    if sys.platform == "darwin":  # Metal does not survive a fork.
        words = [sys.executable, "-m", "mlx_loop.screens.cli", *map(str, args)]
        found = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=120)
        done = Try(words, found.returncode, found.stdout, found.stderr)
    else:
        done = shared()(*args, stdin=stdin.encode(), cwd=Path.cwd(), limit=120)
    assert done.status == status, done.err
    assert "Traceback" not in done.err
    return done


def error(*args, stdin="", status=2):
    """The single line that a failing command prints."""
    done = run(*args, stdin=stdin, status=status)
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    return done.err


@pytest.fixture
def broken(tmp_path):
    """A checkpoint whose weights end too early."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMOS["demo"] / name).read_bytes())
    weights = (DEMOS["demo"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100_000])
    return tmp_path


def test_a_prompt_is_answered_on_standard_output_and_numbers_go_elsewhere():
    done = run("generate", *PROMPT)
    assert "42" in done.out
    assert "tokens/s" in done.err
    assert "anchored" in done.err


def test_an_answer_ends_at_an_extra_token_and_a_penalty_changes_it():
    story = ["--prompt", "Tell me a story.", "--max-tokens", 60]
    whole = run("generate", *story).out.strip()
    assert whole.startswith("Once upon a time")
    ended = run("generate", *story, "--extra-eos-token", "Ġtime", "5").out.strip()
    assert ended == "Once upon a"
    assert run("generate", *story, "--repetition-penalty", 3).out.strip() != whole


def test_what_cannot_end_or_steer_an_answer_is_told():
    said = error("generate", *PROMPT, "--extra-eos-token", "no such token")
    assert "'no such token' is no token of this model" in said
    said = error("generate", *PROMPT, "--repetition-penalty", 2, "--draft", "self")
    assert "does not work with --draft" in said


def test_a_prompt_may_come_from_standard_input():
    assert run("generate", stdin="What is 12 + 30?").out == run("generate", *PROMPT).out
    assert run("generate", "-p", "-", stdin="What is 12 + 30?").out
    assert run("generate", stdin="\ufeffWhat is 12 + 30?").out == run("generate", *PROMPT).out


def test_json_holds_the_answer_its_cost_and_the_whole_configuration():
    report = json.loads(run("generate", *PROMPT, "--json", "--loops", 6, "--window", "3:7").out)
    assert "42" in report["text"]
    assert report["loop"]["loops"] == 6
    assert report["loop"]["window"] == [3, 7]
    assert report["layer_passes"] == report["layers"] + 5 * 4
    assert report["finish_reason"] == "stop"
    assert report["generation_tokens"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ["--loops", "1"],
        ["--integrator", "rk4", "--loops", "2"],
        ["--integrator", "ema", "--alpha", "0.5,0.25", "--loops", "2"],
        ["--integrator", "poly_blend", "--loops", "2", "--weights", "0.2,0.3,0.5"],
        ["--integrator", "aitken"],
        ["--window", "0.4:0.6", "--scope", "layer", "--norm", "interpolated"],
        ["--cache", "own", "--decode", "bypass"],
        ["--cache", "last", "--decode", "3"],
        ["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"],
        ["--max-kv-size", "64"],
        ["--temp", "0.7", "--top-p", "0.9", "--seed", "1"],
        ["--draft", "self"],
        ["--draft", "lookup", "--temp", "0.7"],
        ["--draft", "demo", "--cache", "own"],
    ],
)
def test_options(options, capsys):
    assert main(["generate", *PROMPT, *options, "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()


def test_without_the_chat_template_the_prompt_is_taken_literally(capsys):
    main(["generate", "-p", "hello", "--max-tokens", "8"])
    templated = capsys.readouterr().out
    literal = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    main(["generate", "-p", literal, "--ignore-chat-template", "--max-tokens", "8"])
    assert capsys.readouterr().out == templated


def test_a_seed_makes_sampling_repeatable(capsys):
    texts = []
    for _ in range(2):
        main(["generate", "-p", "Tell me a story.", "--temp", "1.5", "--seed", "7"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "./nowhere"], "no folder"),
        (["--model", "nobody/no-such-model"], "Hugging Face hub"),
        (["--model", str(GOLDEN / "qwen3")], "tokenizer"),
        (["--window", "30:40"], "12 layers"),
        (["--window", "4"], "start:stop"),
        (["--loops", "0"], "from 1 up"),
        (["--loops", "many"], "whole number"),
        (["--integrator", "rk5"], "rk4"),
        (["--beta", "3"], "from -1 to 2"),
        (["--cache", "all"], "own"),
        (["--decode", "some"], "bypass"),
        (["--integrator", "aitken", "--loops", "3"], "even"),
        (["--max-kv-size", "8"], "--max-kv-size"),
        (["--max-kv-size", "64", "--kv-bits", "8"], "rotating"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--temp", "-1"], "--temp"),
        (["--top-p", "1.5"], "--top-p"),
        (["--chat-template-config", "{"], "JSON"),
        (["--prompt-cache-file", "./none.safetensors"], "cache_prompt"),
        (["--adapter-path", "./none"], "none"),
        (["--draft", "self", "--cache", "last"], "cache='last'"),
        (["--draft", "./nowhere"], "no folder"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert words in error("generate", *PROMPT, *options)


def test_truncated_weights_are_one_line_and_status_2(broken):
    assert "incomplete" in error("generate", *PROMPT, "--model", broken)


def test_an_unknown_model_type_is_named(broken):
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "qwen33"}
    (broken / "config.json").write_text(json.dumps(config))
    message = error("generate", *PROMPT, "--model", broken)
    assert all(name in message for name in ("'qwen33'", "qwen3", "qwen2"))


def test_an_empty_prompt_and_no_command_are_errors():
    assert "prompt is empty" in error("generate", stdin="  \n")
    assert "COMMAND" in error()


def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        page = capsys.readouterr().out
        assert f"mlx_loop {command}" in page
        assert "?." not in page


def test_the_sentences_of_a_help_page_fit_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        # Commands are one line, to be copied.
        typed = re.compile(r"\s*(mlx_loop|curl|-d) ")
        assert [line for line in lines if len(line) > 80 and not typed.match(line)] == []


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("mlx_loop ")


def test_a_prompt_cache_file_goes_on_where_it_ended(tmp_path):
    file = tmp_path / "cache.safetensors"
    done = run(
        "cache_prompt", "--prompt", "What is 12", "--prompt-cache-file", file, "--cache", "own"
    )
    assert "tokens" in done.err
    whole = run("generate", "--prompt", "What is 12 + 30?", "--cache", "own").out
    more = ["generate", "--prompt", " + 30?", "--prompt-cache-file", file]
    assert run(*more, "--cache", "own").out == whole
    assert "cache own, now first" in error(*more)


def test_an_answer_goes_on_from_its_first_words(tmp_path):
    words = ["generate", "--prompt", "Tell me a story.", "--max-tokens", 9, "--cache", "own"]
    whole = run(*words).out
    assert whole.startswith("Once upon a time there")
    goes_on = [*words, "--prefill-response", "Once upon a"]
    assert run(*goes_on).out.startswith("time there")
    file = tmp_path / "cache.safetensors"
    run("cache_prompt", "--prompt", "Tell me", "--prompt-cache-file", file, "--cache", "own")
    goes_on[2] = " a story."
    assert run(*goes_on, "--prompt-cache-file", file).out.startswith("time there")
    assert "is empty" in error(*words, "--prefill-response", " ")


@pytest.mark.parametrize("words", ["chat --lops 3", "generate -p x --top-p 0.5 --integrator eulr"])
def test_an_error_wraps_at_words_on_a_terminal(words):
    said = error(*words.split())
    command = f"{sys.executable} -m mlx_loop.screens.cli {words}"
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    shown = pexpect.run(command, dimensions=(24, 60), encoding="utf-8", env=env)
    assert shown.split() == said.split()
    assert max(map(len, shown.splitlines())) <= 60


def test_a_pipe_that_closes_early_is_no_error():
    command = f"{sys.executable} -m mlx_loop.screens.cli generate -p 'Tell me a story.' | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True
    )
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("chat --lops 3", "mlx_loop chat: error: unknown --lops, did you mean --loops? (see mlx_l"),
        ("chat --lops=3", "unknown --lops, did you mean --loops? (see mlx_loop chat --help)"),
        ("sweep --tsk demo", "unknown --tsk, did you mean --task? (see mlx_loop sweep --help)"),
        ("plan demo --zzz", "mlx_loop plan: error: unknown --zzz (see mlx_loop plan --help)"),
        ("chta", "mlx_loop: error: unknown command chta, did you mean chat? (see mlx_loop --help)"),
        ("xyzzy --loops 3", "mlx_loop: error: unknown command xyzzy (see mlx_loop --help)"),
        ("--versoin", "mlx_loop: error: unknown --versoin, did you mean --version?"),
        ("plan demo more", "unexpected more (see mlx_loop plan --help)"),
        ("plan --model demo", "unknown --model: give MODEL without it (see mlx_loop plan --help)"),
        ("chat demo", "unexpected demo: put --model before it (see mlx_loop chat --help)"),
        ("trace hi", "unexpected hi: put --model or --prompt before it (see mlx_loop trace --hel"),
    ],
)
def test_what_is_misspelt_is_told_with_what_was_meant_and_its_help_page(typed, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(typed.split())
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_an_option_may_be_shortened_and_its_value_look_like_one(capsys):
    assert main(["generate", "-p", "hi", "--max-tok", "2", "--system-prompt=--lops"]) == 0
    assert capsys.readouterr().out.strip()


def test_the_shell_completes_commands_and_options():
    """docs/commands.md says how."""
    shtab = pytest.importorskip("shtab", reason="pip install shtab")
    script = shtab.complete(build_parser(), shell="bash")
    asked = """
    COMP_WORDS=(mlx_loop ch) COMP_CWORD=1; _shtab_mlx_loop mlx_loop ch; echo "${COMPREPLY[@]}"
    COMP_WORDS=(mlx_loop chat --lo) COMP_CWORD=2; _shtab_mlx_loop mlx_loop --lo
    echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script + asked], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["chat", "--loops --loop-prompt"]
