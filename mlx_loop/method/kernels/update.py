"""One update of an integrator: states in, the next state out, in float32 and in one kernel.

`update` is all of it: a linear combination of states (or Aitken's formula) and, in the same pass
where they are wanted, norms of other combinations and a rescale of each token. On Metal and CUDA
that is one launch (`source`); elsewhere, and for derivatives, its plain-MLX twin is one compiled
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx

from .source import MAX_STATES, Variant, fits, launch


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration, type II, of x and g(x) and as many earlier pairs, the newest first.

    With f = g(x) - x, dX and dF the differences of x and of f between neighbouring pairs and d the
    damping: `x + d f - (dX + d dF) c`, c = argmin |f - dF c| for each token on its own. Walker, Ni,
    Anderson acceleration for fixed-point iterations (SIAM J. Numer. Anal. 49, 2011), algorithm AA.
    """

    damping: float


Form = Sequence[float] | Literal["aitken"] | Anderson


class Rescale(NamedTuple):
    """Bring each token to the L2 norm `(1 - at) start + at end`; a zero token stays zero.

    Attributes:
        at: 0: the first norm; 1: the second.
        norms: (batch, length, 2) float32, start and end; None: the first two that are measured.
    """

    at: float
    norms: mx.array | None = None


class Update(NamedTuple):
    """What an update gives; what was not asked for is None.

    Attributes:
        out: (batch, length, hidden), the states' dtype: the next state.
        norms: (batch, length, measured) float32: the L2 norms of the measured combinations.
    """

    out: mx.array
    norms: mx.array | None


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
    wide = Variant("linear", MAX_STATES, wide=True)
    if _backend(wide, used[0], use_kernel):
        while len(used) > MAX_STATES:
            first = _constants((*weights[:MAX_STATES], 0.0))
            (subtotal,) = _evaluate(wide, [first, *used[:MAX_STATES]], use_kernel)
            weights = [1.0, *weights[MAX_STATES:]]
            used = [subtotal, *used[MAX_STATES:]]
    variant = Variant("linear", len(used))
    return _evaluate(variant, [_constants((*weights, 0.0)), *used], use_kernel)[0]


def update(
    form: Form,
    states: Sequence[mx.array],
    *,
    measure: Sequence[Sequence[float]] = (),
    rescale: Rescale | None = None,
    use_kernel: bool | None = None,
) -> Update:
    """The next state, with what else is wanted of the same pass over the states, as one launch.

    Args:
        form: coefficients, one per state; `aitken`, Aitken's delta-squared of the states (x, g(x),
            g(g(x))); or `Anderson`.
        states: (batch, length, hidden) each, any strides, all of one dtype. More than 8, or an
            `Anderson` too large for registers, are not for the kernel.
        measure: coefficients, one per state, of each combination whose norms are wanted: that of
            the residual is `(-1, 1)` of (x, g(x)).
        rescale: bring each token to a norm.
        use_kernel: False: the plain-MLX twin; None: the kernel where there is a GPU.
    """
    name, first = _named(form)
    if name == "linear" and not measure and rescale is None:
        return Update(combine(first, states, use_kernel=use_kernel), None)
    rows = [(*first, *[0.0] * (len(states) - len(first))), *measure]
    variant = Variant(
        name,
        len(states),
        measured=len(measure),
        rescaled=rescale is not None,
        norms=rescale is not None and rescale.norms is not None,
    )
    at = rescale.at if rescale else 0.0
    arrays = [_constants((*(float(c) for row in rows for c in row), at)), *states]
    if rescale is not None and rescale.norms is not None:
        arrays.append(rescale.norms)
    found = dict(zip(variant.outputs, _evaluate(variant, arrays, use_kernel), strict=True))
    return Update(found["out"], found.get("measured"))


def _named(form: Form) -> tuple[str, Sequence[float]]:
    """A form's name and the constants that go with it."""
    if isinstance(form, Anderson):
        return "anderson", (form.damping,)
    return ("aitken", ()) if isinstance(form, str) else ("linear", form)


def on_gpu() -> bool:
    """Whether updates are kernels here and now."""
    return mx.default_device().type == mx.DeviceType.gpu


def token_norm(x: mx.array) -> mx.array:
    """L2 norm of each token: (batch, length, hidden) -> (batch, length, 1), float32."""
    return mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True)


@lru_cache(maxsize=1024)
def _constants(values: tuple[float, ...]) -> mx.array:
    return mx.array(values, dtype=mx.float32)


# --- The twin -------------------------------------------------------------------------------

Function = Callable[..., Sequence[mx.array]]


