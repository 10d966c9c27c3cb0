"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mlx_loop.screens import cli

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("mlx_loop ")
]


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code in [block for language, block in BLOCKS if language == "python"]:
        exec(compile(code, "README.md", "exec"), {})
    assert "42" in capsys.readouterr().out


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_has_these_options(line):
    words = shlex.split(line.partition(" < ")[0])[1:]
    assert cli.build_parser().parse_args(words)
