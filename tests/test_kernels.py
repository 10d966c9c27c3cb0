"""The kernels' generated text, run on the host, is right, and faults in it are caught."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import gpu_on_host
import mlx.core as mx
import numpy as np
import pytest
from gpu_on_host import Job, Memory, needs_compiler

from mlx_loop import LoopConfig
from mlx_loop.integrators import INTEGRATORS
from mlx_loop.method.integrate import integrate
from mlx_loop.method.kernels import Anderson, combine, on_gpu, update
from mlx_loop.method.kernels.source import Variant, launch
from mlx_loop.method.kernels.update import twin
from mlx_loop.method.plan import passes
from mlx_loop.presets import resolve

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# Significant bits of a type; a rounding moves a number by at most half of the last one.
BITS = {F32: 24, F16: 11, BF16: 8}

# --- Inputs and what must come out ----------------------------------------------------------


def plain(words):
    return Memory(words, words, None)


def cut_out(words):
    """Some columns and tokens of a larger array: rows far apart and not aligned."""
    batch, length, hidden = words.shape
    base = np.full((batch, length + 2, hidden + 5), np.iinfo(words.dtype).max, words.dtype)
    base[:, 1 : 1 + length, 3 : 3 + hidden] = words
    return Memory(base, base[:, 1 : 1 + length, 3 : 3 + hidden], None)


def swapped(words):
    """Batch and length the other way round in memory."""
    base = np.ascontiguousarray(words.swapaxes(0, 1))
    return Memory(base, base.swapaxes(0, 1), None)


def every_other(words):
    """Neighbouring columns are not neighbours in memory."""
    base = np.full((*words.shape[:-1], 2 * words.shape[-1]), np.iinfo(words.dtype).max, words.dtype)
    base[..., ::2] = words
    return Memory(base, base[..., ::2], None)


LAYOUTS = (plain, cut_out, swapped, every_other)


@dataclass(eq=False)
class Case:
    """A variant on random inputs, and what a float64 computation of it gives."""

    variant: Variant
    shape: tuple[int, int, int]
    dtype: mx.Dtype
    layouts: tuple = LAYOUTS
    fault: tuple[str, str] | None = None

    def __post_init__(self):
        rng = np.random.default_rng(self.shape[2] + self.variant.states)
        v = self.variant
        self.constants = rng.uniform(-1, 1, (v.measured + 1) * v.states + 1).astype(np.float32)
        self.constants[-1] = 0.3
        inputs = [(rng.normal(size=self.shape), self.dtype) for _ in range(v.states)]
        if v.wide is False and v.states == 8:
            inputs[0] = (inputs[0][0], F32)  # a partial sum of more states than eight
        if v.norms:
            inputs.append((rng.uniform(1, 3, (*self.shape[:2], 2)), F32))
        self.inputs = [Memory(self.constants, self.constants, F32)]
        self.values = []
        for i, (values, dtype) in enumerate(inputs):
            words = gpu_on_host.encode(values, dtype)
            memory = self.layouts[i % len(self.layouts)](words)
            memory.dtype = dtype
            self.inputs.append(memory)
            self.values.append(gpu_on_host.decode(words.tobytes(), dtype).reshape(words.shape))

    def __str__(self):
        return f"{self.variant.name} {self.shape} {self.dtype}"

    def arrays(self):
        """The inputs as MLX arrays that lie in memory as they do here."""
        return [
            mx.as_strided(
                mx.array(m.base).view(m.dtype).flatten(),
                m.view.shape,
                m.strides,
                m.offset // m.dtype.size,
            )
            for m in self.inputs
        ]

    def examples(self):
        return [mx.zeros(memory.view.shape, memory.dtype) for memory in self.inputs]

    def expected(self):
        """Of each output: float64 values, and how far float32 may be off before it is rounded."""
        v, c = self.variant, self.constants.astype(np.float64)
        y, extras = np.stack(self.values[: v.states]), self.values[v.states :]
        rows = c[:-1].reshape(v.measured + 1, v.states)
        # Half a unit in the last place for each product and sum, of the sum of absolute values.
        eps, terms = 2.0**-24, v.states + 1
        if v.form == "anderson":
            out = anderson(c[0], y)
            error = 8 * eps * np.abs(y).max(axis=(0, -1), keepdims=True)[0]
        elif v.form == "linear":
            out = np.tensordot(rows[0], y, 1)
            error = terms * eps * np.tensordot(np.abs(rows[0]), np.abs(y), 1)
        else:
            out, error = aitken(*y), 8 * eps * np.abs(y).sum(0)
        norms = [np.linalg.norm(np.tensordot(row, y, 1), axis=-1) for row in rows[1:]]
        norm = np.linalg.norm(out, axis=-1, keepdims=True)
        if v.rescaled:
            start, end = (extras[0] if v.norms else np.stack(norms[:2], -1)).swapaxes(0, -1)
            target = ((1 - c[-1]) * start + c[-1] * end).T[..., None]
            # The norms are sums of squares in float32, of few terms in a row.
            out, error = out * target / norm, (error + 4 * eps * np.abs(out)) * target / norm
        found = [(out, error)]
        if norms:
            found.append((np.stack(norms, -1), 4 * eps * np.stack(norms, -1)))
        return found

    def check(self, outputs):
        kinds = {"out": F32 if self.variant.wide else self.dtype, "measured": F32}
        for name, (expected, error), found in zip(
            self.variant.outputs, self.expected(), outputs, strict=True
        ):
            assert found.shape == expected.shape
            exponent = np.floor(np.log2(np.maximum(np.abs(expected), 2.0**-14)))
            rounding = 2.0 ** (exponent - BITS[kinds.get(name, self.dtype)])
            off = np.abs(found - expected) / (rounding + error)
            assert off.max() <= 1, f"{self}: {off.max()} times what rounding allows"


def aitken(x, g1, g2):
    d1, d2 = g1 - x, g2 - 2 * g1 + x
    clear = np.abs(d2) > 1e-3 * np.abs(d1)
    step = np.where(clear, -(d1**2) / np.where(clear, d2, 1), d1)
    return x + np.clip(step, -np.abs(d1), np.abs(d1))


def anderson(damping, y):
    """By its definition, with NumPy's least squares for each token."""
    x, f = y[::2], y[1::2] - y[::2]
    dx, df = x[:-1] - x[1:], f[:-1] - f[1:]
    out = np.empty_like(x[0])
    for token in np.ndindex(out.shape[:2]):
        at = (slice(None), *token)
        c = np.linalg.lstsq(df[at].T, f[0][token], rcond=None)[0]
        out[token] = x[0][token] + damping * f[0][token] - c @ (dx[at] + damping * df[at])
    return out


