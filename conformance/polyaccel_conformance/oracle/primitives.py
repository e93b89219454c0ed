"""Float64 primitives with their error bounds, for the coarsest form that the contract permits.

Sources: running error analysis as in Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 3; the
probabilistic bound of sums, which grows with sqrt(K), as in Higham and Mary, "A new approach to probabilistic rounding
error analysis" (2019). The constants are stated once, here.

The order of a sum's terms decides which bound holds. ``random``: the data are exchangeable, no implementation's order
of summation knows them, partial sums are those of a random order, and roundings are independent. ``structured``: the
data were made to hurt (cancelling halves, sorted magnitudes), nothing is known and only the worst case bounds the
error. ``exact``: every partial sum is a number of the accumulator's format, there is no error.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded, Noise, deviations

Floats = npt.NDArray[np.float64]

Order = Literal["random", "structured", "exact"]

ACCUMULATOR = FORMATS["float32"].unit
SAFETY = 1.5
CHUNK = 16
"""Products that hardware adds at once, truncating, before the accumulator is rounded."""


def accumulated(result: Bounded, squares: Floats, magnitudes: Floats, terms: Floats | int, order: Order) -> Bounded:
    """``result`` with the rounding error of a float32 sum of ``terms`` numbers in any order and any split, with chunks
    rounded or cut.

    ``squares``: the sum of the terms' squares, ``magnitudes``: of their magnitudes; ``terms`` may differ by element.
    A product may lose half the smallest number; sums of float32 numbers lose nothing below the smallest normal one.
    """
    if order == "exact":
        return result
    count = np.asarray(terms, dtype=np.float64)
    lost = 0.5 * count * FORMATS["float32"].smallest
    # A single product may still be rounded before whatever is added to it.
    single = ACCUMULATOR * magnitudes
    if order == "structured":
        gamma = count * ACCUMULATOR / (1 - count * ACCUMULATOR)
        # Truncation may lose a whole unit in the last place where rounding loses half.
        return result.plus("accumulation", np.where(count <= 1, single, 2 * gamma * magnitudes) + lost)
    many = count > 1
    scale = np.where(many, walk_scale(result.value, squares, count), single)
    bound = np.where(many, deviations(result.value.size) * scale, single)
    cut = np.where(many, drift(result.value, squares, count), 0.0)
    return result.plus("accumulation", bound, scale).plus("truncation of partial sums", cut + lost)


def walk_scale(total: Floats, squares: Floats, terms: Floats | int) -> Floats:
    """Standard deviation of the roundings of a float32 sum of ``terms`` numbers in random order, safety included.

    After k of K terms the expected square of a partial sum is ``(k/K)^2 total^2 + (k/K) (1 - k/K) squares``, of which
    ``total^2 / 3 + squares / 6`` is the mean over k.
    """
    scale: Floats = SAFETY * ACCUMULATOR * np.sqrt(terms) * np.sqrt(total**2 / 3 + squares / 6)
    return scale


def walk(total: Floats, squares: Floats, terms: Floats | int, outputs: int) -> Floats:
    """What :func:`walk_scale` does not exceed in any of ``outputs`` sums."""
    return deviations(outputs) * walk_scale(total, squares, terms)


def drift(total: Floats, squares: Floats, terms: Floats | int) -> Floats:
    """Loss of a sum whose accumulator is cut, not rounded, after every chunk: always towards zero, so it adds up."""
    chunks = np.ceil(np.asarray(terms) / CHUNK)
    lost: Floats = SAFETY * ACCUMULATOR * 2 * chunks * (np.abs(total) / 2 + 0.4 * np.sqrt(squares))
    return lost


def carried(x: Bounded, factor: Floats, order: Order) -> tuple[Floats, Floats | None]:
    """What the error of ``x`` becomes in ``x.value @ factor``: its bound, and its scale where it is random."""
    hard = x.bound @ np.abs(factor)
    if x.noise is None or order == "structured":
        return hard, None
    scale = np.sqrt(x.noise.scale**2 @ factor**2)
    worst = x.noise.bound @ np.abs(factor)
    random = np.minimum(worst, deviations(scale.size) * scale)
    return np.maximum(hard - worst, 0.0) + random, scale


def matmul(a: Bounded, b: Bounded, order: Order = "random") -> Bounded:
    """``a @ b`` with float32 accumulation; stacks of matrices broadcast."""
    value = a.value @ b.value
    if order == "exact":
        return Bounded.exact(value)
    squares = (a.value**2) @ (b.value**2)
    magnitudes = np.abs(a.value) @ np.abs(b.value)
    result = Bounded(value, np.zeros_like(value))
    if np.any(a.bound):
        extra, scale = carried(a, b.value, order)
        result = _plus_carried(result, "error of the left operand", extra, scale)
    if np.any(b.bound):
        flipped, right = b.map(_transposed), np.swapaxes(a.value, -1, -2)
        extra, scale = carried(flipped, right, order)
        extra = _transposed(extra)
        if np.any(a.bound):
            extra = extra + a.bound @ b.bound
        scale = None if scale is None else _transposed(scale)
        result = _plus_carried(result, "error of the right operand", extra, scale)
    return accumulated(result, squares, magnitudes, a.value.shape[-1], order)


def _plus_carried(result: Bounded, name: str, extra: Floats, scale: Floats | None) -> Bounded:
    if scale is None:
        return result.plus(name, extra)
    random = np.minimum(extra, deviations(scale.size) * scale)
    return result.plus(name, extra - random).plus(name, random, scale)


def _transposed(x: Floats) -> Floats:
    return np.swapaxes(x, -1, -2)


def total(x: Bounded, axis: int = -1, order: Order = "random") -> Bounded:
    """Sum along an axis, kept as one element, in float32."""
    value = x.value.sum(axis, keepdims=True)
    squares = (x.value**2).sum(axis, keepdims=True)
    magnitudes = np.abs(x.value).sum(axis, keepdims=True)
    result = Bounded(value, np.zeros_like(value))
    if np.any(x.bound):
        result = result.plus("error of the terms", x.bound.sum(axis, keepdims=True))
    return accumulated(result, squares, magnitudes, x.value.shape[axis], order)


def add(a: Bounded, b: Bounded) -> Bounded:
    """One float32 addition."""
    value = a.value + b.value
    bound = np.broadcast_to(a.bound, value.shape) + np.broadcast_to(b.bound, value.shape)
    terms = tuple((n, np.broadcast_to(t, value.shape)) for x in (a, b) for n, t in x.terms)
    result = Bounded(value, bound, terms, _joined(a.noise, b.noise, value.shape))
    extra = ACCUMULATOR * (np.abs(value) + bound)
    return result.plus("addition", extra, extra)


def _joined(a: Noise | None, b: Noise | None, shape: tuple[int, ...]) -> Noise | None:
    if a is None or b is None:
        known = a if b is None else b
        return None if known is None else known.map(lambda x: np.broadcast_to(x, shape))
    return Noise(
        np.broadcast_to(a.bound, shape) + np.broadcast_to(b.bound, shape),
        np.hypot(np.broadcast_to(a.scale, shape), np.broadcast_to(b.scale, shape)),
    )


def multiply(a: Bounded, b: Bounded) -> Bounded:
    """One float32 multiplication."""
    value = a.value * b.value
    carried = a.bound * np.abs(b.value) + a.magnitude * b.bound
    return (
        Bounded(value, np.zeros_like(value))
        .plus("error of the factors", carried)
        .plus("multiplication", ACCUMULATOR * (np.abs(value) + carried) + FORMATS["float32"].smallest)
    )


def scaled(x: Bounded, factor: Floats) -> Bounded:
    """One float32 multiplication by an exact factor; what is noise stays noise."""
    size = np.abs(factor)
    result = x.map(lambda part: part * size)
    result = Bounded(x.value * factor, result.bound, result.terms, result.noise)
    extra = ACCUMULATOR * result.magnitude + FORMATS["float32"].smallest
    return result.plus("multiplication", extra, extra)


def apply(x: Bounded, value: Floats, slope: Floats, ulps: int, name: str) -> Bounded:
    """A function of ``x`` computed in float32 within ``ulps`` units in the last place.

    ``slope``: a bound of the derivative's magnitude over ``x.value +- x.bound``.
    """
    unit = 2 * ACCUMULATOR * ulps * np.abs(value) + FORMATS["float32"].smallest
    result = Bounded(value, np.zeros_like(value))
    if np.any(x.bound):
        result = result.plus(f"argument of {name}", slope * x.bound)
    return result.plus(name, unit)
