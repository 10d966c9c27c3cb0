"""A session of `mlx_loop compare` for people to read, share and search."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ..measure.document import Block, Paragraph, Table
from ..measure.names import names
from ..measure.provenance import runs_table, settings_table
from ..settings import LoopConfig
from .board import MARK


def blocks(reports: Sequence[dict[str, Any]]) -> list[Block]:
    """The answers to each prompt side by side, the settings in full, and where they come from.

    Args:
        reports: as `Compare.reports` holds them.
    """
    found: list[Block] = []
    for number, report in enumerate(reports, 1):
        answers = report["answers"]
        loops = [a["loop"] and LoopConfig.from_dict(a["loop"]) for a in answers]
        titles = names(loops, brief=True)
        how = [f"at most {report['max_tokens']} tokens", f"temperature {report['temp']:g}"]
        how += [f"{name} {report[name]}" for name in ("seed", "draft") if report[name] is not None]
        how += ["stopped"] * report["stopped"]
        texts = [_marked(answer["text"], answers[0]["text"]) for answer in answers]
        rows = [["answer", *texts], ["numbers", *("\n".join(a["notes"]) for a in answers)]]
        found += [
            Paragraph(f"{report['model']}, prompt {number}", 1),
            Paragraph(report["prompt"]),
            Paragraph(", ".join(how)),
            Table(["", *titles], rows, left=titles, search=True),
            settings_table(titles, loops),
            runs_table([report["made"]]),
        ]
    return found


def _marked(text: str, base: str) -> str:
    """A text with the place marked from where it is not the un-looped answer's."""
    if text == base:
        return text
    same = sum(
        1 for _ in takewhile(lambda pair: len(set(pair)) == 1, zip(text, base, strict=False))
    )
    return text[:same] + MARK + text[same:]
