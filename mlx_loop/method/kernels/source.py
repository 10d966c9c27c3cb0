"""The kernels' text: one body for Metal and CUDA, a prelude for each, and their launch.

A body never names an address space, a barrier or an index: the prelude gives those their words.
What differs between variants (how many states, which extras) is written out when the text is
made; dtype and hidden size are template arguments; coefficients are data, so that another beta
or K compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

MAX_STATES = 8
_MAX_THREADS = 512
# Turns of four columns for each thread, up to which a row stays in registers.
_KEPT_TURNS = 4


@dataclass(frozen=True)
class Variant:
    """What one kernel computes. Every variant has a name, a text and a plain-MLX twin of its own.

    Attributes:
        form: `linear`, `out = sum_j c_j y_j`; `aitken`, of y = (x, g(x), g(g(x))); `anderson`, of
            y = (x, g(x)) and as many earlier pairs, the newest first.
        states: how many y there are.
        measured: norms to measure, each of a linear combination of the y.
        rescaled: whether each token of `out` is brought to a norm between two given ones.
        norms: whether those two are an input; otherwise they are the first two measured.
        wide: whether `out` is float32; otherwise it has the last state's dtype.
    """

    form: str
    states: int
    measured: int = 0
    rescaled: bool = False
    norms: bool = False
    wide: bool = False

    @property
    def by_row(self) -> bool:
        """Whether a token needs a sum over itself, so that one threadgroup does all of it."""
        return self.form == "anderson" or bool(self.measured or self.rescaled)

    @property
    def name(self) -> str:
        extras = ("rescaled", "norms", "wide")
        words = [word for word in extras if getattr(self, word)]
        return "_".join(["mlx_loop", self.form, str(self.states), str(self.measured), *words])

    @property
    def inputs(self) -> list[str]:
        """`coefficients`, float32: `measured` + 1 rows for the y, then `at`.

        The first row of `aitken` is not read; that of `anderson` begins with the damping.
        """
        return ["coefficients", *(f"y{j}" for j in range(self.states)), *["norms"] * self.norms]

    @property
    def outputs(self) -> list[str]:
        return ["out", *["measured"] * bool(self.measured)]


# --- Preludes -------------------------------------------------------------------------------

# Four neighbours are read by four plain reads, which the Metal compiler joins into one: it needs no
# more alignment than an element's, so any hidden size and any offset will do. A template over the
# pointer, because MLX passes inputs of fewer than 8 elements in the constant address space.
METAL_PRELUDE = """
#define LOOP_SHARED threadgroup
#define LOOP_BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)

namespace mlx_loop {

template <typename P>
void load4(P from, int64_t stride, int count, thread float* to) {
  if (stride == 1 && count == 4) {
    for (int k = 0; k < 4; ++k) to[k] = static_cast<float>(from[k]);
  } else {
    for (int k = 0; k < 4; ++k) to[k] = k < count ? static_cast<float>(from[k * stride]) : 0.0f;
  }
}

template <typename T>
void store4(thread const float* from, int count, device T* to) {
  if (count == 4) {
    for (int k = 0; k < 4; ++k) to[k] = static_cast<T>(from[k]);
  } else {
    for (int k = 0; k < 4; ++k) {
      if (k < count) to[k] = static_cast<T>(from[k]);
    }
  }
}

inline float lanes_sum(float x) { return simd_sum(x); }

}  // namespace mlx_loop
"""

CUDA_PRELUDE = """
#define LOOP_SHARED __shared__
#define LOOP_BARRIER __syncthreads()

namespace mlx_loop {

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <typename T>
__device__ bool aligned(const T* p) {
  return reinterpret_cast<size_t>(p) % sizeof(Four<T>) == 0;
}

template <typename T>
__device__ void load4(const T* from, int64_t stride, int count, float* to) {
  if (stride == 1 && count == 4 && aligned(from)) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
    for (int k = 0; k < 4; ++k) to[k] = static_cast<float>(four.at[k]);
  } else {
    for (int k = 0; k < 4; ++k) to[k] = k < count ? static_cast<float>(from[k * stride]) : 0.0f;
  }
}

template <typename T>
__device__ void store4(const float* from, int count, T* to) {
  if (count == 4 && aligned(to)) {
    Four<T> four;
    for (int k = 0; k < 4; ++k) four.at[k] = static_cast<T>(from[k]);
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
    for (int k = 0; k < 4; ++k) {
      if (k < count) to[k] = static_cast<T>(from[k]);
    }
  }
}