def norm_free(states, form="linear"):
    return Variant(form, states)


INTERPOLATED = Variant("linear", 2, measured=2, rescaled=True)
LATER = Variant("linear", 3, rescaled=True, norms=True)
EVERYTHING = Variant("linear", 3, measured=3, rescaled=True, norms=True)

# Hidden sizes that four divides and does not; a row of one thread, of several turns, of so many
# that it is formed twice; arrays of fewer than 8 elements, which MLX passes as `constant`.
CASES = [
    Case(norm_free(1), (2, 3, 130), F32),
    Case(norm_free(2), (1, 1, 2560), F16),
    Case(norm_free(3), (2, 2, 64), BF16),
    Case(norm_free(3), (3, 5, 7), F32),
    Case(norm_free(2), (1, 1, 7), BF16, (plain,)),
    Case(norm_free(2), (1, 1, 1), F32, (plain,)),
    Case(norm_free(8), (2, 3, 33), F16),
    Case(norm_free(8), (1, 2, 128), F32),
    Case(Variant("linear", 8, wide=True), (1, 3, 65), BF16),
    Case(norm_free(3, "aitken"), (2, 3, 50), F32),
    Case(norm_free(3, "aitken"), (1, 2, 64), BF16),
    Case(INTERPOLATED, (2, 3, 130), F32),
    Case(INTERPOLATED, (2, 1, 128), F16),
    Case(INTERPOLATED, (1, 2, 3), BF16, (plain,)),
    Case(LATER, (2, 3, 64), BF16),
    Case(LATER, (1, 1, 2052), F32),
    Case(LATER, (1, 1, 8193), F16),
    Case(Variant("aitken", 3, measured=2, rescaled=True), (1, 3, 66), F32),
    Case(Variant("anderson", 4), (2, 1, 20), F32),
    Case(Variant("anderson", 6), (1, 2, 260), BF16),
    Case(Variant("anderson", 8), (1, 1, 2050), F32),
    Case(Variant("anderson", 4), (1, 1, 8192), F16),
    Case(Variant("anderson", 6, rescaled=True, norms=True), (1, 3, 96), F16),
    Case(Variant("linear", 2, measured=2), (2, 3, 40), BF16),
    Case(EVERYTHING, (2, 3, 37), F32),
    Case(EVERYTHING, (2, 2, 640), BF16),
]


