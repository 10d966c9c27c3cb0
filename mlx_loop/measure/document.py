"""A document of blocks: as text, as Markdown, and as one HTML file that opens anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..foreign import in_markdown, lines, visible


@dataclass(frozen=True)
class Paragraph:
    text: str
    heading: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Args:
        left: columns of words, besides the first one.
        search: whether a page has a field that finds rows in it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    search: bool = False


@dataclass(frozen=True)
class Picture:
    path: Path
    dark: Path
    title: str


Block = Paragraph | Table | Picture


def text(blocks: Sequence[Block]) -> str:
    """Blocks for a terminal, less their pictures."""
    out = []
    for block in blocks:
        if isinstance(block, Paragraph):
            out.append(block.text)
        elif isinstance(block, Table):
            out += _aligned(block)
    return "\n".join(out)


def _aligned(table: Table) -> list[str]:
    columns = []
    for number, column in enumerate(zip(table.header, *table.rows, strict=True)):
        width = max(map(len, column))
        left = number == 0 or column[0] in table.left
        columns.append([cell.ljust(width) if left else cell.rjust(width) for cell in column])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def markdown(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown; pictures are beside it."""
    out = []
    for block in blocks:
        if isinstance(block, Paragraph):
            out.append(f"{'#' * block.heading} {in_markdown(block.text)}".strip())
        elif isinstance(block, Picture):
            out.append(f"![{block.title}]({block.path.name})")
        else:
            all_rows = [block.header, ["---"] * len(block.header), *block.rows]
            rows = (" | ".join(map(_cell, row)) for row in all_rows)
            out.append("\n".join(f"| {row} |" for row in rows))
    return "\n\n".join(out) + "\n"


def _cell(text: str) -> str:
    return "<br>".join(in_markdown(line) for line in lines(text.strip()) or [""])


STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img, input { max-width: 100% }
p { white-space: pre-line; overflow-wrap: anywhere }
"""
# Rows without the words in the field before a table are hidden.
SEARCH = """
for (const field of document.querySelectorAll("input[type=search]")) field.oninput = () => {
  for (const row of [...field.nextElementSibling.rows].slice(1))
    row.hidden = !row.textContent.toLowerCase().includes(field.value.toLowerCase())
}
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """Blocks as one HTML file; pictures are inside it."""
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{_html(title)}</title>\n'
        f"<style>{STYLE}</style>\n{body(blocks)}\n<script>{SEARCH}</script>\n</html>\n"
    )


def body(blocks: Sequence[Block]) -> str:
    """Blocks as HTML for a page; pictures are inside it."""
    parts = []
    for block in blocks:
        if isinstance(block, Paragraph):
            tag = f"h{block.heading}" if block.heading else "p"
            parts.append(f"<{tag}>{_html(block.text)}</{tag}>")
        elif isinstance(block, Picture):
            parts.append(
                f'<picture><source srcset="{_inline(block.dark)}" '
                f'media="(prefers-color-scheme: dark)"><img src="{_inline(block.path)}" '
                f'alt="{_html(block.title)}"></picture>'
            )
        else:
            if block.search:
                parts.append('<input type="search" placeholder="search">')
            lines = [_row("th", block.header, block), *(_row("td", r, block) for r in block.rows)]
            parts.append("<table>" + "\n".join(lines) + "</table>")
    return "\n".join(parts)


def _row(tag: str, cells: Sequence[str], table: Table) -> str:
    shown = []
    for name, text in zip(table.header, cells, strict=True):
        left = ' style="text-align: left; white-space: pre-wrap"' if name in table.left else ""
        shown.append(f"<{tag}{left}>{_html(text)}</{tag}>")
    return f"<tr>{''.join(shown)}</tr>"


def _html(text: str) -> str:
    return html.escape(visible(text))


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