__device__ inline float lanes_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

}  // namespace mlx_loop
"""

# Which token and which columns are this thread's. MLX looks for the attributes in the body alone.
_METAL_INDICES = {
    False: "const uint item = thread_position_in_grid.x;\n",
    True: """const uint row = threadgroup_position_in_grid.x;
  const int worker = thread_index_in_threadgroup;
  const int lane = thread_index_in_simdgroup;
  const int team = simdgroup_index_in_threadgroup;
""",
}
_CUDA_INDICES = {
    False: "const unsigned item = blockIdx.x * blockDim.x + threadIdx.x;\n",
    True: """const unsigned row = blockIdx.x;
  const int worker = threadIdx.x;
  const int lane = worker % 32;
  const int team = worker / 32;
""",
}

# --- Bodies ---------------------------------------------------------------------------------

_LINEAR = """z[0][k] = coefficients[0] * y[0][k];
#pragma unroll
        for (int j = 1; j < STATES; ++j) z[0][k] += coefficients[j] * y[j][k];"""

_AITKEN = """const float d1 = y[1][k] - y[0][k];
        const float d2 = y[2][k] - 2 * y[1][k] + y[0][k];
        const float size = fabs(d1);
        const float step = fabs(d2) > 1e-3f * size ? -d1 * d1 / d2 : d1;
        z[0][k] = y[0][k] + (step < -size ? -size : step > size ? size : step);"""

_MIXED = "z[0][k] = kept[turn][k];"

# Modified Gram-Schmidt on the differences q of f, newest first, with p, what the update changes by
# when f changes by q, carried along; the update is in `kept`. All of it stays in registers.
_ANDERSON = r"""#define LOOP_DOT(total, a, b) \
  total = 0; \
  for (int turn = 0; turn < TURNS; ++turn) {{ \
    for (int k = 0; k < 4; ++k) total += a[turn][k] * b[turn][k]; \
  }} \
  total = mlx_loop::lanes_sum(total); \
  if (lane == 0) dots[team] = total; \
  LOOP_BARRIER; \
  total = mlx_loop::lanes_sum(lane < TEAMS ? dots[lane] : 0); \
  LOOP_BARRIER

  LOOP_SHARED float dots[TEAMS];
  constexpr int PAIRS = STATES / 2 - 1;
  float f[TURNS][4], q[PAIRS][TURNS][4], p[PAIRS][TURNS][4], squares[PAIRS];
#pragma unroll 4
  for (int turn = 0; turn < TURNS; ++turn) {{
    const int column = 4 * (turn * THREADS + worker);
    const int left = HIDDEN - column, count = left < 0 ? 0 : left < 4 ? left : 4;
    float y[STATES][4];
    {loads}
    for (int k = 0; k < 4; ++k) {{
      f[turn][k] = y[1][k] - y[0][k];
      kept[turn][k] = y[0][k] + coefficients[0] * f[turn][k];
      float newer = f[turn][k];
      for (int i = 0; i < PAIRS; ++i) {{
        const float older = y[2 * i + 3][k] - y[2 * i + 2][k];
        q[i][turn][k] = newer - older;
        p[i][turn][k] = y[2 * i][k] - y[2 * i + 2][k] + coefficients[0] * q[i][turn][k];
        newer = older;
      }}
    }}
  }}
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {{
    float length, r;
    LOOP_DOT(length, q[i], q[i]);
#pragma unroll
    for (int j = 0; j < i; ++j) {{
      LOOP_DOT(r, q[j], q[i]);
      r = squares[j] > 0 ? r / squares[j] : 0;
      for (int turn = 0; turn < TURNS; ++turn) {{
        for (int k = 0; k < 4; ++k) {{
          q[i][turn][k] -= r * q[j][turn][k];
          p[i][turn][k] -= r * p[j][turn][k];
        }}
      }}
    }}
    LOOP_DOT(squares[i], q[i], q[i]);
    // What is left of a dependent difference is rounding: no direction at all.
    if (!(squares[i] > 1e-10f * length)) squares[i] = 0;
    LOOP_DOT(r, q[i], f);
    r = squares[i] > 0 ? r / squares[i] : 0;
    for (int turn = 0; turn < TURNS; ++turn) {{
      for (int k = 0; k < 4; ++k) kept[turn][k] -= r * p[i][turn][k];
    }}
  }}"""

# The four columns from `column` on: z[0] is the update, z[1], ... are what is measured.
_FORM = """const int count = HIDDEN % 4 && HIDDEN - column < 4 ? HIDDEN - column : 4;
      float y[STATES][4], z[ROWS][4];
      {loads}
      for (int k = 0; k < 4; ++k) {{
        {form}
#pragma unroll
        for (int r = 1; r < ROWS; ++r) {{
          z[r][k] = 0;
#pragma unroll
          for (int j = 0; j < STATES; ++j) z[r][k] += coefficients[r * STATES + j] * y[j][k];
        }}
      }}"""

_TOKEN = """const int64_t batch = row / y0_shape[1];
  const int64_t position = row % y0_shape[1];