# What is planted, and what must catch it: a sanitizer's or the engine's words, or the values.
WRONG = "times what rounding allows"
ROW = (INTERPOLATED, (2, 2, 300), F32)
FAULTS = {
    "no barrier": (("LOOP_BARRIER;", ""), ROW, "data race"),
    "a barrier for some": (("LOOP_BARRIER;", "if (team) LOOP_BARRIER;"), ROW, "a barrier that not"),
    "a race": (("if (lane == 0) partial", "partial"), ROW, "data race"),
    "a simdgroup left out": (("lane < TEAMS ?", "lane < TEAMS - 1 ?"), ROW, WRONG),
    "a simdgroup too many": (("lane < TEAMS ?", "lane <= TEAMS ?"), ROW, "out of bounds"),
    "the last columns left out": (("column < HIDDEN", "column + 4 < HIDDEN"), ROW, WRONG),
    "columns beyond the row's end": (
        ("HIDDEN % 4 && HIDDEN - column < 4 ? HIDDEN - column : 4", "4"),
        (INTERPOLATED, (1, 1, 129), F32, (plain,)),
        "heap-buffer-overflow",
    ),
    "the wrong stride": (("y1_strides[1]", "y0_strides[1]"), ROW, WRONG),
    "an output not written": (("store4(value, count, out", "store4(value, 0, out"), ROW, WRONG),
    "a sum not started at 0": (("sums[s] = 0;", ";"), ROW, WRONG),
    "a norm not measured": (("worker < MEASURED", "worker + 1 < MEASURED"), ROW, WRONG),
    "a token too few": (
        ("row < unsigned(", "row + 1 < unsigned("),
        (norm_free(2), (2, 3, 60), BF16),
        WRONG,
    ),
}
FAULTY = {name: Case(*what, fault=fault) for name, (fault, what, _) in FAULTS.items()}


def rounding(dtype):
    """float32 numbers to be rounded, a third of them ties, from halves' subnormals to infinity."""
    case = Case(norm_free(2), (1, 6, 512), dtype, (plain,))
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**23, case.shape) | rng.integers(97, 145, case.shape) << 23
    words |= rng.integers(0, 2, case.shape) << 31
    cut = 24 - BITS[dtype]
    words[:, ::3] = words[:, ::3] >> cut << cut | 1 << (cut - 1)
    words = words.astype(np.uint32)
    case.inputs[0] = Memory(*[np.array([1, 0, 0, 0], np.float32)] * 2, F32)
    case.inputs[1] = Memory(words, words, F32)
    case.inputs[2] = Memory(*[np.zeros(case.shape, np.uint16)] * 2, dtype)
    return case


ROUNDINGS = [rounding(F16), rounding(BF16)]
ALL = [*CASES, *FAULTY.values(), *ROUNDINGS]
# Threads are dear under ThreadSanitizer: tokens of several simdgroups, but not of dozens.
CONCURRENT = [case for case in CASES if case.variant.by_row and case.shape[2] < 700]


@pytest.fixture(scope="module")
def metal(tmp_path_factory):
    """The programs, of all cases and all faults."""
    for case in ALL:
        case.function = gpu_on_host.metal(case.variant, case.examples(), case.fault)
    functions = [case.function for case in ALL]
    return gpu_on_host.compile_all(tmp_path_factory.mktemp("metal"), functions)


def run(programs, sanitizer, cases):
    jobs = [Job(ALL.index(case), case.function, case.inputs) for case in cases]
    for case, outputs in zip(cases, gpu_on_host.run(programs[sanitizer], jobs), strict=True):
        case.check(outputs)


@needs_compiler
def test_metal_text_computes_every_update(metal):
    run(metal, "address,undefined", CASES)


@needs_compiler
def test_metal_threads_do_not_race(metal):
    run(metal, "thread", CONCURRENT)


@needs_compiler
def test_the_hosts_16_bit_types_round_as_mlx_does(metal):
    jobs = [Job(ALL.index(case), case.function, case.inputs) for case in ROUNDINGS]
    found = gpu_on_host.run(metal["address,undefined"], jobs)
    for case, (rounded,) in zip(ROUNDINGS, found, strict=True):
        exact = mx.array(case.inputs[1].view.view(np.float32))
        assert np.array_equal(rounded, np.array(exact.astype(case.dtype).astype(F32)))


@needs_compiler
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(metal, name):
    *_, words = FAULTS[name]
    sanitizer = "thread" if words == "data race" else "address,undefined"
    with pytest.raises((AssertionError, gpu_on_host.Broken), match=words):
        run(metal, sanitizer, [FAULTY[name]])


# MLX's own nodes around a custom function; they hand buffers on and launch nothing.
TRANSPARENT = {"CustomTransforms", "StopGradient"}
FREE = [(name, "free") for name in INTEGRATORS if name != "poly_blend"]
INTERPOLATING = [(name, "interpolated") for name, _ in FREE if name != "norm_stab"]


