"""One update of an integrator: states in, the next state out, in float32 and in one kernel.

`update` is all of it: a linear combination of states (or Aitken's formula) and, in the same pass
where they are wanted, norms of other combinations, a rescale of each token, and the RMSNorm of the
result. On Metal and CUDA that is one launch (`source`); elsewhere, and for derivatives, its
plain-MLX twin is one compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from .source import MAX_STATES, Variant, launch


class Rescale(NamedTuple):
    """Bring each token to the L2 norm `start + at (end - start)`; a zero token stays zero.

    Attributes:
        at: 0: the first norm; 1: the second.
        norms: (batch, length, 2) float32, start and end; None: the first two that are measured.
    """

    at: float
    norms: mx.array | None = None


class RMSNorm(NamedTuple):
    """RMSNorm of the result, as `mx.fast.rms_norm` has it. `weight`: (hidden,)."""

    weight: mx.array
    eps: float


class Update(NamedTuple):
    """What an update gives; what was not asked for is None.

    Attributes:
        out: (batch, length, hidden), the states' dtype: the next state.
        norms: (batch, length, measured) float32: the L2 norms of the measured combinations.
        normed: (batch, length, hidden), the states' dtype: the RMSNorm of `out`.
    """

    out: mx.array
    norms: mx.array | None
    normed: mx.array | None


def combine(
    coefficients: Sequence[float], states: Sequence[mx.array], *, use_kernel: bool | None = None
) -> mx.array:
    """`sum_j c_j y_j`, accumulated in float32; more than 8 states take a launch for every 7.

    Args:
        coefficients: as many as there are states.
        states: (batch, length, hidden) each, all of one dtype.
        use_kernel: False: the plain-MLX twin; None: the kernel where there is a GPU.

    Returns:
        (batch, length, hidden) in the states' dtype. Where one coefficient is 1 and the others
        are 0 that state itself is returned, so a step that changes nothing is exact.
    """
    terms = [(c, state) for c, state in zip(coefficients, states, strict=True) if c]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    weights, used = map(list, zip(*terms, strict=True))
    if len(used) > MAX_STATES and _backend(used, use_kernel):
        first = _constants((*weights[:MAX_STATES], 0.0, 0.0))
        wide = Variant("linear", MAX_STATES, wide=True)
        partial = _evaluate(wide, [first, *used[:MAX_STATES]], use_kernel)[0]
        rest = used[MAX_STATES:]
        return combine([1.0, *weights[MAX_STATES:]], [partial, *rest], use_kernel=use_kernel)
    return update(weights, used, use_kernel=use_kernel).out


def update(
    form: Sequence[float] | Literal["aitken"],
    states: Sequence[mx.array],
    *,
    measure: Sequence[Sequence[float]] = (),
    rescale: Rescale | None = None,
    rms_norm: RMSNorm | None = None,
    use_kernel: bool | None = None,
) -> Update:
    """The next state, with what else is wanted of the same pass over the states, as one launch.

    Args:
        form: coefficients, one per state; or `aitken`, of the states (x, g(x), g(g(x))).
        states: up to 8, (batch, length, hidden) each, any strides, all of one dtype.
        measure: coefficients, one per state, of each combination whose norms are wanted: that of
            the residual is `(-1, 1)` of (x, g(x)).
        rescale: bring each token to a norm.
        rms_norm: the norm that the next layer begins with.
        use_kernel: False: the plain-MLX twin; None: the kernel where there is a GPU.
    """
    linear = form != "aitken"
    rows = [form if linear else (0.0,) * len(states), *measure]
    variant = Variant(
        "linear" if linear else "aitken",
        len(states),
        measured=len(measure),
        rescaled=rescale is not None,
        norms=rescale is not None and rescale.norms is not None,
        rms_norm=rms_norm is not None,
    )
    at, eps = rescale.at if rescale else 0.0, rms_norm.eps if rms_norm else 0.0
    arrays = [_constants((*(float(c) for row in rows for c in row), at, eps)), *states]
    if rescale is not None and rescale.norms is not None:
        arrays.append(rescale.norms)
    if rms_norm is not None:
        arrays.append(rms_norm.weight)
    found = dict(zip(variant.outputs, _evaluate(variant, arrays, use_kernel), strict=True))
    return Update(found["out"], found.get("measured"), found.get("normed"))


def token_norm(x: mx.array) -> mx.array:
    """L2 norm of each token: (batch, length, hidden) -> (batch, length, 1), float32."""
    return mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True)


@lru_cache(maxsize=1024)
def _constants(values: tuple[float, ...]) -> mx.array:
    return mx.array(values, dtype=mx.float32)


# --- The twin -------------------------------------------------------------------------------

Function = Callable[..., Sequence[mx.array]]


@lru_cache(maxsize=None)
def _twin(variant: Variant) -> Function:
    """The variant in plain MLX: one compiled graph for every shape. Arguments as for `launch`."""

    def compute(coefficients: mx.array, *arrays: mx.array) -> list[mx.array]:
        count = variant.states
        states, extras = arrays[:count], list(arrays[count:])
        dtype = mx.float32 if variant.wide else states[-1].dtype
        y = [state.astype(mx.float32) for state in states]

        def combination(row: int) -> mx.array:
            total = coefficients[row * count] * y[0]
            for j in range(1, count):
                total = total + coefficients[row * count + j] * y[j]
            return total

        out = combination(0) if variant.form == "linear" else _aitken(*y)
        measured = [token_norm(combination(row + 1)) for row in range(variant.measured)]
        if variant.rescaled:
            at = coefficients[-2]
            if variant.norms:
                # Not slices, which have no shape in a graph for every shape.
                share = (1 - at) * mx.array([1.0, 0.0]) + at * mx.array([0.0, 1.0])
                target = mx.sum(share * extras.pop(0), axis=-1, keepdims=True)
            else:
                target = (1 - at) * measured[0] + at * measured[1]
            square = mx.maximum(mx.sum(out * out, axis=-1, keepdims=True), 1e-24)
            out = out * (target * mx.rsqrt(square))
        found = [out.astype(dtype)]
        if measured:
            found.append(mx.concatenate(measured, axis=-1))
        if variant.rms_norm:
            mean = mx.mean(out * out, axis=-1, keepdims=True)
            weight = extras.pop(0).astype(mx.float32)
            found.append((out * mx.rsqrt(mean + coefficients[-1]) * weight).astype(dtype))
        return found

    return mx.compile(compute, shapeless=True)


def _aitken(x: mx.array, g1: mx.array, g2: mx.array) -> mx.array:
    d1 = g1 - x
    d2 = g2 - 2 * g1 + x
    size = mx.abs(d1)
    clear = mx.abs(d2) > 1e-3 * size
    step = mx.where(clear, -d1 * d1 / mx.where(clear, d2, 1), d1)
    return x + mx.clip(step, -size, size)


# --- The dispatcher -------------------------------------------------------------------------


def _evaluate(
    variant: Variant, arrays: Sequence[mx.array], use_kernel: bool | None
) -> Sequence[mx.array]:
    backend = _backend(arrays[1 : 1 + variant.states], use_kernel)
    return (_twin(variant) if backend is None else _kernel(variant, backend))(*arrays)


def _backend(states: Sequence[mx.array], use_kernel: bool | None) -> str | None:
    """`metal`, `cuda`, or None: the twin."""
    if use_kernel is None:
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        fits = len(states) <= MAX_STATES and states[0].size > 0
        use_kernel = on_gpu and fits
    if not use_kernel:
        return None
    return "cuda" if mx.cuda.is_available() else "metal"


@lru_cache(maxsize=None)
def _kernel(variant: Variant, backend: str) -> Function:
    """The variant as one launch, with the twin's derivatives."""
    twin = _twin(variant)
    call = mx.custom_function(partial(_on_any_rank, variant, backend))

    @call.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return tuple(mx.vjp(twin, list(primals), list(cotangents))[1])

    @call.jvp
    def jvp(primals: Any, tangents: Any) -> Any:
        return mx.jvp(twin, list(primals), list(tangents))[1]

    @call.vmap
    def vmap(inputs: Any, axes: Any) -> Any:
        return list(mx.vmap(twin, in_axes=tuple(axes))(*inputs)), 0

    return call


def _on_any_rank(
    variant: Variant, backend: str, coefficients: mx.array, *arrays: mx.array
) -> list[mx.array]:
    last = len(arrays) - variant.rms_norm
    tokens = [_three_axes(x) for x in arrays[:last]]
    found = launch(variant, backend, coefficients, *tokens, *arrays[last:])
    return [x.reshape(*arrays[0].shape[:-1], x.shape[-1]) for x in found]


def _three_axes(x: mx.array) -> mx.array:
    if x.ndim < 3:
        return mx.expand_dims(x, tuple(range(3 - x.ndim)))
    return mx.flatten(x, 0, -3)
