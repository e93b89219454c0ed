"""Float64 primitives with their error bounds, for the coarsest form that the contract permits.

Sources: running error analysis as in Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter
3; the probabilistic bound of sums, which grows with sqrt(K), as in Higham and Mary (2019). The constants are stated
once, here.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded

Floats = npt.NDArray[np.float64]

Order = Literal["random", "structured"]
"""``random``: the data are exchangeable, so partial sums are those of a random order. ``structured``: nothing is known,
and only the worst case bounds the error."""

ACCUMULATOR = FORMATS["float32"].unit
SAFETY = 1.5
CHUNK = 16
"""Products that hardware adds at once, truncating, before the accumulator is rounded."""
FALSE_ALARM = 1e-9


def _lambda(outputs: int) -> float:
    """Two-sided normal quantile such that none of ``outputs`` exceeds it, up to the false alarm rate."""
    return math.sqrt(2 * math.log(2 * max(outputs, 1) / FALSE_ALARM))


def accumulation(total: Floats, squares: Floats, magnitudes: Floats, terms: int, order: Order) -> Floats:
    """Rounding error of a float32 sum of ``terms`` numbers in any order, any split and with truncating chunks.

    ``total``: their sum, ``squares``: sum of squares, ``magnitudes``: sum of magnitudes.
    """
    if terms <= 1:
        # A single product may still be rounded before whatever is added to it.
        return ACCUMULATOR * magnitudes
    if order == "structured":
        gamma = terms * ACCUMULATOR / (1 - terms * ACCUMULATOR)
        # Truncation may lose a whole unit in the last place where rounding loses half.
        return 2 * gamma * magnitudes
    walk = _lambda(total.size) * math.sqrt(terms) * np.sqrt(total**2 / 3 + squares / 6)
    drift = 2 * math.ceil(terms / CHUNK) * (np.abs(total) / 2 + 0.4 * np.sqrt(squares))
    return SAFETY * ACCUMULATOR * (walk + drift)


def matmul(a: Bounded, b: Bounded, order: Order = "random") -> Bounded:
    """``a @ b`` with float32 accumulation; stacks of matrices broadcast."""
    value = a.value @ b.value
    squares = (a.value**2) @ (b.value**2)
    magnitudes = np.abs(a.value) @ np.abs(b.value)
    result = Bounded(value, np.zeros_like(value))
    for name, term in (("left", a), ("right", b)):
        if np.any(term.bound):
            left, right = (a.bound, np.abs(b.value)) if name == "left" else (a.magnitude, b.bound)
            result = result.plus(f"error of the {name} operand", left @ right)
    return result.plus("accumulation", accumulation(value, squares, magnitudes, a.value.shape[-1], order))


def total(x: Bounded, axis: int = -1, order: Order = "random") -> Bounded:
    """Sum along an axis, kept as one element, in float32."""
    value = x.value.sum(axis, keepdims=True)
    squares = (x.value**2).sum(axis, keepdims=True)
    magnitudes = np.abs(x.value).sum(axis, keepdims=True)
    result = Bounded(value, np.zeros_like(value))
    if np.any(x.bound):
        result = result.plus("error of the terms", x.bound.sum(axis, keepdims=True))
    return result.plus("accumulation", accumulation(value, squares, magnitudes, x.value.shape[axis], order))


def add(a: Bounded, b: Bounded) -> Bounded:
    """One float32 addition."""
    value = a.value + b.value
    carried = np.broadcast_to(a.bound, value.shape) + np.broadcast_to(b.bound, value.shape)
    result = Bounded(value, np.zeros_like(value))
    terms = tuple((n, np.broadcast_to(t, value.shape)) for x in (a, b) for n, t in x.terms)
    result = Bounded(value, carried, terms)
    return result.plus("addition", ACCUMULATOR * (np.abs(value) + carried))


def multiply(a: Bounded, b: Bounded) -> Bounded:
    """One float32 multiplication."""
    value = a.value * b.value
    carried = a.bound * np.abs(b.value) + a.magnitude * b.bound
    return (
        Bounded(value, np.zeros_like(value))
        .plus("error of the factors", carried)
        .plus("multiplication", ACCUMULATOR * (np.abs(value) + carried) + FORMATS["float32"].smallest)
    )


def apply(x: Bounded, value: Floats, slope: Floats, ulps: int, name: str) -> Bounded:
    """A function of ``x`` computed in float32 within ``ulps`` units in the last place.

    ``slope``: a bound of the derivative's magnitude over ``x.value +- x.bound``.
    """
    unit = 2 * ACCUMULATOR * ulps * np.abs(value) + FORMATS["float32"].smallest
    result = Bounded(value, np.zeros_like(value))
    if np.any(x.bound):
        result = result.plus(f"argument of {name}", slope * x.bound)
    return result.plus(name, unit)
