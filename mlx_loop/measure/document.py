"""A document of blocks: as Markdown, and as one HTML file that opens anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..foreign import in_markdown, visible


@dataclass(frozen=True)
class Paragraph:
    text: str
    heading: int = 0


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    path: Path
    dark: Path
    title: str


Block = Paragraph | Table | Picture


def markdown(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown; pictures are beside it."""
    out = []
    for block in blocks:
        if isinstance(block, Paragraph):
            out.append(f"{'#' * block.heading} {in_markdown(block.text)}".strip())
        elif isinstance(block, Picture):
            out.append(f"![{block.title}]({block.path.name})")
        else:
            lines = [block.header, ["---"] * len(block.header), *block.rows]
            rows = (" | ".join(map(_cell, line)) for line in lines)
            out.append("\n".join(f"| {row} |" for row in rows))
    return "\n\n".join(out) + "\n"


def _cell(text: str) -> str:
    return in_markdown(" ".join(text.split()))


STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """Blocks as one HTML file; pictures are inside it."""
    body = []
    for block in blocks:
        if isinstance(block, Paragraph):
            tag = f"h{block.heading}" if block.heading else "p"
            body.append(f"<{tag}>{_html(block.text)}</{tag}>")
        elif isinstance(block, Picture):
            body.append(
                f'<picture><source srcset="{_inline(block.dark)}" '
                f'media="(prefers-color-scheme: dark)"><img src="{_inline(block.path)}" '
                f'alt="{_html(block.title)}"></picture>'
            )
        else:
            head = "".join(f"<th>{_html(cell)}</th>" for cell in block.header)
            lines = [
                "<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in row) + "</tr>"
                for row in block.rows
            ]
            body.append(f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{_html(title)}'
        f"</title>\n<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _html(text: str) -> str:
    return html.escape(visible(text))


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
