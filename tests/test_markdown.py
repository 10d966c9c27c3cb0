"""Answers on a terminal: what is finished stays, what is not is drawn again, nothing is lost."""

from __future__ import annotations

import io
import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_loop.screens import markdown
from mlx_loop.screens.markdown import Rendering
from mlx_loop.screens.terminal import Screen

ANSWER = """# A title

Some **bold** words and more of them, so many that they do not fit on a line.
Second line.

- one `code`
- two
  - nested
- three

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return x  # comment

f(1)
```

9. nine
10. ten

> quoted

The end."""
WIDTH, HEIGHT = 40, 8
THINK = ("<think>", "</think>")


class Terminal(io.StringIO):
    """What a terminal of that size shows, with what has left it at the top: `lines`.

    Only what is still on the screen can be changed.
    """

    def __init__(self, height=HEIGHT):
        super().__init__()
        self.height, self.lines, self.row, self.raw = height, [""], 0, ""

    def write(self, text):
        self.raw += text
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+|.", text):
            if part == "\n":
                self.row += 1
                self.lines += [""] * (self.row == len(self.lines))
                self.column = 0
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part.startswith("\x1b[") and part.endswith("A"):
                self.row -= int(part[2:-1])
                assert self.row >= max(len(self.lines) - self.height, 0), "above the screen"
            elif not part.startswith("\x1b["):
                assert "\x1b" not in part
                self.lines[self.row] = self.lines[self.row] + part
                assert len(self.lines[self.row]) <= WIDTH
        return len(text)

    def narrow(self, width):
        """Make it so narrow; lines are wrapped, as terminals do it."""
        wrapped = [
            line[i : i + width] for line in self.lines for i in range(0, max(len(line), 1), width)
        ]
        self.row += len(wrapped) - len(self.lines)
        self.lines = wrapped

    def text(self):
        return "\n".join(line.rstrip() for line in self.lines)


def console(file, height=HEIGHT):
    return Screen(file=file, force_terminal=True, width=WIDTH, height=height, _environ={})


def shown(pieces, marks=None, thinking=False, height=HEIGHT):
    """What is on a terminal in the end."""
    file = Terminal(height)
    with Rendering(console(file, height), marks, thinking) as rendering:
        for piece in pieces:
            rendering.show(piece)
    assert file.raw.count("\x1b[?25l") == file.raw.count("\x1b[?25h")
    return file.text()


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Every piece is drawn."""
    monkeypatch.setattr(markdown, "NowAndThen", lambda: lambda draw: draw())


def test_it_ends_as_if_it_had_come_at_once():
    whole = shown([ANSWER])
    assert "\x1b" not in whole
    for size in (1, 3, 7):
        pieces = [ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]
        assert re.sub(" +", " ", shown(pieces)) == re.sub(" +", " ", whole)
    assert "bold words" in whole
    assert " • two\n    • nested\n • three\n" in whole
    assert "\ndef f(x):\n    return x  # comment\n\nf(1)\n" in whole


def test_words_wrap_at_words():
    words = "abcdefgh " * 20
    assert shown(words) == "\n".join(["abcdefgh abcdefgh abcdefgh abcdefgh"] * 5) + "\n"


def test_an_answer_longer_than_the_screen_is_whole_in_the_end():
    code = "\n".join(f"line {i}" for i in range(50))
    said = shown(f"```\n{code}\n```\n" + "a word, " * 99)
    assert code in said
    assert said.count("line 7\n") == 1
    assert said.count("a word,") == 99


@pytest.mark.parametrize("narrower", [30, 17])
def test_a_terminal_that_becomes_narrower_keeps_nothing_twice(narrower):
    file = Terminal(height=24)
    screen = console(file, height=24)
    with Rendering(screen) as rendering:
        for number in range(40):
            rendering.show(f"word{number} ")
            if number == 25:
                file.narrow(narrower)
                screen.width = narrower
    assert file.text().split() == [f"word{n}" for n in range(40)]


MARKS = "#*_`~-+>|[]()!<&;1.9:\\ \n\n"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                ["```", "~~~", "- ", "1. ", "\n\n", "    ", "|-|-|\n", "<think>", "</think>", "\r"]
            ),
            st.text(MARKS + "wé漢\x1b\x9b\u202e", max_size=9),
        ),
        max_size=40,
    ),
    st.integers(2, 9),
)
def test_whatever_is_said_is_shown_and_obeyed_by_nothing(pieces, height):
    said, text = shown(pieces, THINK, height=height), "".join(pieces)
    if not re.search("```|~~~|[|]", text):  # Names of languages and surplus cells are not shown.
        assert said.count("w") == text.count("w")


@pytest.mark.parametrize(
    "text",
    [
        "3*4*5 and 2**3**4 and x*y*z",
        "<b>tag</b> and <!-- comment -->",
        "[name]: http://address.example",
        r"\(a_1 \\ b\) costs \$5",
        "a < b && c > d",
        "Roses are red,\nviolets are blue",
        "<div>\n\nwords\n\n</div>",
    ],
)
def test_nothing_that_is_said_vanishes(text):
    assert shown([text]) == f"{text}\n"


def test_no_address_is_hidden():
    said = shown(["[your bank](http://evil.example) ![x](http://evil.example/p.png)"])
    assert "".join(said.split()) == ("yourbank(http://evil.example)!x(http://evil.example/p.png)")


def test_controls_are_seen():
    file = Terminal()
    with Rendering(console(file)) as rendering:
        rendering.show("a\x1b]8;;http://evil\x07b\n\n`c\x1b[2J`\n\n```\x1b\nd\x9b\u202e\r\n```")
    said = file.text()
    for control in "\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e":
        assert control not in said
        assert control not in file.raw.replace("\x1b[2K", "")
    assert "a\u241b]8;;http://evil\u2407b" in said
    assert "c\u241b[2J" in said


def test_thoughts_are_dim_and_their_end_is_seen():
    file = Terminal()
    with Rendering(console(file), THINK) as rendering:
        for piece in "<think>\nLet me **see**.\n</think>\n\nYes.":
            rendering.show(piece)
    assert file.text() == "Thinking...\nLet me see.\n...done thinking.\n\nYes.\n"
    assert "\x1b[2mLet me" in file.raw
    assert "\x1b[2mYes" not in file.raw


def test_thoughts_may_have_begun_in_the_prompt_and_may_not_end():
    assert shown(["Hm.", "</think>Yes."], THINK, thinking=True) == (
        "Thinking...\nHm.\n...done thinking.\n\nYes.\n"
    )
    assert shown(["Hm."], THINK, thinking=True) == "Thinking...\nHm.\n"


def test_thoughts_of_nothing_are_not_shown():
    assert shown(["<think>\n\n</think>\n\n", "Yes."], THINK) == "Yes.\n"


def test_what_was_shown_stays_when_an_answer_breaks():
    file = Terminal()
    with suppress(KeyboardInterrupt), Rendering(console(file)) as rendering:
        rendering.show("- one\n- two **and")
        raise KeyboardInterrupt
    assert file.text() == " • one\n • two **and\n"
    assert file.raw.endswith("\n")


def test_long_answers_do_not_cost_their_square(monkeypatch):
    monkeypatch.undo()
    file = io.StringIO()
    start = time.perf_counter()
    with Rendering(Screen(file=file, force_terminal=True, width=80, height=24)) as rendering:
        for _ in range(20_000):
            rendering.show("word ")
    assert time.perf_counter() - start < 10
