"""The commands that measure, as functions whose results show themselves."""

from __future__ import annotations

import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path

import mlx_lm
import pytest
import tqdm.auto

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.measure.shown import Shown
from mlx_loop.measure.tasks.questions import QUESTIONS, Questions, read_questions

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


@pytest.fixture(scope="module")
def loaded():
    return mlx_loop.load("demo")


@pytest.fixture(scope="module")
def prompt(loaded):
    messages = [{"role": "user", "content": "what is 12 + 30?"}]
    return loaded[1].apply_chat_template(messages, add_generation_prompt=True)


@pytest.fixture(scope="module")
def results(loaded, prompt):
    """One of each kind, under no loop and two loops."""
    model, tokenizer = loaded
    swept = mlx_loop.sweep(model, tokenizer, "demo", 2, limit=2, max_tokens=8, progress=False)
    return {
        "trace": mlx_loop.trace(model.with_loop(3), tokenizer, prompt),
        "compare": mlx_loop.compare(model, tokenizer, prompt, [2], max_tokens=8),
        "sweep": swept,
    }


# --- Settings ---


def test_a_number_a_dict_and_a_config_are_the_same_setting_wherever_one_is_taken(loaded):
    model, _ = loaded
    expected = model.with_loop(LoopConfig(loops=3)).loop
    view = model.with_loop(None)
    for given in (3, {"loops": 3}, LoopConfig(loops=3)):
        view.loop = given
        assert view.loop == model.with_loop(given).loop == expected
        assert mlx_loop.load_model("demo", loop=given).loop == expected


@pytest.mark.parametrize("given", ["3", True, 2.5, [3], (LoopConfig(),), object])
def test_what_is_no_setting_is_refused_in_one_line(loaded, given):
    model, _ = loaded
    before = model.loop
    for use in (
        lambda: model.with_loop(given),
        lambda: setattr(model, "loop", given),
        lambda: mlx_loop.load("demo", loop=given),
    ):
        with pytest.raises(UserError, match=r"^.*no loop setting.*LoopConfig.*$"):
            use()
    assert model.loop == before


def test_a_field_that_is_none_is_named(loaded):
    with pytest.raises(UserError, match="unknown loop setting 'lops', did you mean loops"):
        loaded[0].with_loop({"lops": 3})


# --- Generation and names ---


def test_verbose_prints_the_lines_that_mlx_lm_prints(loaded, prompt, capsys):
    model, tokenizer = loaded
    texts, printed = [], []
    for generate in (mlx_lm.generate, mlx_loop.generate):
        texts.append(generate(model, tokenizer, prompt, verbose=True, max_tokens=8))
        printed.append(re.sub(r"\d+\.\d+", "N", capsys.readouterr().out))
    assert texts[0] == texts[1]
    assert printed[0] == printed[1]
    assert "tokens-per-sec" in printed[1]
    mlx_loop.generate(model, tokenizer, prompt, max_tokens=8)
    assert capsys.readouterr().out == ""


def test_the_public_names_are_what_tab_shows_and_all_of_them_are_there():
    shown = dir(mlx_loop)
    assert {"load", "trace", "compare", "sweep", "evaluate", "LoopConfig"} <= set(shown)
    assert [name for name in shown if name.startswith("_")] == ["__version__"]
    assert all(getattr(mlx_loop, name) is not None for name in shown)


def test_the_function_trace_and_the_module_trace_do_not_hide_each_other():
    module = import_module("mlx_loop.measure.trace")
    assert mlx_loop.trace is import_module("mlx_loop.measure.library").trace
    assert mlx_loop.measure.trace is module
    assert callable(mlx_loop.trace)


# --- Results ---


@pytest.mark.parametrize("name", ["trace", "compare", "sweep"])
def test_a_result_shows_itself(results, name):
    result = results[name]
    assert str(result) == repr(result)
    assert len(str(result)) < 2000
    assert "<table>" in result._repr_html_()
    assert "nan" not in json.dumps(result.to_dict()).lower().split()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))


@pytest.mark.parametrize("name", ["trace", "compare", "sweep"])
def test_a_plot_is_a_figure_that_pyplot_does_not_show_once_more(results, name):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    before = pyplot.get_backend(), pyplot.get_fignums()
    figure = results[name].plot()
    assert isinstance(figure, Figure)
    assert any(axis.has_data() for axis in figure.axes)
    assert (pyplot.get_backend(), pyplot.get_fignums()) == before


