"""Functions of one argument, and means, with their error bounds. Allowances in units in the last place are the
contract's (``Numerics.ulps``) and come as arguments.

Slopes and error functions: NIST Digital Library of Mathematical Functions, sections 4 and 7.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.primitives import ACCUMULATOR, Order, add, apply, total

Floats = npt.NDArray[np.float64]

SMALLEST_NORMAL = 2.0**-126
"""Of float32: below it a result of the special function units may be zero."""


def relative(x: Bounded, roundings: float, name: str) -> Bounded:
    """A few further float32 roundings of one number."""
    return x.plus(name, roundings * ACCUMULATOR * x.magnitude)


def scaled(x: Bounded, factor: float) -> Bounded:
    """Times a constant that is itself rounded to float32."""
    size = abs(factor)
    terms = tuple((name, size * term) for name, term in x.terms)
    return relative(Bounded(x.value * factor, x.bound * size, terms), 2, "constant factor")


def mean(x: Bounded, order: Order = "random", *, exact_sum: bool = False) -> Bounded:
    """Mean over the last axis, kept as one element.

    The sum is divided, or multiplied by the rounded reciprocal of the length. ``exact_sum``: every partial sum is
    representable, whatever the order.
    """
    n = x.shape[-1]
    if exact_sum:
        summed = Bounded(x.value.sum(-1, keepdims=True), x.bound.sum(-1, keepdims=True))
    else:
        summed = total(x, order=order)
    terms = tuple((name, term / n) for name, term in summed.terms)
    return relative(Bounded(summed.value / n, summed.bound / n, terms), 2, "division by the length")


def mean_square(x: Bounded, order: Order = "random", *, exact_sum: bool = False) -> Bounded:
    """Mean of squares over the last axis. Some take it from the Euclidean norm: a root, squared again (three
    roundings)."""
    squares = Bounded(x.value**2, 2 * np.abs(x.value) * x.bound + x.bound**2)
    if not exact_sum:
        squares = relative(squares, 1, "square")
    return relative(mean(squares, order, exact_sum=exact_sum), 3, "root and square")


def rsqrt(x: Bounded, ulps: int, floor: float) -> Bounded:
    """``1 / sqrt(x)`` of what is known to be at least ``floor`` > 0, also where it is computed with errors."""
    value = 1 / np.sqrt(x.value)
    nearest = np.maximum(x.value - x.bound, floor)
    return apply(x, value, 0.5 * nearest**-1.5, ulps, "rsqrt")


def erf(x: Bounded, ulps: int) -> Bounded:
    """The error function."""
    value = erf_values(x.value)
    nearest = np.maximum(np.abs(x.value) - x.bound, 0.0)
    return apply(x, value, 2 / math.sqrt(math.pi) * np.exp(-(nearest**2)), ulps, "erf")


def tanh(x: Bounded, ulps: int) -> Bounded:
    """The hyperbolic tangent."""
    nearest = np.minimum(np.maximum(np.abs(x.value) - x.bound, 0.0), 300.0)
    return apply(x, np.tanh(x.value), np.cosh(nearest) ** -2.0, ulps, "tanh")


def exponential(x: Bounded, ulps: int) -> Bounded:
    """``exp(x)``."""
    value = np.exp(x.value)
    return apply(x, value, value * np.exp(x.bound), ulps, "exp")


def divide(a: Bounded, b: Bounded, ulps: int) -> Bounded:
    """``a / b`` for positive b; 0 / 0 is 0 (see ``renormalise``)."""
    divisor = np.where(b.value == 0, 1.0, b.value)
    value = a.value / divisor
    least = np.maximum(divisor - b.bound, divisor * 0.5)
    carried = (a.bound + np.abs(value) * b.bound) / least
    unit = 2 * ACCUMULATOR * ulps * np.abs(value) + FORMATS["float32"].smallest
    result = Bounded(value, np.zeros_like(value)).plus("error of the quotient's parts", carried)
    return result.plus("division", unit)


def softmax(x: Bounded, exp_ulps: int, divide_ulps: int) -> Bounded:
    """Over the last dimension, relative to the largest."""
    shifted = add(x, Bounded.exact(-x.value.max(-1, keepdims=True)))
    mass = exponential(shifted, exp_ulps)
    return divide(mass, total(mass), divide_ulps)


def sigmoid(x: Bounded, exp_ulps: int, divide_ulps: int) -> Bounded:
    """``1 / (1 + exp(-x))``."""
    one = Bounded.exact(np.ones_like(x.value))
    return divide(one, add(one, exponential(-x, exp_ulps)), divide_ulps)


def silu(x: Bounded, exp_ulps: int, divide_ulps: int) -> Bounded:
    """``x / (1 + exp(-x))``, or x times the rounded sigmoid.

    Relative errors: the exponential's, of which the sum with 1 keeps ``1 - sigmoid(x)``, the addition, the division and
    the multiplication. Where the exponential overflows float32 or the sigmoid is subnormal, the sigmoid may be zero.
    """
    small = np.exp(-np.abs(x.value))
    gate = np.where(x.value >= 0, 1.0, small) / (1 + small)
    value = x.value * gate
    unit = ACCUMULATOR * (2 * exp_ulps * (1 - gate) + 2 * divide_ulps + 2) * np.abs(value) + FORMATS["float32"].smallest
    result = Bounded(value, np.zeros_like(value))
    if np.any(x.bound):
        slope = np.abs(gate + value * (1 - gate))
        # The derivative is at most 1.1 everywhere, and its own derivative at most 1/2.
        nearby = np.where(np.isfinite(slope), slope, 1.1) + 0.5 * x.bound
        result = result.plus("argument of silu", nearby * x.bound)
    underflow = SMALLEST_NORMAL * np.abs(np.where(np.isfinite(x.value), x.value, 0.0))
    return result.plus("silu", unit).plus("underflow", underflow)


def erf_values(x: Floats) -> Floats:
    """The error function, in double precision."""
    values: Floats = np.array([math.erf(v) for v in x.reshape(-1).tolist()], dtype=np.float64).reshape(x.shape)
    return values
