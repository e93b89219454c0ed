"""Measuring the arithmetic of sums of products: bits of the factors and of the accumulator, and how that rounds.

The data are planted, not random: a single number or a few partial sums decide each result, so that it tells the width
of what it passed through. An operator enters by :class:`Sum`, which says how rows of factors get into it and how their
sums are read off its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import format_of

Floats = npt.NDArray[np.float64]

ACCUMULATOR_BITS = 24
"""No probe asks for more: beyond these, float32 operands and sums are themselves inexact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one probe found.

    Attributes:
        name: of the sum or quantity inside the operator; empty for a product that is the whole operator.
        quantity: what ``bits`` are bits of: ``accumulator``, ``statistic``, ``arithmetic``, ``scores``, ``tables``.
        bits: of significand that it keeps; ``reach``: as many as the probe can tell. None where it was not probed.
        input_bits: of significand of the operands, None where they were not probed.
        rounding: of sums, ``nearest``, ``truncated`` or ``wider`` (the accumulator has more bits than the probe
            reaches); empty where it was not probed.
    """

    name: str = ""
    quantity: str = "accumulator"
    bits: int | None = None
    reach: int = ACCUMULATOR_BITS
    input_bits: int | None = None
    rounding: str = ""

    def __str__(self) -> str:
        more = "" if self.bits is None or self.bits < self.reach else "at least "
        parts = [
            "" if self.input_bits is None else f"input {self.input_bits} bits",
            "" if self.bits is None else f"{self.quantity} {more}{self.bits} bits",
            self.rounding,
        ]
        text = ", ".join(part for part in parts if part)
        return f"{self.name}: {text}" if self.name else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """One sum of products inside an operator.

    Attributes:
        name: of the sum, empty where it is the operator's only one.
        k: products of a sum, at least 3.
        evaluate: from factors ``a, b: [rows, k]``, representable in the operator's dtype, their sums ``[rows]`` as the
            operator computes them. NaN, which is right for no probe, where two kinds of kernel differ.
        both: b is free; otherwise it is 1.
        units: of a and b in sums that cancel, powers of two: what is large then fits into float16, also the sums of one
            row's a and another row's b.
        counted: only sums of a few units are read; factors are probed by sums that cancel.
        most: units that a sum may have.
    """

    name: str = ""
    k: int
    evaluate: Callable[[Floats, Floats], Floats]
    both: bool = True
    units: tuple[float, float] = (1.0, 1.0)
    counted: bool = False
    most: int = 100


def small_units(dtype: str) -> tuple[float, float]:
    """Units of a and b where the sum passes through the operands' dtype: 2^23 of them are 2^15."""
    return (2.0**-4, 2.0**-4) if dtype == "float16" else (1.0, 1.0)


def measure(dtype: str, of: Sum, *, rounding: bool = False) -> Measured:
    """Measure one sum of an operator whose operands have this dtype. ``rounding``: how sums are rounded, too.

    Raises:
        PolyaccelError: the backend's.
    """
    return Measured(
        name=of.name,
        input_bits=_input_bits(dtype, of),
        bits=_accumulator_bits(dtype, of),
        rounding=_rounding(of) if rounding else "",
    )


def _input_bits(dtype: str, of: Sum) -> int:
    """``1 + 2^-s`` on either side, one row for each s: the first that comes back rounded ends the significand."""
    exponents = np.arange(1, format_of(dtype).bits)
    planted, other = np.zeros((len(exponents), of.k)), np.zeros((len(exponents), of.k))
    middle = of.k // 2
    planted[:, middle] = 1 + 2.0**-exponents
    other[:, middle] = 1
    wanted = planted[:, middle]
    if of.counted:
        # (1 + 2^-s) 2^s - 2^s is one unit.
        planted[:, 0] = -1
        other[:, [0, middle]] = 2.0 ** exponents[:, None]
        wanted = np.ones(len(exponents))
    if not of.both:
        return 1 + leading(of.evaluate(planted, np.ones_like(planted)) == wanted)
    left, right = of.evaluate(planted, other), of.evaluate(other, planted)
    return 1 + min(leading(left == wanted), leading(right == wanted))


def _accumulator_bits(dtype: str, of: Sum) -> int:
    """``2^s + 1 + ... + 1 - 2^s``: ones added to a partial sum of more bits than the accumulator has are lost.

    The large pair stands at several places of each row, so that whichever order and split a kernel has, some partial
    sum of some row holds one of them alone. One row for each s and place.
    """
    k, ones = of.k, min(of.k - 2, of.most)
    places = [(0, k - 1), (0, k // 2), (k // 2, k - 1), (k - 1, 0), (1, k - 2)] if k > 3 else [(0, k - 1)]
    exponents = np.arange(1, ACCUMULATOR_BITS)
    # 2^s does not fit into float16: half of the exponent goes to the other factor, where there is one.
    shared = exponents // 2 if of.both and dtype == "float16" else np.zeros_like(exponents)
    a, b = np.zeros((2, len(exponents), len(places), k))
    for i, (plus, minus) in enumerate(places):
        free = [j for j in range(k) if j not in (plus, minus)][:ones]
        a[:, i, free], b[:, i, free] = 1, 1
        large = 2.0 ** (exponents - shared)
        a[:, i, plus], a[:, i, minus] = large, -large
        b[:, i, [plus, minus]] = 2.0 ** shared[:, None]
    if not of.both:
        b[:] = 1
    left, right = of.units
    found = of.evaluate(a.reshape(-1, k) * left, b.reshape(-1, k) * right).reshape(len(exponents), len(places))
    return 1 + leading(np.all(found == ones * left * right, axis=1))


def _rounding(of: Sum) -> str:
    """``2^24 + 3/2 - 2^24`` in every order of the three: 2 where sums are rounded to nearest, 0 where truncated."""
    big, k = 2.0**12, of.k
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)]
    found = set()
    for order in orders:
        a, b = np.zeros((1, k)), np.zeros((1, k))
        for place, term in zip((0, k // 2, k - 1), order, strict=True):
            a[0, place], b[0, place] = ((big, big), (1.5, 1.0), (-big, big))[term]
        found.add(float(of.evaluate(a, b)[0]))
    if found <= {1.5}:
        return "wider"
    return "truncated" if any(0 <= f < 1.5 for f in found) else "nearest"


def leading(right: npt.NDArray[np.bool_] | np.bool_) -> int:
    """How many are true before the first that is not."""
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else int(np.size(right))


def relative_bits(got: Floats, wanted: Floats) -> int:
    """Bits of significand in which ``got`` agrees with ``wanted`` everywhere; wanted is nowhere zero."""
    worst = float(np.max(np.abs(got - wanted) / np.abs(wanted), initial=0.0))
    if not np.isfinite(worst):
        return 0
    return ACCUMULATOR_BITS if worst == 0 else max(int(np.floor(-np.log2(worst))), 0)
