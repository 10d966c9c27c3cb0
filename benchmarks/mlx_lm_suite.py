"""mlx-lm's own tests, with looped classes in the place of its model classes.

    python benchmarks/mlx_lm_suite.py
    python benchmarks/mlx_lm_suite.py mlx_lm-0.32.2 --model folder --setting first --keyword server

The tests come with mlx-lm's source distribution: give its unpacked folder, or pip downloads that
of the release that is installed. They run from a copy, as they are, once on mlx-lm's own classes
and once for each setting:

    off     looped classes with looping off
    first   the model type's preset
    last    the preset with cache="last"
    own     the preset with cache="own"

Printed are the counts, and the failures that mlx-lm's own classes do not have. What they mean is
in docs/studies/mlx-lm-suite.md. Many tests load a small 4-bit model from the Hugging Face hub;
--model puts a local one in its place. Needs pip install 'mlx-lm[test]' requests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest

import mlx_loop
from mlx_loop import LoopConfig, UserError
from mlx_loop.models import looped_class
from mlx_loop.upstream import model_classes, model_types

STOCK = "mlx-lm"
SETTINGS = {
    "off": None,
    "first": LoopConfig(),
    "last": LoopConfig(cache="last"),
    "own": LoopConfig(cache="own"),
}
HUB_NAME = "mlx-community/Qwen1.5-0.5B-Chat-4bit"
# mlx-lm starts the second by hand, on several machines; it runs on one as well.
FILES = "test_*.py model_parallel_tests.py"


# --- The plugin ---
#
# This file is the pytest plugin too. A model that is not a part of another one is made by the
# looped class of its type, which gets the settings right after; types that refuse stay off.


class Plugin:
    """Gives each test the same random numbers and writes down what becomes of it."""

    def __init__(self, file: Path):
        self._file = file
        self._outcomes: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self.looped: dict[str, int] = {}
        self.refused: dict[str, str] = {}

    def pytest_runtest_setup(self) -> None:
        mx.random.seed(0)
        np.random.seed(0)
        random.seed(0)

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        # A test that fails half-way leaves its make_cache to the others of its class.
        model = getattr(getattr(item, "cls", None), "model", None)
        if isinstance(model, nn.Module):
            for name in ("make_cache", "_make_cache"):
                vars(model).pop(name, None)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test, subtest = report.nodeid.split("/")[-1], getattr(report, "context", None)
        if report.failed:
            name = test if subtest is None else f"{test} {dict(subtest.kwargs)}"
            crash = getattr(report.longrepr, "reprcrash", None)
            self._failed[name] = (crash.message if crash else str(report.longrepr)).split("\n")[0]
        if report.failed or (report.when != "teardown" and self._outcomes.get(test) != "failed"):
            self._outcomes[test] = report.outcome

    def pytest_sessionfinish(self) -> None:
        found = {"outcomes": self._outcomes, "failed": self._failed}
        self._file.write_text(json.dumps(found | {"looped": self.looped, "refused": self.refused}))

    def loop(self, name: str, loop: LoopConfig | None) -> None:
        """Make mlx-lm's model class of a type give a looped one, unless for a part of a model."""
        stock, looped = model_classes(name)[0], looped_class(name)

        def new(cls: type, *args: Any, **kwargs: Any) -> Any:
            maker = sys._getframe(1).f_globals["__name__"]
            is_part = maker.startswith("mlx_lm.models.")
            return dict.__new__(looped if cls is stock and not is_part else cls)

        def init(model: Any, *args: Any, **kwargs: Any) -> None:
            super(looped, model).__init__(*args, **kwargs)
            try:
                model.loop = loop
                self.looped[name] = self.looped.get(name, 0) + 1
            except UserError as error:
                self.refused[name] = str(error)

        stock.__new__, looped.__init__ = new, init


def pytest_configure(config: pytest.Config) -> None:
    setting, file = os.environ["MLX_LM_SUITE"].split(":")
    plugin = Plugin(Path(file))
    config.pluginmanager.register(plugin)
    if setting == STOCK:
        return
    loop = SETTINGS[setting]
    for name in model_types():
        try:
            plugin.loop(name, loop)
        except UserError:  # a package that the type needs is missing
            continue
    mlx_lm.utils.load = lambda path, **kwargs: mlx_loop.load(path, loop=loop, **kwargs)


# --- The runs ---


def download(folder: Path) -> Path:
    """The source distribution of the mlx-lm that is installed, unpacked."""
    name = f"mlx-lm=={version('mlx-lm')}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "mlx-lm", name]
    subprocess.run([*pip, "--quiet", "--dest", str(folder)], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def stand_in(model: Path, hub: Path) -> dict[str, str]:
    """A hub cache in `hub` that has `model` under the name that the tests ask for."""
    repository = hub / f"models--{HUB_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(model.resolve())
    return {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}


def run(setting: str, tests: Path, environment: dict[str, str], keyword: str, result: Path) -> None:
    """Run the tests with one setting and write `result`."""
    places = [str(Path(__file__).parent), str(Path(mlx_loop.__file__).parents[1])]
    environment = {
        **os.environ,
        **environment,
        "MLX_LM_SUITE": f"{setting}:{result}",
        "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]),
    }
    options = ["-q", "-p", "mlx_lm_suite", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    command = [sys.executable, "-m", "pytest", *options, "-o", f"python_files={FILES}", "."]
    subprocess.run([*command, "-k", keyword], cwd=tests, env=environment, stdout=sys.stderr)


def report(found: dict[str, dict[str, Any]]) -> str:
    """The results by setting, as Markdown."""
    stock = found[STOCK]["failed"]
    new = {setting: [t for t in found[setting]["failed"] if t not in stock] for setting in found}
    lines = [f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}, {platform.platform()}", ""]
    lines += ["| | passed | failed | not in mlx-lm | skipped | models looped | types that refuse |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for setting, result in found.items():
        outcomes = list(result["outcomes"].values())
        passed, failed, skipped = map(outcomes.count, ("passed", "failed", "skipped"))
        distinct = len({test.split(" ")[0] for test in new[setting]})
        looped, refused = sum(result["looped"].values()), len(result["refused"])
        counts = [passed, failed, distinct, skipped, looped, refused]
        lines += [f"| {setting} | {' | '.join(map(str, counts))} |"]
    for setting, tests in new.items():
        lines += ["", f"{setting}:", ""] if tests else []
        lines += [f"- {test}: {found[setting]['failed'][test]}" for test in tests]
    reasons = {why for result in found.values() for why in result["refused"].values()}
    lines += ["", *(f"- {why}" for why in sorted(reasons))]
    return "\n".join(lines)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("sdist", type=Path, nargs="?", help="folder (default: download it)")
    parser.add_argument("--model", type=Path, help=f"stands in for {HUB_NAME}, a 4-bit qwen2")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: each")
    parser.add_argument("--keyword", default="", help="only these tests, as pytest's -k")
    parser.add_argument("--results", type=Path, help="folder; what has a result there is not run")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = args.sdist or download(folder)
        tests = Path(shutil.copytree(sdist / "tests", folder / "copy" / "tests"))
        environment = stand_in(args.model, folder / "hub") if args.model else {}
        results = (args.results or folder / "results").resolve()
        results.mkdir(parents=True, exist_ok=True)
        found = {}
        for setting in [STOCK, *(args.setting or SETTINGS)]:
            result = results / f"{setting}.json"
            if not result.exists():
                run(setting, tests, environment, args.keyword, result)
            found[setting] = json.loads(result.read_text())

    print(report(found))


if __name__ == "__main__":
    main()
