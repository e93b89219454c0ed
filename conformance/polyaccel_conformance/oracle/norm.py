"""Norms over the last dimension: RMSNorm (Zhang and Sennrich, arXiv 1910.07467), LayerNorm (Ba, arXiv 1607.06450).

Statistics are float32. The variance is that of the centred values; the mean of squares minus the squared mean loses the
bits that the mean takes up and is one precision class below.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS, Format
from polyaccel_conformance.oracle.bounded import Bounded, cast
from polyaccel_conformance.oracle.functions import mean, mean_square, relative, rsqrt
from polyaccel_conformance.oracle.primitives import ACCUMULATOR, add, multiply

Floats = npt.NDArray[np.float64]

# A mean of squares is not negative, so the sum with eps is at least that, rounded.
_FLOOR = 1 - 2.0**-20


def residual_sum(x: Floats, residual: Floats, out: Format) -> tuple[Bounded, Bounded]:
    """``(before, after)`` the rounding of ``x + residual``, added in float32, to ``out``.

    Statistics are taken of the rounded sum. A fused kernel that still holds the unrounded one may use that: the bound
    of ``after`` is the distance of the two, and of the other neighbour where the sum is next to a tie.
    """
    exact = x + residual
    with np.errstate(invalid="ignore", over="ignore"):
        single = FORMATS["float32"].round(exact)
        slip = np.where(np.isfinite(single), np.abs(single - exact), 0.0)
        before = Bounded(exact, slip, (("addition", slip),))
        rounded = out.round(exact)
        distance = np.where(np.isfinite(rounded), np.abs(rounded - exact), 0.0)
        reach = np.abs(out.round(exact + slip) - rounded) + np.abs(out.round(exact - slip) - rounded)
        spread = np.maximum(distance, np.where(np.isfinite(reach), reach, 0.0))
    return before, Bounded(rounded, spread, (("rounding of the sum", spread),))


def rms_norm(
    s: Bounded, weight: Floats, eps: float, *, normed: Format, rsqrt_ulps: int, exact_sum: bool = False
) -> Bounded:
    """``s * rsqrt(mean(s^2) + eps) * weight`` for ``s: [..., hidden]``; ``s * rsqrt`` may be kept in ``normed``."""
    variance = add(mean_square(s, exact_sum=exact_sum), _constant(eps))
    scaled = multiply(s, rsqrt(variance, rsqrt_ulps, _FLOOR * eps))
    return multiply(_kept(scaled, normed), Bounded.exact(weight))


def layer_norm(x: Floats, weight: Floats, bias: Floats | None, eps: float, *, rsqrt_ulps: int) -> Bounded:
    """``(x - mean) * rsqrt(var + eps) * weight + bias`` for ``x: [..., hidden]``.

    Also for the distributed form ``x * rstd - mean * rstd``, which rounds each product.
    """
    operand = Bounded.exact(x)
    centre = mean(operand)
    centred = add(operand, -centre)
    rstd = rsqrt(add(mean_square(centred), _constant(eps)), rsqrt_ulps, _FLOOR * eps)
    parts = ACCUMULATOR * (np.abs(x) + centre.magnitude)
    normed = multiply(centred.plus("distributed product", parts), rstd)
    y = multiply(normed, Bounded.exact(weight))
    return y if bias is None else add(y, Bounded.exact(bias))


def _constant(eps: float) -> Bounded:
    """A Python number, rounded to float32 by whoever uses it."""
    return relative(Bounded.exact(np.float64(eps)), 1, "eps")


def _kept(x: Bounded, to: Format) -> Bounded:
    # Float32 is what it was computed in: that rounding is the multiplication's own.
    return x if to.name == "float32" else cast(x, to, "normed")
