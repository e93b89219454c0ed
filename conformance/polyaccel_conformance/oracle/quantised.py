"""The canonical weight-only form: ``(q - z) * s`` with one scale and zero a group of columns.

Integer subtract, float32 multiply, one rounding to the weight's dtype: defined bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS, Format

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def dequantize(codes: Ints, zeros: Ints, scales: Floats, group_size: int, out: Format) -> Floats:
    """``[n, k]`` values of format ``out``.

    Args:
        codes: ``[n, k]``. zeros, scales: ``[n, groups]``; column c is of group ``c // group_size``.
    """
    group = np.arange(codes.shape[1]) // group_size
    with np.errstate(invalid="ignore", over="ignore"):
        difference = (codes - zeros[:, group]).astype(np.float64)
        return out.round(FORMATS["float32"].round(difference * scales[:, group]))
