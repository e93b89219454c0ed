"""``linear`` in float64 with its bound."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.primitives import Order, accumulated

Floats = npt.NDArray[np.float64]


def linear(x: Floats, weight: Floats, bias: Floats | None = None, order: Order = "random") -> Bounded:
    """``x @ weight.T + bias`` before its output rounding.

    Args:
        x: ``[T, k]``, as stored. weight: ``[n, k]``, as stored or as dequantised. bias: ``[n]``.

    The bias is one more term of the sum: it may be where the accumulator starts, or be added last.
    """
    if order == "exact":
        value = x @ weight.T
        return Bounded.exact(value if bias is None else value + bias)
    with np.errstate(invalid="ignore", over="ignore"):
        value, squares, magnitudes = x @ weight.T, x**2 @ (weight**2).T, np.abs(x) @ np.abs(weight).T
        terms = x.shape[1]
        if bias is not None:
            value, squares, magnitudes, terms = value + bias, squares + bias**2, magnitudes + np.abs(bias), terms + 1
        return accumulated(Bounded.exact(value), squares, magnitudes, terms, order)
