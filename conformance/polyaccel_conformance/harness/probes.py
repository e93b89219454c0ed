"""Measuring the arithmetic of a product: bits of its inputs and of its accumulator, and how that rounds.

The data are planted, not random: a single number or a few partial sums decide each result, so that it tells the width
of what it passed through.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.problems.linear import LinearProblem
from polyaccel_conformance.problems.weights import FloatWeight
from polyaccel_conformance.trial import Trial

Floats = npt.NDArray[np.float64]

ACCUMULATOR_BITS = 24
"""No probe asks for more: beyond these, float32 operands and sums are themselves inexact."""

TILE = 64
"""Rows and columns from which libraries use matrix units: a product with a single column may be another kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``input_bits`` and ``accumulator_bits`` of significand; ``rounding`` of sums: ``nearest``, ``truncated`` or
    ``wider`` (the accumulator has more bits than the probe reaches)."""

    input_bits: int
    accumulator_bits: int
    rounding: str

    def __str__(self) -> str:
        return f"input {self.input_bits} bits, accumulator {self.accumulator_bits} bits, {self.rounding}"


class _Planted(LinearProblem):
    """``linear`` with given matrices ``x: [tokens, k]`` and ``w: [n, k]``."""

    def __init__(self, case: Case, x: Floats, w: Floats) -> None:
        tokens, k = x.shape
        axes = {"dtype": case.dtype, "dims.tokens": tokens, "dims.k": k, "dims.n": len(w), "data": "integers"}
        super().__init__(Case.of("linear", {**axes, "structure.slices": "one", "structure.bias": False}, case.seed))
        self.operands = {"x": Operand.rounded(x, case.dtype)}
        self.weight = FloatWeight(matrix=Operand.rounded(w, case.dtype), bias=None, slices=(len(w),))


def _product(bench: Bench, case: Case, x: Floats, w: Floats) -> Floats:
    """``x @ w.T`` of both kinds of kernel. Where they differ it is NaN, which is right for no probe."""
    narrow, wide = _products(bench, case, x, w)
    return np.where(narrow == wide, narrow, np.nan)


def _products(bench: Bench, case: Case, x: Floats, w: Floats) -> tuple[Floats, Floats]:
    """``x @ w.T`` as it is, and with rows and columns repeated to a tile of matrix units."""
    rows, columns = -(-TILE // len(x)), -(-TILE // len(w))
    wide = _multiply(bench, case, np.tile(x, (rows, 1)), np.tile(w, (columns, 1)))
    return _multiply(bench, case, x, w), wide[: len(x), : len(w)]


def _multiply(bench: Bench, case: Case, x: Floats, w: Floats) -> Floats:
    trial = Trial(bench, _Planted(case, x, w))
    try:
        return trial.ask().outputs["y"].values.astype(np.float64)
    finally:
        trial.close()


def measure(bench: Bench, case: Case, k: int) -> Measured:
    """Measure ``linear`` of the case's dtype for products over ``k`` (at least 3), of a few and of 64 rows and columns.

    Raises:
        PolyaccelError: the backend's.
    """
    return Measured(
        input_bits=_input_bits(bench, case, k),
        accumulator_bits=_accumulator_bits(bench, case, k),
        rounding=_rounding(bench, case, k),
    )


def _input_bits(bench: Bench, case: Case, k: int) -> int:
    """``(1 + 2^-s) * 1`` on either side, one row for each s: the first that comes back rounded ends the significand."""
    bits = format_of(case.dtype).bits
    probes = 1 + 2.0 ** -np.arange(1, bits)
    alone = np.zeros((len(probes), k))
    alone[:, k // 2] = probes
    ones = np.zeros((1, k))
    ones[:, k // 2] = 1
    left = _product(bench, case, alone, ones)[:, 0]
    right = _product(bench, case, ones, alone)[0]
    return int(min(1 + _leading(left == probes), 1 + _leading(right == probes)))


def _accumulator_bits(bench: Bench, case: Case, k: int) -> int:
    """``2^s + 1 + ... + 1 - 2^s``: ones added to a partial sum of more bits than the accumulator has are lost.

    The large pair stands at several places of each row, so that whichever order and split a kernel has, some partial
    sum of some row holds one of them alone. One row for each s and place.
    """
    ones = min(k - 2, 100)
    places = [(0, k - 1), (0, k // 2), (k // 2, k - 1), (k - 1, 0), (1, k - 2)] if k > 3 else [(0, k - 1)]
    exponents = np.arange(1, ACCUMULATOR_BITS)
    x = np.zeros((len(exponents), len(places), k))
    w = np.zeros((len(places), k))
    for column, (plus, minus) in enumerate(places):
        free = [i for i in range(k) if i not in (plus, minus)][:ones]
        w[column, free] = 1
        w[column, [plus, minus]] = 1
        for row, s in enumerate(exponents):
            x[row, column, free] = 1
            x[row, column, plus], x[row, column, minus] = 2.0**s, -(2.0**s)
    if case.dtype == "float16":
        # 2^s does not fit above 2^15: half of the exponent goes to the other factor.
        return _split_accumulator_bits(bench, case, exponents, places, k, ones)
    y = _product(bench, case, x.reshape(-1, k), w).reshape(len(exponents), len(places), len(places))
    found = np.stack([y[:, i, i] for i in range(len(places))], axis=1)
    return 1 + _leading(np.all(found == ones, axis=1))


def _split_accumulator_bits(
    bench: Bench, case: Case, exponents: npt.NDArray[np.int64], places: list[tuple[int, int]], k: int, ones: int
) -> int:
    right = np.ones(len(exponents), dtype=np.bool_)
    for plus, minus in places:
        free = [i for i in range(k) if i not in (plus, minus)][:ones]
        x, w = np.zeros((len(exponents), k)), np.zeros((len(exponents), k))
        x[:, free] = w[:, free] = 1
        low = exponents // 2
        x[:, plus], x[:, minus] = 2.0**low, -(2.0**low)
        w[:, plus] = w[:, minus] = 2.0 ** (exponents - low)
        right &= np.diagonal(_product(bench, case, x, w)) == ones
    return 1 + _leading(right)


def _rounding(bench: Bench, case: Case, k: int) -> str:
    """``2^24 + 3/2 - 2^24`` in every order of the three: 2 where sums are rounded to nearest, 0 where truncated."""
    big = 2.0**12
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)]
    places = (0, k // 2, k - 1)
    found = set()
    for order in orders:
        x, w = np.zeros((1, k)), np.zeros((1, k))
        for place, term in zip(places, order, strict=True):
            x[0, place], w[0, place] = ((big, big), (1.5, 1.0), (-big, big))[term]
        found |= {float(y[0, 0]) for y in _products(bench, case, x, w)}
    if found <= {1.5}:
        return "wider"
    return "truncated" if any(0 <= f < 1.5 for f in found) else "nearest"


def _leading(right: npt.NDArray[np.bool_] | np.bool_) -> int:
    """How many are true before the first that is not."""
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else int(np.size(right))
