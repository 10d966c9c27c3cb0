"""What others say is read to the letter, shown without effect, and its failures are one line."""

from __future__ import annotations

import io
import itertools
import json
import time

import pytest
from rich.table import Table

from mlx_loop import UserError
from mlx_loop.foreign import (
    check_text,
    foreseen,
    from_json,
    in_markdown,
    lines,
    one_line,
    path_of,
    read_json,
    read_text,
    to_json,
    visible,
)
from mlx_loop.screens.terminal import Screen, busy

CONTROLS = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u2028", "\u2029", "\u202e"]
EVERYTHING = "".join(CONTROLS) + "[bold]<script>|[/x]\ud800é漢"


def test_controls_are_shown_and_words_left_alone():
    shown = visible(EVERYTHING)
    assert [c for c in shown if c in CONTROLS] == ["\t", "\n"]
    assert visible("\x1b[2J\x9b\x7f") == "\u241b[2J\\u009b\u2421"
    assert visible("naïve 漢字 \u1f600\n\tx") == "naïve 漢字 \u1f600\n\tx"


def test_an_error_is_one_line_of_a_readable_length():
    assert one_line("a\n\nb\x1b") == "a b\u241b"
    assert one_line(ValueError()) == "ValueError()"
    assert 300 < len(one_line("a" * 10_000)) < 1000


def test_json_reads_back_the_same_and_holds_no_control():
    text = to_json({"text": EVERYTHING}, indent=1)
    assert not set(text) & (set(CONTROLS) - {"\n"})
    assert json.loads(text)["text"] == EVERYTHING
    assert len(to_json(EVERYTHING).splitlines()) == 1
    assert "漢" in text


def test_lines_end_at_newlines_alone():
    assert lines("a\u2028b\x85c\r\nd\n") == ["a\u2028b\x85c\r", "d"]
    assert lines("a\n\nb") == ["a", "", "b"]
    assert lines("") == []


def test_markdown_opens_no_tag_and_no_cell():
    assert in_markdown("<script>|\x1b") == "&lt;script>\\|\u241b"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "\x00", "9" * 5000])
def test_what_is_not_json_is_one_line(text):
    with pytest.raises(UserError, match="the file is not valid JSON"):
        from_json(text, "the file")


@pytest.mark.parametrize("name", ["", "a\0b", "~nobody-of-this-name/x", "a" * 300, "a/" * 3000])
def test_what_no_file_can_be_called_is_one_line(name):
    with pytest.raises(UserError):
        path_of(name)


def test_text_that_is_not_utf_8_is_one_line(tmp_path):
    (tmp_path / "book").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*utf-8"):
        read_text(tmp_path / "book")
    with pytest.raises(UserError, match="not UTF-8 at character 1"):
        check_text("a\udcff")


def test_whatever_is_raised_is_one_line_and_never_hides_a_line():
    for error in (
        ZeroDivisionError("by\nzero"),
        KeyError("x"),
        RecursionError(),
        OSError(5, "I/O"),
    ):
        with pytest.raises(UserError, match=r"^it failed: [^\n]+$"), foreseen("it failed"):
            raise error
    with pytest.raises(UserError, match=r"^said before$"), foreseen("it failed"):
        raise UserError("said before")
    with pytest.raises(KeyboardInterrupt), foreseen("it failed"):
        raise KeyboardInterrupt


def test_what_has_no_end_is_ended():
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"longer than 0\.1"), foreseen("it failed", 0.1):
        for _ in itertools.count():
            pass
    assert time.perf_counter() - start < 5
    with foreseen("it failed", 0.1):
        pass
    time.sleep(0.2)  # Nothing rings later.


@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_takes_no_text_for_markup_or_controls(terminal):
    for show in (
        lambda screen, text: screen.print(text),
        lambda screen, text: screen.out(text, style="cyan"),
        lambda screen, text: screen.print(_table(text)),
        lambda screen, text: screen.print(text, style="red", soft_wrap=True),
    ):
        screen = Screen(file=io.StringIO(), force_terminal=terminal, width=1000)
        show(screen, "[bold]\x1b]0;title\x07q[4][/x]")
        said = screen.file.getvalue()
        assert "[bold]\u241b]0;title\u2407q[4][/x]" in said
        assert "\x07" not in said
        assert "\x1b]" not in said


def _table(text):
    table = Table()
    table.add_column(text)
    table.add_row(text)
    return table


def test_what_is_loading_may_be_called_anything():
    with busy("loading", "[/x]\x1b q[4]") as status:
        assert str(status.renderable.text) == "loading [/x]\u241b q[4]"


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "notepad.json"
    path.write_bytes(b"\xef\xbb\xbf[1]\n")
    assert read_text(path) == "[1]\n"
    assert read_json(path) == [1]