"""

_ELEMENTWISE = """
  constexpr int STATES = {states}, ROWS = 1;
  constexpr unsigned QUADS = (HIDDEN + 3) / 4;
  const unsigned row = item / QUADS;
  const int column = 4 * (item % QUADS);
  if (row < unsigned(y0_shape[0] * y0_shape[1])) {{
    {token}
      {formed}
      mlx_loop::store4(z[0], count, out + int64_t(row) * HIDDEN + column);
  }}
"""

# One token per threadgroup, four neighbouring columns per thread and turn. A row of up to four
# turns stays in registers between its sum and its rescale; a longer one is formed again, from the
# caches.
_BY_ROW = """
  constexpr int STATES = {states}, MEASURED = {measured}, ROWS = MEASURED + 1;
  constexpr int SUMS = MEASURED + {sized};
  constexpr int TURNS = (HIDDEN + 4 * THREADS - 1) / (4 * THREADS);
  constexpr int KEPT = TURNS <= {kept_turns} ? TURNS : 0;
  constexpr int TEAMS = THREADS / 32;
  {token}
  float sums[SUMS], kept[KEPT ? KEPT : 1][4];
  {mix}
#pragma unroll
  for (int s = 0; s < SUMS; ++s) sums[s] = 0;
#pragma unroll 4
  for (int turn = 0; turn < TURNS; ++turn) {{
    const int column = 4 * (turn * THREADS + worker);
    if (column < HIDDEN) {{
      {formed}
      for (int k = 0; k < 4; ++k) {{
#pragma unroll
        for (int s = 0; s < SUMS; ++s) {{
          const float value = z[s < MEASURED ? s + 1 : 0][k];
          sums[s] += value * value;
        }}
        if (turn < KEPT) kept[turn][k] = z[0][k];
      }}
    }}
  }}

  LOOP_SHARED float partial[SUMS][TEAMS];
#pragma unroll
  for (int s = 0; s < SUMS; ++s) {{
    sums[s] = mlx_loop::lanes_sum(sums[s]);
    if (lane == 0) partial[s][team] = sums[s];
  }}
  LOOP_BARRIER;
#pragma unroll
  for (int s = 0; s < SUMS; ++s) sums[s] = mlx_loop::lanes_sum(lane < TEAMS ? partial[s][lane] : 0);

  {report}
  {rescale}
#pragma unroll 4
  for (int turn = 0; turn < TURNS; ++turn) {{
    const int column = 4 * (turn * THREADS + worker);
    if (column < HIDDEN) {{
      float value[4];
      if (KEPT) {{
        for (int k = 0; k < 4; ++k) value[k] = kept[turn][k];
      }} else {{
        {formed}
        for (int k = 0; k < 4; ++k) value[k] = z[0][k];
      }}
      const int count = HIDDEN % 4 && HIDDEN - column < 4 ? HIDDEN - column : 4;
      for (int k = 0; k < 4; ++k) value[k] *= scale;
      mlx_loop::store4(value, count, out + int64_t(row) * HIDDEN + column);
    }}
  }}
