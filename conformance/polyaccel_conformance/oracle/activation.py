"""Activations: GELU and SiLU (Hendrycks and Gimpel, arXiv 1606.08415), SiLU as a gate (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import Format
from polyaccel_conformance.oracle.bounded import Bounded, cast
from polyaccel_conformance.oracle.functions import erf, relative, scaled, silu, tanh
from polyaccel_conformance.oracle.primitives import add, multiply

Floats = npt.NDArray[np.float64]

CUBIC = 0.044715


def silu_and_mul(x: Floats, *, kept: Format, exp_ulps: int, divide_ulps: int) -> Bounded:
    """``silu(gate) * up`` for ``x = [gate, up]: [T, 2 n]``; silu(gate) may be kept in ``kept``."""
    gate, up = np.split(x, 2, axis=-1)
    activated = silu(Bounded.exact(gate), exp_ulps, divide_ulps)
    if kept.name != "float32":
        activated = cast(activated, kept, "silu")
    return multiply(activated, Bounded.exact(up))


def gelu(x: Floats, approximate: Literal["none", "tanh"], *, erf_ulps: int, tanh_ulps: int) -> Bounded:
    """``x / 2 (1 + erf(x / sqrt 2))``, or with ``tanh(sqrt(2 / pi) (x + 0.044715 x^3))`` in place of erf.

    For negative x the sum cancels: its error stays that of a number near 1.
    """
    operand = Bounded.exact(x)
    if approximate == "none":
        inner = erf(scaled(operand, math.sqrt(0.5)), erf_ulps)
    else:
        # x * x, * x, * constant (rounded), + x; or x * (1 + constant x^2).
        polynomial = relative(Bounded.exact(x + CUBIC * x**3), 5, "polynomial")
        inner = tanh(scaled(polynomial, math.sqrt(2 / math.pi)), tanh_ulps)
    return multiply(Bounded.exact(0.5 * x), relative(add(Bounded.exact(np.ones_like(x)), inner), 1, "half"))
