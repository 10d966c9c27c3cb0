"""Looped models agree with an independent float64 reference, agreed with PyTorch transformers."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error
from gpu_on_host import Launches, needs_compiler
from mlx_lm.models.cache import make_prompt_cache

import mlx_loop
from mlx_loop import LoopConfig

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
REFERENCE = np.load(GOLDEN / "reference.npz")
NAMES = {"free": "live", "none": "free", "interpolate": "interpolated"}


def settings(case):
    """The `LoopConfig` of a case, in the names of tests/data/golden/cases.json."""
    if case["strategy"] == "none":
        return None
    same = {name: case[name] for name in ("loops", "window", "scope", "beta", "cache", "decode")}
    return LoopConfig(
        integrator=case["strategy"],
        routing=NAMES.get(case["routing"], case["routing"]),
        norm=NAMES.get(case["norm"], case["norm"]),
        **same,
    )


@pytest.fixture(scope="module")
def models():
    return {
        arch: mlx_loop.load_model(GOLDEN / "models" / arch, loop=None)
        for arch in {case["arch"] for case in CASES}
    }


def logits(models, case):
    """Of the prompt, and of the tokens after it, fed one by one."""
    model = models[case["arch"]].with_loop(settings(case))
    cache = make_prompt_cache(model)
    prefill = model(mx.array(case["prompt"]), cache=cache)
    model.begin_decode(cache)
    following = mx.array(case["next"])
    steps = [model(following[:, i : i + 1], cache=cache) for i in range(following.shape[1])]
    return prefill, mx.concatenate(steps, 1)


# The project's bound is 1e-4; float32 through ten layers and the window's passes stays below 1e-5.
def check(case, prefill, decode):
    assert relative_error(prefill, REFERENCE[case["name"] + ".prefill"]) < 1e-5
    assert relative_error(decode, REFERENCE[case["name"] + ".decode"]) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_prefill_and_decode_agree_with_the_reference(models, case):
    check(case, *logits(models, case))


@needs_compiler
def test_so_they_do_with_every_update_by_the_metal_kernels(models, tmp_path):
    cases = [case for case in CASES if case["arch"] == "qwen3"]
    launches = Launches()
    with launches.in_models():
        mx.eval([logits(models, case) for case in cases])
        launches.compile(tmp_path)
        for case in cases:
            check(case, *logits(models, case))
    assert launches.count > len(cases)
