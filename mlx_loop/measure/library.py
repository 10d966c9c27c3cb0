"""The commands that measure, as functions: `trace`, `compare`, `sweep` and `evaluate`.

What they return prints as small tables (`shown.Shown`). docs/library.md has examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm.auto import tqdm

from .. import several
from ..checkpoints.card import base_model
from ..checkpoints.loading import DEMOS
from ..errors import UserError
from ..files import alone
from ..foreign import path_of
from ..generation.prompt import Prompt, encode
from ..models.looped import Looped
from ..settings import LoopLike
from . import comparison, report, sweep_report
from . import trace as inside
from .evaluation import carry_out, other_tasks, parse_tasks
from .results import Results, fingerprint
from .study import Study, examples, extent, gather, run
from .tables import Comparison, Measured
from .tasks import FROM_FILES, Task, files_of, kind_of, read_tasks, split_name, split_names
from .tasks.ruler import SEED, Sources
from .trace import Trace

# One setting, or several.
Settings = LoopLike | Sequence[LoopLike]


def trace(model: Looped, tokenizer: TokenizerWrapper, prompt: Prompt) -> Trace:
    """Look inside a loop: does it converge, drift or diverge? docs/trace.md has the numbers.

    Args:
        model: from `mlx_loop.load`, with the settings to look at (`model.with_loop(6)`).
        prompt: a text, taken as it is, or token ids.

    Raises:
        UserError: looping is off, or the prompt is empty.
    """
    _check(model)
    tokens = _tokens(tokenizer, prompt)
    return replace(inside.trace(model, tokens), texts=[tokenizer.decode([t]) for t in tokens])


def compare(
    model: Looped,
    tokenizer: TokenizerWrapper,
    prompts: Prompt | Sequence[Prompt],
    settings: Settings,
    *,
    max_tokens: int = 256,
    **kwargs: Any,
) -> Comparison:
    """What several settings make of a prompt, or of each of several, beside no looping.

    Args:
        prompts: a text, taken as it is, or token ids; or a list of these.
        settings: one or a list: `LoopConfig`, a number of loops, or a dict of fields.
        kwargs: sampler, seed, prefill_step_size, draft, num_draft_tokens, progress: as in
            `measure.comparison.compare`, which yields the answers as they come.

    Raises:
        UserError: settings that do not fit the model, or an empty prompt.
    """
    views = _views(model, settings)
    asked = [_tokens(tokenizer, prompt) for prompt in _several(prompts)]
    if not asked:
        raise UserError("there is no prompt: give a text, token ids, or a list of these")
    answers = []
    for tokens in asked:
        *_, last = comparison.compare(views, tokenizer, tokens, max_tokens=max_tokens, **kwargs)
        answers.append(last)
    return Comparison([tokenizer.decode(tokens) for tokens in asked], answers)


def sweep(
    model: Looped,
    tokenizer: TokenizerWrapper,
    task: str | Path | Task,
    settings: Settings,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    max_tokens: int | None = None,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> Measured:
    """A task under several settings, each compared with no looping item by item.

    Args:
        task: as `mlx_loop sweep --task`: a file of questions, `demo`, `choices:FILE`,
            `chat_choices:FILE`, or `text:FILE`; or a `Task` of your own.
        settings: as in `compare`.
        limit: this many items of each file, evenly spread; None: all.
        out: a file where results are appended, with a page beside it; what it holds is not done
            again.
        max_tokens, system, template, batch: the longest answer, the system message, more
            arguments for the chat template, and how many items are answered at a time.
        progress: show a bar.

    Raises:
        UserError: no setting loops, a file cannot be read, or something the task does not read.
    """
    views = _looped(model, settings)
    given = {"max_tokens": max_tokens, "system": system, "template": template, "batch": batch}
    asked = {name: value for name, value in given.items() if value is not None}
    header: dict[str, Any] = {"model": _name(model)}
    if isinstance(task, Task):
        idle, data = list(asked), [type(task).__name__]
    else:
        named = split_names(str(task))
        idle = [name for name in asked if name not in FROM_FILES[kind_of(named)].reads]
        data = [fingerprint(path) for path in files_of(named)]
        task = read_tasks(named, tokenizer, limit, **asked)
    if idle:
        raise UserError(f"{' and '.join(idle)} would not be read by this task: leave it out")
    header |= {"data": data, **asked}
    with nullcontext() if out is None else alone(path_of(out)):
        results = Results(None, {}) if out is None else Results.open(path_of(out), header)
        _measure(progress)("", views, tokenizer, task, results)
    scores = replace(gather(views, task, results), header=header)
    others = {score.title: gather(views, task, results, score) for score in task.beside}
    page = None
    if out is not None:
        asked_for = views, task, results, "in Python"
        page = sweep_report.write(path_of(out), scores, others, *asked_for)
    return Measured(scores, others, len(views[0].layers), page)


def evaluate(
    model: Looped,
    tokenizer: TokenizerWrapper,
    tasks: str | Sequence[str],
    settings: Settings,
    *,
    lengths: int | Sequence[int] = (4096,),
    limit: int = 100,
    out: str | Path | None = None,
    holdout: float | None = None,
    traces: int = 0,
    progress: bool = True,
    **study: Any,
) -> Measured:
    """RULER's long-context tasks, lm-evaluation-harness's or your own, under several settings.

    Args:
        tasks: names as in `mlx_loop evaluate --tasks`, in a list or with commas between.
        settings: as in `compare`.
        lengths: RULER's context lengths in tokens; one, or a list.
        limit: problems of each task and length.
        out: a folder for problems, answers and the report; what it holds is not done again.
        holdout: the report chooses a setting on the other problems and tells what it does on
            this share of them.
        traces: problems of each length on which drift is measured, for the report.
        progress: show a bar.
        study: seed, sources, answer_prefix, system_prompt, template, batch_size and
            prefill_step_size, as in `measure.study.Study`.

    Raises:
        UserError: no setting loops, an unknown task, or a length that is too short for one.
    """
    views = _looped(model, settings)
    lengths = [lengths] if isinstance(lengths, int) else lengths
    ours, theirs, named = parse_tasks(tasks if isinstance(tasks, str) else ",".join(tasks))
    files = {name: path_of(split_name(name)[1]) for name in named}
    asked = Study(
        _name(model),
        ours,
        lengths if ours else [],
        limit,
        files={name: fingerprint(path) for name, path in files.items()},
        **{"sources": Sources(), "seed": SEED, **study},
    )
    place = str(model.checkpoint.path) if model.checkpoint else ""
    others = other_tasks(asked, tokenizer, files, theirs, lengths, place)
    with ExitStack() as stack:
        folder = path_of(out or stack.enter_context(TemporaryDirectory()))
        problems = examples(asked, tokenizer, folder)
        measure = _measure(progress)
        carry_out(asked, views, tokenizer, folder, problems, others, traces, measure, "in Python")
        layers, page = len(views[0].layers), None
        if out is not None:
            _, page = report.write(folder, layers, holdout)
        return Measured(report.read(folder), report.beside(folder), layers, page)


def _measure(progress: bool) -> Callable[..., bool]:
    """`study.run` with a bar."""

    def measure(
        title: str,
        views: Sequence[Looped],
        tokenizer: TokenizerWrapper,
        task: Task,
        results: Results,
        seconds: Path | None = None,
    ) -> bool:
        total, done = extent(views, task, results)
        bar = tqdm(total=total, initial=done, desc=title, leave=False, disable=not progress)
        with bar:
            run(views, tokenizer, task, results, bar.update, seconds)
        return True

    return measure


def _views(model: Looped, settings: Settings) -> list[Looped]:
    _check(model)
    several = isinstance(settings, Sequence) and not isinstance(settings, str)
    return comparison.distinct(model, cast(Sequence[LoopLike], settings if several else [settings]))


def _looped(model: Looped, settings: Settings) -> list[Looped]:
    if several.count() > 1:
        raise UserError(
            "settings are measured on one machine in Python: on several use mlx_loop evaluate or "
            "sweep, which give each a part of the problems"
        )
    views = _views(model, settings)
    if len(views) < 2:
        raise UserError("there is no looped setting to compare: give one with 2 loops or more")
    return views


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    several = isinstance(prompts, list | tuple) and not all(isinstance(p, int) for p in prompts)
    return cast(Sequence[Prompt], prompts if several else [prompts])


def _tokens(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    try:
        tokens = encode(tokenizer, prompt)
        if tokens and all(isinstance(token, int) for token in tokens):
            return tokens
    except TypeError:
        pass
    raise UserError(f"{prompt!r:.60} is no prompt: give a text or token ids, at least one")


def _check(model: Looped) -> None:
    if not isinstance(model, Looped):
        raise UserError(
            f"{type(model).__module__} made this model, which cannot loop: load it with "
            "mlx_loop.load"
        )


def _name(model: Looped) -> str:
    path = model.checkpoint.path if model.checkpoint else None
    demo = next((name for name, folder in DEMOS.items() if folder == path), None)
    return demo or base_model(model) or (model.model_type if path is None else str(path))