def plain(variant: Variant) -> Function:
    """The variant in plain MLX, operation by operation. Arguments as for `launch`."""

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

        if variant.form == "anderson":
            out = _anderson(coefficients[0], y[::2], y[1::2])
        else:
            out = _aitken(*y) if variant.form == "aitken" else combination(0)
        measured = [token_norm(combination(row + 1)) for row in range(variant.measured)]
        if variant.rescaled:
            at = coefficients[-1]
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
        return found

    return compute


@cache
def twin(variant: Variant) -> Function:
    """`plain` as one compiled graph for every shape."""
    return mx.compile(plain(variant), shapeless=True)


def _aitken(x: mx.array, g1: mx.array, g2: mx.array) -> mx.array:
    d1 = g1 - x
    d2 = g2 - 2 * g1 + x
    size = mx.abs(d1)
    clear = mx.abs(d2) > 1e-3 * size
    step = mx.where(clear, -d1 * d1 / mx.where(clear, d2, 1), d1)
    return x + mx.clip(step, -size, size)


def _anderson(damping: mx.array, xs: Sequence[mx.array], gs: Sequence[mx.array]) -> mx.array:
    fs = [g - x for x, g in zip(xs, gs, strict=True)]
    out = xs[0] + damping * fs[0]
    # Modified Gram-Schmidt on the differences q of f, with p, what the update changes by when f
    # changes by q, carried along.
    done: list[tuple[mx.array, mx.array, mx.array]] = []
    for i in range(len(xs) - 1):
        q = fs[i] - fs[i + 1]
        p = xs[i] - xs[i + 1] + damping * q
        length = _dot(q, q)
        for q0, p0, square0 in done:
            r = _quotient(_dot(q0, q), square0)
            q, p = q - r * q0, p - r * p0
        # What is left of a dependent difference is rounding: no direction at all.
        square = _dot(q, q)
        square = mx.where(square > 1e-10 * length, square, 0)
        out = out - _quotient(_dot(q, fs[0]), square) * p
        done.append((q, p, square))
    return out


def _dot(a: mx.array, b: mx.array) -> mx.array:
    return mx.sum(a * b, axis=-1, keepdims=True)


def _quotient(a: mx.array, b: mx.array) -> mx.array:
    return mx.where(b > 0, a / mx.where(b > 0, b, 1), 0)


# --- The dispatcher -------------------------------------------------------------------------


def _evaluate(
    variant: Variant, arrays: Sequence[mx.array], use_kernel: bool | None
) -> Sequence[mx.array]:
    backend = _backend(variant, arrays[1], use_kernel)
    return (twin(variant) if backend is None else _kernel(variant, backend))(*arrays)


def _backend(variant: Variant, state: mx.array, use_kernel: bool | None) -> str | None:
    """`metal`, `cuda`, or None: the twin."""
    if use_kernel is None:
        use_kernel = on_gpu()
    if not (use_kernel and state.size and fits(variant, state.shape[-1])):
        return None
    return "cuda" if mx.cuda.is_available() else "metal"


@cache
def _kernel(variant: Variant, backend: str) -> Function:
    """The variant as one launch, with the twin's derivatives."""
    ours = twin(variant)
    call: Any = mx.custom_function(partial(_on_any_rank, variant, backend))

    @call.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return tuple(mx.vjp(ours, list(primals), list(cotangents))[1])

    @call.jvp
    def jvp(primals: Any, tangents: Any) -> Any:
        pairs = zip(primals, tangents, strict=True)
        moved = [mx.zeros_like(x) if tangent is None else tangent for x, tangent in pairs]
        return mx.jvp(ours, list(primals), moved)[1]

    @call.vmap
    def vmap(inputs: Any, axes: Any) -> Any:
        if axes[0] is not None:  # Other constants for each.
            found: Any = mx.vmap(ours, in_axes=tuple(axes))(*inputs)
        else:
            size = next(x.shape[a] for x, a in zip(inputs, axes, strict=True) if a is not None)
            mapped = [_leading(x, a, size) for x, a in zip(inputs[1:], axes[1:], strict=True)]
            found = call(inputs[0], *mapped)
        return list(found), [0] * len(found)

    return cast(Function, call)


def _on_any_rank(
    variant: Variant, backend: str, coefficients: mx.array, *arrays: mx.array
) -> list[mx.array]:
    found = launch(variant, backend, coefficients, *map(_three_axes, arrays))
    return [x.reshape(*arrays[0].shape[:-1], x.shape[-1]) for x in found]


def _leading(x: mx.array, axis: int | None, size: int) -> mx.array:
    """The mapped axis in front; an array that is not mapped repeats, without a copy."""
    return mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)


def _three_axes(x: mx.array) -> mx.array:
    if x.ndim < 3:
        return mx.expand_dims(x, tuple(range(3 - x.ndim)))
    return mx.flatten(x, 0, -3)