"""

_REPORT = """if (worker < MEASURED) {
    float square = sums[0];
#pragma unroll
    for (int s = 1; s < MEASURED; ++s) square = worker == s ? sums[s] : square;
    measured[int64_t(row) * MEASURED + worker] = sqrt(square);
  }"""

_GIVEN_NORMS = """const int64_t token = batch * norms_strides[0] + position * norms_strides[1];
  const float start = norms[token], end = norms[token + norms_strides[2]];"""

_MEASURED_NORMS = "const float start = sqrt(sums[0]), end = sqrt(sums[1]);"

_RESCALE = """{norms}
  const float square = sums[SUMS - 1] < 1e-24f ? 1e-24f : sums[SUMS - 1];
  const float at = coefficients[ROWS * STATES];
  const float scale = ((1 - at) * start + at * end) / sqrt(square);"""


def body(variant: Variant) -> str:
    """The text that Metal and CUDA share."""
    loads = "\n      ".join(
        f"mlx_loop::load4(y{j} + batch * y{j}_strides[0] + position * y{j}_strides[1]"
        f" + column * y{j}_strides[2], y{j}_strides[2], count, y[{j}]);"
        for j in range(variant.states)
    )
    form = {"linear": _LINEAR, "aitken": _AITKEN, "anderson": _MIXED}[variant.form]
    filled = {
        "states": variant.states,
        "token": _TOKEN,
        "formed": _FORM.format(loads=loads, form=form),
    }
    if not variant.by_row:
        return _ELEMENTWISE.format(**filled)
    mixes = variant.form == "anderson"
    norms = _GIVEN_NORMS if variant.norms else _MEASURED_NORMS
    return _BY_ROW.format(
        **filled,
        measured=variant.measured,
        kept_turns=_KEPT_TURNS,
        sized=int(variant.rescaled or not variant.measured),
        mix=_ANDERSON.format(loads=loads) if mixes else "",
        report=_REPORT if variant.measured else "",
        rescale=_RESCALE.format(norms=norms) if variant.rescaled else "const float scale = 1;",
    )


# --- Functions ------------------------------------------------------------------------------


def text(variant: Variant, backend: str) -> tuple[str, str]:
    """The prelude and the function body of a variant on `metal` or `cuda`."""
    if backend == "cuda":
        return CUDA_PRELUDE, _CUDA_INDICES[variant.by_row] + body(variant)
    return METAL_PRELUDE, _METAL_INDICES[variant.by_row] + body(variant)


@cache
def build(variant: Variant, backend: str) -> Any:
    """MLX's function of a variant on `metal` or `cuda`, built once."""
    make = mx.fast.cuda_kernel if backend == "cuda" else mx.fast.metal_kernel
    header, source = text(variant, backend)
    return make(
        name=variant.name,
        input_names=variant.inputs,
        output_names=variant.outputs,
        source=source,
        header=header,
        ensure_row_contiguous=False,
    )


def threads(hidden: int) -> int:
    """Threads for a row: a multiple of 32, at most 512, as few idle ones as can be."""
    quads = -(-hidden // 4)
    turns = -(-quads // _MAX_THREADS)
    return -(-quads // turns // 32) * 32


def fits(variant: Variant, hidden: int) -> bool:
    """Whether there is a kernel: as many buffers as it may have, and registers for `anderson`."""
    if variant.form == "anderson":
        turns = -(-hidden // (4 * threads(hidden)))
        pairs = variant.states // 2 - 1
        return variant.states <= MAX_STATES and turns <= _KEPT_TURNS and pairs * turns <= 6
    return variant.states <= MAX_STATES


def launch(variant: Variant, backend: str, coefficients: mx.array, *arrays: mx.array) -> Any:
    """Run a variant's kernel.

    Args:
        coefficients: float32, one dimension (`Variant.inputs`).
        arrays: the states, (batch, length, hidden) each, any strides; then, where the variant
            takes them, the norms, (batch, length, 2) float32.

    Returns:
        The variant's outputs: (batch, length, hidden) and, where norms are measured,
        (batch, length, measured) float32.
    """
    states = arrays[: variant.states]
    shape, dtype = states[0].shape, states[-1].dtype
    rows, hidden = shape[0] * shape[1], shape[2]
    per_row = threads(hidden)
    items = rows * per_row if variant.by_row else rows * -(-hidden // 4)
    template: list[tuple[str, Any]] = [("HIDDEN", hidden)]
    kinds = {
        "out": (shape, mx.float32 if variant.wide else dtype),
        "measured": ((*shape[:2], variant.measured), mx.float32),
    }
    shapes, dtypes = zip(*(kinds[name] for name in variant.outputs), strict=True)
    return build(variant, backend)(
        inputs=[coefficients, *arrays],
        template=template + [("THREADS", per_row)] * variant.by_row,
        grid=(items, 1, 1),
        threadgroup=(per_row, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
