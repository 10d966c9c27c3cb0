"""Tasks of EleutherAI's lm-evaluation-harness, through mlx-lm's adapter, for looped models.

Needs lm-eval (the `eval` extra). The score of every problem is kept, so that settings are compared
problem by problem like RULER's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import UserError
from ...models.looped import Looped
from ..results import Row
from .task import Found, Task


@dataclass(frozen=True)
class Harness(Task):
    """What is asked of lm-evaluation-harness; an item is a task of its own.

    A row has a problem's prompt, the answer (or the log-likelihoods of the choices), all metrics
    and the first one as the score. A task that has come to its end under a setting has a row of
    its own, which says so.

    Args:
        tasks: names of tasks or groups.
        include_path: a folder with task files of the user's.
        limit: problems of each task; None: all.
        lengths, tokenizer: context lengths and the tokenizer's folder or repository, for the
            harness's own `ruler` tasks.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    lengths: Sequence[int] = ()
    tokenizer: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)

    numbers = ()

    @property
    def items(self) -> Sequence[Row]:  # type: ignore[override]
        return [{"item": f"lm_eval:{task}"} for task in self.tasks]

    @cached_property
    def _lm_eval(self) -> tuple[Callable[..., Any], Any, Callable[..., Any]]:
        return _lm_eval(self)

    def measure(
        self, views: Sequence[Looped], tokenizer: TokenizerWrapper, items: Sequence[Row]
    ) -> Iterator[list[Found]]:
        """As for every task; UserError: lm-eval is missing, or a task cannot be loaded."""
        evaluate, manager, adapter = self._lm_eval
        (done,) = items
        task = done["item"].removeprefix("lm_eval:")
        for number, view in enumerate(views):
            try:
                found = evaluate(
                    model=adapter(view, tokenizer),
                    tasks=[task],
                    limit=self.limit,
                    task_manager=manager,
                    apply_chat_template=tokenizer.has_chat_template,
                    fewshot_as_multiturn=tokenizer.has_chat_template,
                    bootstrap_iters=0,
                )
            except UserError:
                raise
            except Exception as error:  # Tasks raise whatever their code or the network raises.
                line = next(iter(str(error).splitlines()), repr(error))
                raise UserError(
                    f"lm_eval:{task} failed ({line}); `lm-eval ls tasks` lists the tasks, and "
                    "data that is not on this computer needs a network"
                ) from error
            samples = found["samples"].items()
            yield [Found(number, [*chain(*(rows(name, of) for name, of in samples)), done])]


def rows(task: str, samples: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Results of a task's logged samples, of its first filter; in order of the problems."""
    out = []
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        if sample["filter"] != samples[0]["filter"]:
            continue
        metrics = {
            name: float(sample[name])
            for name in sample["metrics"]
            if isinstance(sample[name], bool | int | float) and sample[name] >= 0
        }
        if not metrics:
            raise UserError(
                f"lm_eval:{task} has no score of each problem: choose a task with right or wrong "
                "answers"
            )
        metric = next(iter(metrics))
        out.append(
            {
                "item": f"{task}/{sample['doc_id']}",
                "task": task,
                "length": None,
                "index": sample["doc_id"],
                "prompt": sample["arguments"][0][0],
                "answer": sample["filtered_resps"],
                "score": metrics[metric],
                "metric": metric,
                "metrics": metrics,
            }
        )
    return out


def _lm_eval(harness: Harness) -> tuple[Callable[..., Any], Any, Callable[..., Any]]:
    """`simple_evaluate`, a task manager, and what makes an LM of a view."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
        from mlx_lm.evaluate import MLXLM, chat_template_fn
    except ImportError as error:
        raise UserError(
            f"lm_eval: tasks need lm-evaluation-harness ({error}): pip install lm-eval"
        ) from error

    class LoopedLM(MLXLM):
        """mlx-lm's adapter around a model that is loaded already."""

        apply_chat_template = chat_template_fn(**harness.template)

        def __init__(self, view: Looped, tokenizer: TokenizerWrapper):
            LM.__init__(self)
            self._model = view
            self.tokenizer = tokenizer
            self._max_tokens = None
            self._batch_size = harness.batch_size
            self.use_chat_template = tokenizer.has_chat_template
            self._sampler = None

        def loglikelihood(self, requests: Any) -> Any:
            _refuse_phases(self._model)
            return super().loglikelihood(requests)

        def loglikelihood_rolling(self, requests: Any) -> Any:
            _refuse_phases(self._model)
            return super().loglikelihood_rolling(requests)

    manager = TaskManager(
        include_path=harness.include_path and str(harness.include_path),
        metadata={"pretrained": harness.tokenizer, "max_seq_lengths": list(harness.lengths)},
    )
    return simple_evaluate, manager, LoopedLM


def _refuse_phases(view: Any) -> None:
    """Refuse likelihoods under settings for which mlx-lm's adapter feeds answers like prompts."""
    if view.tells_tokens_apart:
        raise UserError(
            "lm_eval: tasks that compare likelihoods do not say which tokens are the answer's, "
            "and decode, prompt and gate need to know: leave these out, or ask choices:FILE"
        )