@pytest.mark.parametrize(
    ("package", "use"), [("matplotlib", "plot"), ("pandas", "to_pandas")], ids=lambda x: x
)
def test_a_package_that_is_missing_is_said_with_the_line_that_installs_it(
    results, package, use, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        getattr(results["trace"], use)()


def test_a_data_frame_has_the_records():
    pandas = pytest.importorskip("pandas")
    shown = Shown()
    shown.records = lambda: [{"a": 1}, {"a": 2}]
    assert isinstance(shown.to_pandas(), pandas.DataFrame)
    assert list(shown.to_pandas()["a"]) == [1, 2]


def test_a_trace_has_a_record_for_each_pass_and_token_and_its_result(results, prompt):
    traced = results["trace"]
    rows = traced.records()
    assert len(rows) == (3 + 1) * len(prompt)
    assert math.isnan(rows[-1]["residual"])
    assert rows[len(prompt)]["residual"] == traced.loops[0].passes[1].residual[0]
    assert "12" not in traced.texts
    assert "".join(traced.texts).count("12 + 30") == 1
    assert f"{traced.verdict}: residual" in str(traced)


def test_a_text_is_taken_as_it_is(loaded):
    model, tokenizer = loaded
    text = "what is 12"
    assert mlx_loop.trace(model, tokenizer, text).tokens == tokenizer.encode(text)


def test_prompts_may_be_one_or_several_texts_or_tokens(loaded):
    model, tokenizer = loaded
    text, tokens = "what is 12", [5, 6, 7]
    one = mlx_loop.compare(model, tokenizer, tokens, 2, max_tokens=2)
    both = mlx_loop.compare(model, tokenizer, [text, tokens], [2], max_tokens=2)
    assert both.prompts == [text, tokenizer.decode(tokens)]
    assert [a.tokens for a in both.answers[1]] == [a.tokens for a in one.answers[0]]
    assert [answer.loop and answer.loop.loops for answer in one.answers[0]] == [None, 2]
    for nothing in ([], "", [[]], 5, [text, 5], [text, ["a"]]):
        with pytest.raises(UserError, match="prompt"):
            mlx_loop.compare(model, tokenizer, nothing, 2)


def test_a_sweep_is_that_of_the_command(loaded, tmp_path, capsys):
    from mlx_loop.screens.cli import main

    options = ["--task", "demo", "--limit", "2", "--max-tokens", "8", "--loops", "2"]
    assert main(["sweep", *options, "--out", str(tmp_path / "sweep.jsonl")]) == 0
    said = capsys.readouterr().out
    found = mlx_loop.sweep(*loaded, "demo", 2, limit=2, max_tokens=8, progress=False)
    assert " ".join(found.conclusion.split()) in " ".join(said.split())


def test_a_sweep_goes_on_from_its_file(loaded, tmp_path, monkeypatch):
    file = tmp_path / "sweep.jsonl"
    asked = {"limit": 2, "max_tokens": 8, "out": file, "progress": False}
    first = mlx_loop.sweep(*loaded, "demo", [2], **asked)
    monkeypatch.setattr(Questions, "measure", None)  # It would fail if anything were done again.
    assert mlx_loop.sweep(*loaded, "demo", [2], **asked).to_dict() == first.to_dict()
    with pytest.raises(UserError, match="another max_tokens"):
        mlx_loop.sweep(*loaded, "demo", [2], **asked | {"max_tokens": 9})


def test_a_notebook_shows_its_own_bar():
    """Another one is text on standard error, which a notebook shows as an error."""
    assert import_module("mlx_loop.measure.library").tqdm is tqdm.auto.tqdm


def test_a_task_of_your_own(loaded):
    task = Questions(read_questions(QUESTIONS, 1), max_tokens=2)
    found = mlx_loop.sweep(*loaded, task, 2, progress=False)
    assert found.scores.values.shape == (2, 1)


def test_what_cannot_be_measured_is_one_line(loaded, tmp_path):
    model, tokenizer = loaded
    (tmp_path / "a.txt").write_text("a text")
    for use, words in (
        (lambda: mlx_loop.sweep(model, tokenizer, "demo", 1), "2 loops or more"),
        (lambda: mlx_loop.evaluate(model, tokenizer, "vt", [None]), "2 loops or more"),
        (lambda: mlx_loop.evaluate(model, tokenizer, "vtt", 2), "unknown task 'vtt'"),
        (lambda: mlx_loop.evaluate(model, tokenizer, "vt", 2, lengths=8), "greater lengths"),
        (
            lambda: mlx_loop.sweep(model, tokenizer, f"text:{tmp_path / 'a.txt'}", 2, system="x"),
            "system would not be read",
        ),
        (lambda: mlx_loop.trace(model.with_loop(None), tokenizer, "a"), "looping is off"),
        (lambda: mlx_loop.trace(object(), tokenizer, "a"), "mlx_loop.load"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_the_page_runs_as_it_stands(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    exec(compile(code, PAGE.name, "exec"), {})
    out = capsys.readouterr().out
    assert out.count("no loop ") == 2  # The tables of `compare` and `evaluate`.
    assert "No detectable difference" in out
