"""``linear`` in float64 with its bound."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.primitives import Order, accumulated

Floats = npt.NDArray[np.float64]


def linear(
    x: Floats, weight: Floats, bias: Floats | None = None, order: Order = "random", addend: Floats | None = None
) -> Bounded:
    """``x @ weight.T + bias + addend`` before its output rounding.

    Args:
        x: ``[T, k]``, as stored. weight: ``[n, k]``, as stored or as dequantised. bias: ``[n]``.
        addend: ``[T, n]``.

    Bias and addend are terms of the sum like the products: either may be where the accumulator starts, or come last.
    """
    further = [term for term in (bias, addend) if term is not None]
    if order == "exact":
        return Bounded.exact(sum(further, start=x @ weight.T))
    with np.errstate(invalid="ignore", over="ignore"):
        value, squares, magnitudes = x @ weight.T, x**2 @ (weight**2).T, np.abs(x) @ np.abs(weight).T
        terms = x.shape[1]
        for term in further:
            value, squares, magnitudes, terms = value + term, squares + term**2, magnitudes + np.abs(term), terms + 1
        return accumulated(Bounded.exact(value), squares, magnitudes, terms, order)
