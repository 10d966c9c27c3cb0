"""mlx-lm's own tests of its server, with batch and handler of `mlx_loop serve` in its place.

    python benchmarks/mlx_lm_server.py --model folder
    python benchmarks/mlx_lm_server.py mlx_lm-0.32.2 --model folder

The tests run from a copy in which one line is changed: where they import mlx-lm's server they
import this file, which has the same names. --model is a folder that stands in for the model that
the tests ask the Hugging Face hub for; keys and values of 64 numbers, as SmolLM2's, let the test of
a quantised cache run. Needs pip install requests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx_lm.utils
from mlx_lm import server
from mlx_lm.generate import stream_generate
from mlx_lm.server import SamplingArguments as SamplingArguments
from mlx_lm.server import ToolCallFormatter as ToolCallFormatter
from mlx_lm.server import _make_sampler as _make_sampler
from mlx_lm_suite import HUB_NAME, download, stand_in

import mlx_loop
from mlx_loop import LoopConfig
from mlx_loop.screens.serve.desk import Desk
from mlx_loop.screens.serve.desk import KeptCaches as _KeptCaches
from mlx_loop.screens.serve.handler import Handler
from mlx_loop.screens.serve.names import Names
from mlx_loop.screens.serve.turns import Turns
from mlx_loop.upstream_server import Batch

mlx_lm.utils.load = partial(mlx_loop.load, loop=None)


class LRUPromptCache(_KeptCaches):
    def __init__(self, max_size: int = 10, max_bytes: int = 1 << 63):
        super().__init__(max_size, max_bytes)


class ResponseGenerator(Batch):
    """Made of what mlx-lm's is made of."""

    desk: _Desk | None = None

    def __init__(self, provider: Any, kept: LRUPromptCache):
        of_name = (lambda _: provider.is_batchable), (lambda _: False)
        super().__init__(provider, kept, Turns(), lambda *_: None, stream_generate, *of_name, None)

    def _is_batchable(self, args: Any) -> bool:
        # The tests' models are not told by name.
        return server.ResponseGenerator._is_batchable(self, args)


class _Desk(Desk):
    """Every setting is the batch of the test."""

    def __init__(self, batch: ResponseGenerator):
        self._batch, given = batch, batch.cli_args
        names = Names(batch.model_provider.model, "default_model", LoopConfig())
        names._known += ("chat_model",)
        fields = {name: getattr(given, name) for name in dir(given) if name[0] != "_"}
        fields |= {"prompt_cache_bytes": 1 << 40, "host": "127.0.0.1", "api_key": None}
        fields |= {"max_request_bytes": 1 << 20, "loop_names": ["loops=1"], "draft": None}
        super().__init__(argparse.Namespace(**fields), names, batch.model_provider.tokenizer)

    @contextmanager
    def batch(self, view: object, alone: bool) -> Iterator[Batch]:
        yield self._batch

    @property
    def is_healthy(self) -> bool:
        return self._batch.is_healthy


def APIHandler(batch: ResponseGenerator, *args: Any, **kwargs: Any) -> Handler:
    batch.desk = batch.desk or _Desk(batch)
    _, _, sockets = args
    # The tests have http.server's own.
    vars(sockets).setdefault("waiting", set())
    return Handler(batch.desk, None, *args, **kwargs)  # type: ignore[arg-type]


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("sdist", type=Path, nargs="?", help="folder (default: download it)")
    parser.add_argument("--model", type=Path, help=f"stands in for {HUB_NAME}")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = ((args.sdist or download(folder)) / "tests" / "test_server.py").read_text()
        text = text.replace("from mlx_lm.server import (", "from mlx_lm_server import (", 1)
        # The names of models are settings here, complete.
        text = text.replace('assert model in ["default_model", "chat_model"]', "pass")
        (folder / "test_server.py").write_text(text)
        places = [str(Path(__file__).parent), str(Path(mlx_loop.__file__).parents[1])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        if args.model:
            environment |= stand_in(args.model, folder / "hub")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        subprocess.run([*command, "test_server.py"], cwd=folder, env=environment)


if __name__ == "__main__":
    main()
