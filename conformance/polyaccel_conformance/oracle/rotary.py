"""Rotary position embedding (Su et al., arXiv 2104.09864) of a head's first dimensions."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.primitives import ACCUMULATOR

Floats = npt.NDArray[np.float64]


def rotate(x: Floats, cos: Floats, sin: Floats, style: Literal["half", "interleaved"]) -> Bounded:
    """Pairs of ``x: [T, heads, head_dim]`` turned by ``cos, sin: [T, rotary_dim / 2]``, each token by its own row.

    A pair is (i, i + rotary_dim / 2) for half, (2 i, 2 i + 1) for interleaved; the rest passes through unchanged.
    """
    width = cos.shape[-1]
    first = slice(0, width) if style == "half" else slice(0, 2 * width, 2)
    second = slice(width, 2 * width) if style == "half" else slice(1, 2 * width, 2)
    c, s = cos[:, None, :], sin[:, None, :]
    a, b = x[..., first], x[..., second]
    value, bound = x.copy(), np.zeros_like(x)
    for where, left, right in ((first, a * c, -b * s), (second, b * c, a * s)):
        value[..., where] = left + right
        # Each product and the sum are rounded; a fused multiply-add rounds less.
        bound[..., where] = ACCUMULATOR * (1 + ACCUMULATOR) * (np.abs(left) + np.abs(right) + np.abs(left + right))
    return Bounded(value, bound, (("products and sum", bound),))
