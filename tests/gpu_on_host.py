"""GPU functions, as MLX generates them, compiled by the host's C++ compiler and run by threads.

The Metal text is MLX's own: while a function is exported, MLX records a Metal kernel with its text,
grid and threadgroup on a machine without Metal too. The CUDA text is put together here as
mlx/backend/cuda/custom_kernel.cpp of MLX 0.32.2 does, since MLX without CUDA refuses to.
The words of both languages get their meaning from the headers in tests/host.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_loop.method.kernels import source

update = sys.modules["mlx_loop.method.kernels.update"]

HEADERS = Path(__file__).parent / "host"
SANITIZERS = ("address,undefined", "thread")
FLAGS = "-std=c++17 -O0 -pthread -fno-sanitize-recover=all -Wno-attributes -Wno-unknown-pragmas"
# What a thread reads of its own before it writes it is never a harmless zero.
POISONED_VARIABLES = "-ftrivial-auto-var-init=pattern"

META, DATA, OUTPUT = range(3)


@cache
def compiler() -> str | None:
    """The C++ compiler, if there is one and it has the sanitizers."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        return None
    for sanitizer in SANITIZERS:
        flags = [f"-fsanitize={sanitizer}", POISONED_VARIABLES, "-std=c++17", "-x", "c++", "-"]
        trial = [found, *flags, "-o", "/dev/null"]
        if subprocess.run(trial, input=b"int main() {}", capture_output=True).returncode:
            return None
    return found


needs_compiler = pytest.mark.skipif(
    compiler() is None,
    reason="needs a C++ compiler with address, undefined-behaviour and thread sanitizers",
)


# --- Texts ----------------------------------------------------------------------------------


@dataclass
class Function:
    """One generated function and how MLX launches it.

    Attributes:
        text: the function as the device's compiler gets it.
        call: the function with its template arguments.
        parameters: their names in order; the buffers come first.
        grid, threads: threads in all and in a threadgroup.
        meta: for each input, whether its shape and its strides are buffers too.
        outputs: shape and dtype of each.
    """

    text: str
    call: str
    parameters: list[str]
    grid: int
    threads: int
    meta: list[tuple[bool, bool]]
    outputs: list[tuple[tuple[int, ...], mx.Dtype]]
    language: str = "metal"


def metal(variant: source.Variant, arrays: Sequence[mx.array], fault=None) -> Function:
    """The Metal function that MLX would launch; `fault`: a text in it and its replacement."""
    nodes: list[dict] = []
    with mock.patch.object(source, "text", planted(fault)):
        source.build.cache_clear()
        mx.export_function(nodes.append, lambda *a: source.launch(variant, "metal", *a), *arrays)
        source.build.cache_clear()
    (node,) = (node for node in nodes if node.get("name") == "CustomKernel")
    _, text, gx, gy, gz, tx, ty, tz, meta, contiguous, *_ = node["arguments"]
    assert (gy, gz, ty, tz) == (1, 1, 1, 1)
    assert not contiguous
    signature = re.search(r"\[\[kernel\]\] void \w+\(\n(.*?)\) \{\n", text, re.S).group(1)
    parameters = [re.split(r"[ *]+", p.split(" [[")[0])[-1] for p in signature.split(",\n")]
    call = re.search(r"decltype\(([^()]+)\) \1;", text).group(1)
    outputs = [(shape, dtype) for _, shape, dtype in node["outputs"]]
    return Function(text, call, parameters, gx, min(gx, tx), [m[:2] for m in meta], outputs)


def planted(fault):
    original = source.text

    def text(variant, backend):
        header, body = original(variant, backend)
        if fault is None:
            return header, body
        assert fault[0] in body, f"nothing to replace: {fault[0]}"
        return header, body.replace(*fault)

    return text


CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}


