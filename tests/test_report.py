"""Reports: what they claim, and that they are whole."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mlx_loop import UserError
from mlx_loop.measure.outcome import conclusion, outcomes, split
from mlx_loop.measure.provenance import machine, provenance
from mlx_loop.measure.report import read, spearman, write
from mlx_loop.measure.results import append
from mlx_loop.measure.study import EXAMPLES, RESULTS, RUNS

BASE = {"window": [4, 8], "integrator": "anchored", "beta": 0.5, "cache": "first"}
BETTER, SAME, WORSE = ({**BASE, "loops": k} for k in (2, 4, 8))


def study(folder, scores, tasks=("vt",), lengths=(512, 1024)):
    """A folder of results: `scores` maps settings as JSON to (rng, number) -> score."""
    rng = random.Random(0)
    problems = [(t, n, i) for n in lengths for t in tasks for i in range(40)]
    lines = [{"model": "a <model>", "tasks": tasks, "lengths": lengths}]
    for loop, draw in scores:
        lines += [
            {"loop": loop, "item": f"{t}/{n}/{i}", "task": t, "length": n, "index": i}
            | {"answer": f"<said> {loop and loop['loops']}", "score": draw(rng, i)}
            for t, n, i in problems
        ]
    (folder / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folder(tmp_path):
    half = (None, lambda rng, i: i % 2)
    return study(
        tmp_path,
        [
            half,
            (BETTER, lambda rng, i: i % 2 or float(rng.random() < 0.6)),
            (SAME, lambda rng, i: (i % 2) ^ (rng.random() < 0.1)),
            (WORSE, lambda rng, i: i % 2 and float(rng.random() < 0.3)),
        ],
    )


class Tags(HTMLParser):
    """Checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def conclude(folder):
    scores = read(folder)
    return conclusion(outcomes(scores), len(scores.problems))


def test_it_claims_what_is_there_and_nothing_else(folder):
    said = conclude(folder)
    assert "Better than no looping: anchored, K = 2." in said
    assert "Worse than no looping: anchored, K = 8." in said
    assert "No detectable difference: the other 1." in said
    assert "80 problems" in said


def test_without_an_effect_it_says_so(tmp_path):
    noise = lambda rng, i: float(rng.random() < 0.5)  # noqa: E731
    said = conclude(study(tmp_path, [(None, noise), (BETTER, noise), (SAME, noise)]))
    assert said.startswith("No detectable difference between any setting and no looping")


def test_the_page_is_one_file_that_opens_anywhere(folder):
    pytest.importorskip("matplotlib")
    write(folder, layers=12, holdout=0.5, reference=True)
    page = (folder / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert {"table", "picture", "h1"} <= set(tags.seen)
    assert len(tags.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert "a &lt;model&gt;" in page
    assert "2605.23872" in page
    assert 'content="width=device-width' in page


def test_it_shows_settings_in_full_where_it_comes_from_and_answers_side_by_side(folder):
    append(folder / RUNS, {**provenance("mlx_loop evaluate --x '<y>'"), "results": 320})
    write(folder, layers=12)
    page = (folder / "report.html").read_text()
    text = (folder / "report.md").read_text()
    assert "| setting | window | loops | integrator | beta |" in text
    assert "| anchored, K = 4 | [4,8) | 4 | anchored | 0.5 |" in text
    assert "mlx_loop evaluate --x '&lt;y>'" in text
    for words in ("Python 3.", "mlx-lm 0.", "20", machine()):
        assert words in text.split("## Runs")[1].split("## Answers")[0]
    assert "Of 80 problems 80 have answers that differ." in text
    row = next(line for line in text.splitlines() if line.startswith("| vt 512 7 |"))
    assert row.count("&lt;said>") == 4
    assert row.count("✓") + row.count("✗") == 4
    assert '<input type="search"' in page
    assert page.count("&lt;said&gt;") == 320


def test_a_line_of_runs_or_answers_that_is_none_is_passed_over(folder):
    for name in (RUNS, EXAMPLES, RESULTS):
        with (folder / name).open("a") as file:
            file.write('null\n[]\n{"task": {}, "length": [], "index": 1, "loop": null}\n{"torn')
    write(folder, layers=12)


def test_the_markdown_has_the_same_tables(folder):
    pytest.importorskip("matplotlib")
    write(folder, layers=12)
    text = (folder / "report.md").read_text()
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures
    assert all((folder / name).exists() for name in pictures)
    row = next(line for line in text.splitlines() if line.startswith("| anchored, K = 8"))
    # Window of 4 in 12 layers, 7 more passes over it.
    assert "+233%" in row
    assert "worse" in row
    for length in (512, 1024):
        assert f"{length} tokens (n = 40)" in text


def test_problems_that_not_every_setting_has_are_left_out(folder):
    lines = (folder / RESULTS).read_text().splitlines()
    (folder / RESULTS).write_text("\n".join(lines[:-15]) + "\n")
    scores = read(folder)
    assert len(scores.problems) == 65
    assert scores.planned == 80
    assert scores.settings[0] is None


def test_no_complete_problem_is_one_line(folder):
    lines = (folder / RESULTS).read_text().splitlines()
    (folder / RESULTS).write_text("\n".join(lines[:20]) + "\n")
    with pytest.raises(UserError, match="run it again"):
        read(folder)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_holdout_is_a_share_of_every_task_and_length(share):
    problems = [(t, n, i) for t in ("vt", "cwe") for n in (512, 1024) for i in range(40)]
    held = split(problems, share)
    for start in range(0, 160, 40):
        assert sum(held[start : start + 40]) == pytest.approx(40 * share, abs=2)
    assert split(problems[:100], share) == held[:100]


def test_a_setting_that_won_by_chance_is_not_confirmed(tmp_path):
    # Right on the problems on which settings are chosen, and nowhere else.
    held = dict(zip(range(40), split([("vt", 512, i) for i in range(40)], 0.5), strict=True))
    lucky = study(
        tmp_path,
        [(None, lambda rng, i: 0.0), (SAME, lambda rng, i: float(not held[i]))],
        lengths=(512,),
    )
    write(lucky, layers=12, holdout=0.5)
    text = (tmp_path / "report.md").read_text().split("## Chosen")[1]
    assert "On the other 20 problems it scores 0.0" in text
    assert "no detectable difference" in text


def test_spearman_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 20), rng.normal(size=20)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
