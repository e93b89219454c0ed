"""Arithmetic that hardware may legitimately do, and some that it may not, emulated in float64.

A float64 operation on operands of at most 24 bits, rounded once to float32, is the correctly rounded float32 operation
(Figueroa, "When is double rounding innocuous?", 1995: 53 >= 2 * 24 + 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS, Format

Floats = npt.NDArray[np.float64]

F32, F16, BF16 = FORMATS["float32"], FORMATS["float16"], FORMATS["bfloat16"]

LEGITIMATE = ("sequential", "pairwise", "chunk16 truncating", "chunk16 aligned", "split-K", "fused multiply-add")
"""Accumulations in float32 that the contract permits."""

LOWER = ("float16 accumulator", "bfloat16 accumulator", "bfloat16 split-K", "13-bit truncating")
"""Accumulations one precision class below."""


def f32(x: npt.ArrayLike) -> Floats:
    """To nearest float32; much faster than the general rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x, dtype=np.float64).astype(np.float32).astype(np.float64)


def rounding(to: Format) -> Callable[[npt.ArrayLike], Floats]:
    """Rounding to nearest even in a format."""
    return f32 if to.name == "float32" else to.round


def significand(x: npt.ArrayLike, bits: int, *, truncate: bool = False) -> Floats:
    """Rounded (or cut) to ``bits`` bits of significand, exponents unlimited."""
    fraction, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    scaled = np.ldexp(fraction, bits)
    return np.ldexp(np.trunc(scaled) if truncate else np.rint(scaled), exponent - bits)


def tf32(x: npt.ArrayLike) -> Floats:
    """What tensor cores read of a float32 operand under TF32: 11 bits."""
    return significand(x, 11)


def accumulate(a: Floats, b: Floats, how: str) -> Floats:
    """``a @ b`` for ``a: [m, k]``, ``b: [k, n]``, accumulated as ``how`` says; one of LEGITIMATE or LOWER."""
    return sum_terms(a[:, :, None] * b[None, :, :], how)


def sum_terms(products: Floats, how: str) -> Floats:
    """Sum over axis 1 of ``products: [m, k, ...]``; they are exact (two float32 factors fill 48 bits)."""
    return _SUMS[how](products)


def _zeros(products: Floats) -> Floats:
    return np.zeros((products.shape[0], *products.shape[2:]))


def _running(step: Callable[[Floats], Floats], round_products: bool) -> Callable[[Floats], Floats]:
    def run(products: Floats) -> Floats:
        total = _zeros(products)
        for i in range(products.shape[1]):
            term = step(products[:, i]) if round_products else products[:, i]
            total = step(total + term)
        return total

    return run


def _pairwise(products: Floats) -> Floats:
    parts = f32(products)
    while parts.shape[1] > 1:
        if parts.shape[1] % 2:
            parts = np.concatenate([parts, np.zeros_like(parts[:, :1])], axis=1)
        parts = f32(parts[:, 0::2] + parts[:, 1::2])
    return parts[:, 0] if products.shape[1] else _zeros(products)


def _chunked(bits: int) -> Callable[[Floats], Floats]:
    """Sixteen products are added exactly to the accumulator, which is then cut to ``bits``."""

    def run(products: Floats) -> Floats:
        total = _zeros(products)
        for i in range(0, products.shape[1], 16):
            total = significand(total + products[:, i : i + 16].sum(axis=1), bits, truncate=True)
        return total

    return run


def _aligned(extra: int) -> Callable[[Floats], Floats]:
    """Sixteen products and the accumulator are shifted to the exponent of the largest, keeping ``extra`` bits below
    the accumulator's last place, and cut before they are added: tensor cores as measured by Fasi, Higham, Mikaitis and
    Pranesh, "Numerical behavior of NVIDIA tensor cores" (2021), and later work on newer ones."""

    def run(products: Floats) -> Floats:
        total = _zeros(products)
        for i in range(0, products.shape[1], 16):
            terms = np.concatenate([total[:, None], products[:, i : i + 16]], axis=1)
            _, exponent = np.frexp(np.abs(terms).max(axis=1, keepdims=True))
            quantum = np.ldexp(1.0, exponent - 24 - extra)
            total = significand((np.trunc(terms / quantum) * quantum).sum(axis=1), 24, truncate=True)
        return total

    return run


def _split(round_partial: Callable[[Floats], Floats], parts: int = 4) -> Callable[[Floats], Floats]:
    def run(products: Floats) -> Floats:
        size = max(math.ceil(products.shape[1] / parts), 1)
        sequential = _running(f32, True)
        pieces = [round_partial(sequential(products[:, i : i + size])) for i in range(0, products.shape[1], size)]
        total = _zeros(products)
        for piece in pieces:
            total = round_partial(total + piece)
        return total

    return run


_SUMS: Mapping[str, Callable[[Floats], Floats]] = MappingProxyType(
    {
        "sequential": _running(f32, True),
        "fused multiply-add": _running(f32, False),
        "pairwise": _pairwise,
        "chunk16 truncating": _chunked(24),
        "chunk16 aligned": _aligned(2),
        "split-K": _split(f32),
        "float16 accumulator": _running(F16.round, False),
        "bfloat16 accumulator": _running(BF16.round, False),
        "bfloat16 split-K": _split(BF16.round),
        "13-bit truncating": _chunked(13),
    }
)