def nodes(function, *arrays):
    """How many of each primitive MLX's graph of a function has, on a machine with a GPU."""
    text = io.StringIO()

    def traced(*arrays):
        mx.export_to_dot(text, function(*arrays))
        return arrays[0] + 0

    with mock.patch.object(mx, "default_device", return_value=mx.Device(mx.gpu, 0)):
        mx.export_function(lambda node: None, traced, *arrays)
    labels = Counter(re.findall(r'label ="(\w+)"', text.getvalue()))
    return {label: n for label, n in labels.items() if label not in TRANSPARENT}


@pytest.mark.parametrize(("name", "norm"), [*FREE, *INTERPOLATING])
def test_every_state_that_an_integrator_forms_is_one_launch(name, norm):
    config = resolve(LoopConfig(integrator=name, loops=4, norm=norm), "qwen3", 12)
    known, formed = [], []

    def meet(x):
        if all(x is not y for y in known):
            formed.append(x)
            known.append(x)

    def g(x, between=None):
        meet(x)
        y = mx.sin(x)
        known.append(y)
        if between is not None:
            y = between(0, y)
            meet(y)
        return y

    def loop(x0):
        known[:], formed[:] = [x0], []
        meet(out := integrate(g, x0, config))
        return out

    found = nodes(loop, mx.zeros((2, 3, 64), mx.bfloat16))
    assert found.pop("Sin") == passes(config)
    assert found == ({"CustomKernel": len(formed)} if formed else {})


def test_more_than_eight_states_take_a_launch_for_every_seven():
    def many(x):
        return combine([0.1] * 16, [mx.sin(x) for _ in range(16)])

    assert nodes(many, mx.zeros((1, 2, 8)))["CustomKernel"] == 3


@pytest.mark.parametrize(("states", "hidden"), [(4, 8192), (6, 6144), (8, 4096)])
def test_anderson_has_a_kernel_as_far_as_its_states_fit_into_registers(states, hidden):
    def mix(x):
        return update(Anderson(1.0), [mx.sin(x) for _ in range(states)]).out

    assert nodes(mix, mx.zeros((1, 1, hidden)))["CustomKernel"] == 1
    assert "CustomKernel" not in nodes(mix, mx.zeros((1, 1, hidden + 4)))


def test_a_slice_of_any_rank_goes_to_the_kernel_as_a_view():
    def strided(x):
        return combine((0.5, 0.5), (x[..., 1:4, :], x[..., 2:5, :]))

    for lead in ((), (2,), (2, 3)):
        found = nodes(strided, mx.zeros((*lead, 6, 32)))
        assert found.pop("CustomKernel") == 1
        assert set(found) <= {"Slice", "ExpandDims", "Flatten", "Reshape"}


@pytest.mark.skipif(not on_gpu(), reason="needs a GPU that MLX can use")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gpu_computes_every_update(case):
    backend = "cuda" if mx.cuda.is_available() else "metal"
    outputs = launch(case.variant, backend, *case.arrays())
    case.check([np.array(x.astype(F32), np.float64) for x in outputs])


# Not all: MLX compiles C++ for each.
TWINS = CASES[2::4]


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_the_twin_computes_every_update(case):
    outputs = twin(case.variant)(*case.arrays())
    case.check([np.array(x.astype(F32), np.float64) for x in outputs])


@needs_compiler
def test_cuda_text_computes_every_update(tmp_path):
    """The same body behind CUDA's words. No CUDA compiler has a part in it."""
    chosen = CASES[::3]
    for case in chosen:
        case.function = gpu_on_host.cuda(case.variant, case.examples())
    functions = [case.function for case in chosen]
    programs = gpu_on_host.compile_all(tmp_path, functions, ["address,undefined"])
    jobs = [Job(i, case.function, case.inputs) for i, case in enumerate(chosen)]
    for case, outputs in zip(
        chosen, gpu_on_host.run(programs["address,undefined"], jobs), strict=True
    ):
        case.check(outputs)


@pytest.mark.skipif(
    gpu_on_host.nvrtc() is None,
    reason="needs nvidia-cuda-nvrtc-cu12, nvidia-cuda-runtime-cu12 and nvidia-cuda-cccl-cu12",
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nvidias_compiler_keeps_states_in_registers_and_reads_four_columns_at_once(case):
    text = gpu_on_host.ptx(gpu_on_host.cuda(case.variant, case.examples()))
    assert ".local" not in text
    wide = len(re.findall(r"ld\.global\S*\.v[24]", text))
    assert case.shape[2] < 4 or wide >= case.variant.states
