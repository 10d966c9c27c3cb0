"""An answer's Markdown and thoughts, rendered on a terminal while they come.

What is finished, a paragraph, an item of a list, a block of code, is printed for good. Only what
may still change is drawn again, at the bottom, so an answer may be longer than the screen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import dropwhile
from types import TracebackType
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import ControlType, Segment
from rich.styled import Styled
from rich.syntax import Syntax
from rich.text import Text

from ..foreign import visible
from .terminal import NowAndThen


def _product(state: StateInline, silent: bool) -> bool:
    """Stars inside a word are no emphasis: `3*4*5`."""
    stars = _STARS.match(state.src, state.pos)
    if stars is None or not _WORD.match(state.src[state.pos - 1 : state.pos]):
        return False
    if not silent:
        state.pending += stars[0]
    state.pos = stars.end()
    return True


_STARS, _WORD = re.compile(r"\*+(?=[0-9A-Za-z])"), re.compile("[0-9A-Za-z]")

# Nothing that a model says may vanish, as tags, pictures, references and backslashes would; its
# lines end where it ends them.
PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["image", "autolink", "reference", "newline", "escape"])
)
PARSER.inline.ruler.before("emphasis", "product", _product)


class Rendering:
    """The place on a terminal where an answer is shown, piece by piece.

    Args:
        console: the terminal.
        marks: what begins thoughts and what ends them; None: nothing does.
        thinking: whether the answer begins in the middle of thoughts.
    """

    def __init__(
        self, console: Console, marks: tuple[str, str] | None = None, thinking: bool = False
    ):
        self._console, self._marks, self._thinking = console, marks, thinking
        # What is not printed for good, and whether an empty line is due before it.
        self._open, self._gap = "", False
        self._titled = False
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = _End("")
        self._now_and_then = NowAndThen()

    def __enter__(self) -> Rendering:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._update(_End(""))
        self._live.stop()
        self._print(self._open)

    def show(self, piece: str) -> None:
        """Add a piece of the answer."""
        self._open += visible(piece)
        while self._marks and self._marks[self._thinking] in self._open:
            before, _, self._open = self._open.partition(self._marks[self._thinking])
            self._print(before)
            if self._titled:
                self._console.print(Text("...done thinking.", "dim italic"))
            self._thinking, self._titled = not self._thinking, False
        self._now_and_then(self._draw)

    def _draw(self) -> None:
        if not self._live.is_started:
            self._live.start()
        lines = self._open.split("\n")
        last, is_item = _last_part(PARSER.parse(self._open))
        with self._console:  # One write.
            self._print("\n".join(lines[:last]))
            self._gap = self._gap and not is_item
            self._open = "\n".join(lines[last:])
            self._update(_End(self._page(self._open)))

    def _update(self, end: _End) -> None:
        """Draw what may still change in the place of what was drawn."""
        # A terminal that became narrower has wrapped that, into more lines than `Live` erases.
        more = sum(max(width - 1, 0) // self._console.width for width in self._drawn.widths)
        line = (ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)
        self._console.control(Control(ControlType.CARRIAGE_RETURN, *line * more))
        self._drawn = end
        self._live.update(end, refresh=True)

    def _print(self, text: str) -> None:
        if text.strip():
            # What is printed is no longer open.
            self._update(_End(""))
            self._console.print(self._page(text))
            self._gap, self._titled = True, self._thinking

    def _page(self, text: str) -> RenderableType:
        page = _Page(text)
        parts: list[RenderableType] = [""] if self._gap else []
        if not self._thinking:
            return Group(*parts, page)
        title = [] if self._titled else [Text("Thinking...", "dim italic")]
        return Group(*parts, *title, Styled(page, "dim"))


def _last_part(tokens: Sequence[Token]) -> tuple[int, bool]:
    """The line where what may still change begins, and whether it goes on a list.

    It is the last block, or of a list the last item.
    """
    maps = {(token.level, token.type): token.map[0] for token in tokens if token.map}
    block = max((line for (level, _), line in maps.items() if level == 0), default=0)
    item = maps.get((1, "list_item_open"), 0)
    return max(block, item), item > block


class _End:
    """As much of the end of a page as the screen has room for.

    Attributes:
        widths: of the lines that were drawn.
    """

    def __init__(self, page: RenderableType):
        self._page, self.widths = page, list[int]()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._page, options.update(height=None), pad=False)
        lines = lines[1 - max(options.size.height, 2) :]
        self.widths = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()


class _Code(CodeBlock):
    """Code that can be copied from the screen: no margin, and the terminal's own background."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        syntax = Syntax(
            code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True
        )
        yield syntax.highlight(code)


class _Title(Heading):
    LEVEL_ALIGN: ClassVar = {}  # None is in the middle.


class _Page(Markdown):
    """Markdown that hides no address in a link."""

    elements: ClassVar = {
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Title,
    }

    def __init__(self, text: str):
        super().__init__("", justify="default", hyperlinks=False)
        self.parsed = PARSER.parse(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Before a list rich puts an empty line, even at the top.
        segments = super().__rich_console__(console, options)
        yield from dropwhile(lambda segment: segment == Segment.line(), segments)