def cuda(variant: source.Variant, arrays: Sequence[mx.array]) -> Function:
    """The CUDA function; its launch is that of Metal."""
    launch = metal(variant, arrays)
    header, body = source.text(variant, "cuda")
    lines, parameters = [], []
    for name, x in zip(variant.inputs, arrays, strict=True):
        lines.append(f"    const {CUDA_TYPES[x.dtype]}* {name}")
        parameters.append(name)
        for suffix, kind in (("_shape", "Shape"), ("_strides", "Strides")):
            if name + suffix in body:
                lines.append(f"    const __grid_constant__ {kind} {name}{suffix}")
                parameters.append(f"{kind}:{name}{suffix}")
    for name, (_, dtype) in zip(variant.outputs, launch.outputs, strict=True):
        lines.append(f"    {CUDA_TYPES[dtype]}* {name}")
        parameters.append(name)
    constants = re.search(r"template <(.*?)>\n\[\[kernel", launch.text).group(1).split(", ")
    values = re.search(r"<(.*)>", launch.call).group(1).split(", ")
    constexpr = [f"  constexpr {c} = {v};\n" for c, v in zip(constants, values, strict=True)]
    text = (
        header
        + "namespace mlx::core::cu {\n\n__global__ void generated(\n"
        + ",\n".join(lines)
        + ") {\n"
        + "".join(constexpr)
        + "\n"
        + body
        + "\n}\n\n} // namespace mlx::core::cu\n"
    )
    grid = -(-launch.grid // launch.threads) * launch.threads
    call = "mlx::core::cu::generated"
    return Function(
        text, call, parameters, grid, launch.threads, launch.meta, launch.outputs, "cuda"
    )


# --- Programs -------------------------------------------------------------------------------


def argument(function: Function, place: int) -> str:
    name = function.parameters[place]
    if ":" in name:
        return f"host::by_value<{name.split(':')[0]}>(b[{place}])"
    if name in ATTRIBUTES:
        return ATTRIBUTES[name]
    return f"b[{place}]"


ATTRIBUTES = {
    "thread_position_in_grid": "uint3{at.group * at.threads + at.index, 0, 0}",
    "threadgroup_position_in_grid": "uint3{at.group, 0, 0}",
    "thread_index_in_threadgroup": "at.index",
    "thread_index_in_simdgroup": "at.index % 32",
    "simdgroup_index_in_threadgroup": "at.index / 32",
}


def compile_all(
    folder: Path, functions: Sequence[Function], sanitizers: Sequence[str] = SANITIZERS
) -> dict[str, Path]:
    """One program of all functions for each sanitizer, compiled side by side."""
    text = [f'#include "{functions[0].language}.h"\n']
    for i, function in enumerate(functions):
        (folder / f"{i}.txt").write_text(function.text)
        arguments = ", ".join(argument(function, j) for j in range(len(function.parameters)))
        text.append(
            f'namespace f{i} {{\n#include "{folder / f"{i}.txt"}"\n'
            f"void call(const host::Buffer* b, const host::Thread& at) {{\n"
            f"  {function.call}({arguments});\n}}\n}}\n"
        )
    calls = ", ".join(f"f{i}::call" for i in range(len(functions)))
    text.append(f"const host::Function all[] = {{{calls}}};\n")
    text.append("int main(int argc, char** argv) { return host::main(argc, argv, all); }\n")
    main = folder / "main.cpp"
    main.write_text("".join(text))
    flags = [*FLAGS.split(), POISONED_VARIABLES, f"-I{HEADERS}"]
    programs = {s: folder / s.replace(",", "_") for s in sanitizers}
    running = [
        subprocess.Popen(
            [compiler(), *flags, f"-fsanitize={s}", main, "-o", program],
            stderr=subprocess.PIPE,
            text=True,
        )
        for s, program in programs.items()
    ]
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    return programs


# --- Runs -----------------------------------------------------------------------------------


class Broken(Exception):
    """What a sanitizer or the engine says of a run."""


@dataclass
class Memory:
    """An array as it lies in memory: a view into a buffer that is exactly as large as `base`."""

    base: np.ndarray
    view: np.ndarray
    dtype: mx.Dtype

    @property
    def offset(self) -> int:
        return self.view.__array_interface__["data"][0] - self.base.__array_interface__["data"][0]

    @property
    def strides(self) -> list[int]:
        return [s // self.view.itemsize for s in self.view.strides]


@dataclass
class Job:
    """A launch: a function, by its number in the program, and its inputs."""

    number: int
    function: Function
    inputs: list[Memory] = field(default_factory=list)

    def write(self) -> bytes:
        function = self.function
        buffers: list[tuple[int, int, bytes | int]] = []
        for memory, (shape, strides) in zip(self.inputs, function.meta, strict=True):
            buffers.append((DATA, memory.offset, memory.base.tobytes()))
            if shape:
                buffers.append((META, 0, packed(memory.view.shape, np.int32, function)))
            if strides:
                buffers.append((META, 0, packed(memory.strides, np.int64, function)))
        for shape, dtype in function.outputs:
            buffers.append((OUTPUT, 0, int(np.prod(shape)) * dtype.size))
        out = [struct.pack("4i", self.number, function.grid, function.threads, len(buffers))]
        for kind, offset, content in buffers:
            size = content if isinstance(content, int) else len(content)
            out.append(struct.pack("=iiq", kind, offset, size))
            out.append(b"" if isinstance(content, int) else content)
        return b"".join(out)


def packed(values, dtype, function: Function) -> bytes:
    # CUDA passes shapes and strides by value, in arrays of 8.
    size = len(values) if function.language == "metal" else 8
    out = np.zeros(size, dtype)
    out[: len(values)] = values
    return out.tobytes()


def run(program: Path, jobs: Sequence[Job]) -> list[list[np.ndarray]]:
    """The outputs of each job, as float64.

    Raises:
        Broken: a sanitizer or the engine found fault.
    """
    order, results = program.with_suffix(".jobs"), program.with_suffix(".results")
    order.write_bytes(struct.pack("i", len(jobs)) + b"".join(job.write() for job in jobs))
    environment = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [program, order, results]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise Broken(ended.stderr)
    content = results.read_bytes()
    found = []
    for job in jobs:
        outputs = []
        for shape, dtype in job.function.outputs:
            size = int(np.prod(shape)) * dtype.size
            outputs.append(decode(content[:size], dtype).reshape(shape))
            content = content[size:]
        found.append(outputs)
    assert not content
    return found


def decode(content: bytes, dtype: mx.Dtype) -> np.ndarray:
    if dtype == mx.bfloat16:
        words = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
        return words.view(np.float32).astype(np.float64)
    kind = {mx.float32: np.float32, mx.float16: np.float16}[dtype]
    return np.frombuffer(content, kind).astype(np.float64)


def encode(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Values rounded to a dtype, as words of its size."""
    x = mx.array(values.astype(np.float32)).astype(dtype)
    return np.array(x.view(mx.uint16 if dtype.size == 2 else mx.uint32))


# --- Models ---------------------------------------------------------------------------------


class Launches:
    """In the place of `source.launch`, for models that go the way of a GPU.

    Which functions a run needs is not known before it. In a first run, updates are plain MLX;
    after `compile` they are the Metal functions.

    Attributes:
        count: of launches by them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._examples: dict[tuple, list[mx.array]] = {}
        self._functions: dict[tuple, Function] = {}
        self._program: Path | None = None

    def compile(self, folder: Path) -> None:
        self._functions = {key: metal(key[0], arrays) for key, arrays in self._examples.items()}
        (self._program,) = compile_all(
            folder, list(self._functions.values()), SANITIZERS[:1]
        ).values()

    def __call__(
        self, variant: source.Variant, backend: str, *arrays: mx.array
    ) -> Sequence[mx.array]:
        key = variant, *((x.shape, x.dtype) for x in arrays)
        if self._program is None:
            self._examples[key] = [mx.zeros(x.shape, x.dtype) for x in arrays]
            return update.plain(variant)(*arrays)
        self.count += 1
        inputs = [Memory(words, words, x.dtype) for x in arrays for words in [np.array(x)]]
        job = Job(list(self._functions).index(key), self._functions[key], inputs)
        (outputs,) = run(self._program, [job])
        return [mx.array(x.astype(np.float32)) for x in outputs]

    @contextmanager
    def in_models(self) -> Iterator[None]:
        with (
            mock.patch.object(update, "launch", self),
            mock.patch.object(update, "on_gpu", return_value=True),
        ):
            yield


# --- NVIDIA's compiler ----------------------------------------------------------------------

CUDA_HEADERS = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef int int32_t;
typedef long long int64_t;
template <typename T>
struct Axes {
  T at[8];
  __device__ const T& operator[](int i) const { return at[i]; }
};
using Shape = Axes<int32_t>;
using Strides = Axes<int64_t>;
"""


@cache
def nvrtc() -> tuple[ctypes.CDLL, list[bytes]] | None:
    """NVIDIA's compiler, which needs no GPU, and its options, where its wheels are installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations if spec else ())]
    libraries = [path for root in roots for path in root.glob("*/lib/libnvrtc.so.*")]
    headers = [path.parent for root in roots for path in root.glob("*/include/cuda_bf16.h")]
    if not libraries or not headers:
        return None
    includes = [f"--include-path={path}".encode() for path in headers]
    return ctypes.CDLL(str(libraries[0])), [*includes, b"--gpu-architecture=compute_80"]


def ptx(function: Function) -> str:
    """What NVIDIA's compiler makes of a CUDA function."""
    library, options = nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = (CUDA_HEADERS + function.text).encode()
    library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None)
    failed = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )
    get, get_size = (
        (library.nvrtcGetProgramLog, library.nvrtcGetProgramLogSize)
        if failed
        else (library.nvrtcGetPTX, library.nvrtcGetPTXSize)
    )
    get_size(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    get(program, content)
    assert not failed, content.value.decode()
    return content.value.decode()
