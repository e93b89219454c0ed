"""Operands of products: what each kind of data draws, and which bound it deserves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.primitives import Order
from polyaccel_conformance.words import Floats, Source

EXACT_KINDS = ("integers", "cancelling")
"""``integers``: every partial sum is an integer below 2^24, so that float32 accumulation is exact in any order; the
output rounding has ties. ``cancelling``: large partial sums and a small result, which every format holds: the second
half of k nearly undoes the first."""

RANDOM_KINDS = ("normal", "positive", "wide", "outliers")
"""Exchangeable along k. ``wide``: rows scaled over three decades; ``outliers``: one column in 64 is 32 times larger."""

STRUCTURED_KINDS = ("ramp",)
"""``ramp``: magnitudes fall by 2^-8 along k, so that the large products come first."""

SPECIAL_KINDS = ("overflow", "nonfinite")
"""``overflow``: results on both sides of the largest number, all products of one sign; ``nonfinite``: infinities and
NaN in a third of the rows of x."""

KINDS = ("normal", *EXACT_KINDS, *RANDOM_KINDS[1:], *STRUCTURED_KINDS, *SPECIAL_KINDS)

EXACT_SUM = 2**24


def order_of(data: str) -> Order:
    """Which bound of sums holds for a kind of data."""
    if data in EXACT_KINDS:
        return "exact"
    return "structured" if data in STRUCTURED_KINDS else "random"


def largest_integer(dtype: str, k: int) -> int:
    """Of both operands, such that every sum of ``k`` products is exact in float32."""
    most = 64 if dtype == "bfloat16" else 128
    return min(most, max(int((EXACT_SUM / max(k, 1)) ** 0.5), 1))


def few_large_rows(source: Source, dtype: str, rows: int, k: int, largest_column: int) -> Floats:
    """x ``[rows, k]`` for columns of integers up to ``largest_column``: small integers with a few large ones, above 11
    bits for float32, so that every sum is exact in float32."""
    large = 4095 if dtype == "float32" else 64 if dtype == "bfloat16" else 128
    # Half of what a sum may hold is for the large ones, half for the others.
    few = min(k, max(EXACT_SUM // 2 // (large * largest_column), 1))
    small = min(large, max(EXACT_SUM // 2 // (max(k, 1) * largest_column), 1))
    x = source.integers("a", (rows, k), -small, small).astype(np.float64)
    if few:
        columns = source.integers("a large columns", (rows, few), 0, k - 1)
        large_values = source.integers("a large", (rows, few), -large, large).astype(np.float64)
        np.put_along_axis(x, columns, large_values, axis=1)
    return x


def representable(dtype: str) -> int:
    """Integers up to this magnitude are exact."""
    return 1 << FORMATS[dtype].bits


def integer_rows(
    source: Source, dtype: str, data: str, rows: int, k: int, name: str = "a", *, most: int | None = None
) -> Floats:
    """x of an exact kind, ``[rows, k]``, of magnitude up to ``most``: by default what goes with
    :func:`integer_columns`. Float32 operands have more than 11 bits, or TF32 would pass."""
    if most is None:
        most = min(4095, EXACT_SUM // max(k, 1)) if dtype == "float32" else largest_integer(dtype, k)
    half = k // 2
    if data == "cancelling" and not half:
        # Nothing cancels in a single product: it is small by itself.
        most = min(most, 16)
    x = source.integers(name, (rows, k), -most, most)
    if data == "cancelling" and half:
        x[:, half : 2 * half] = x[:, :half]
        x[np.arange(rows), half + source.integers(f"{name} extra", (rows,), 0, half - 1)] += 1
    return x.astype(np.float64)


def integer_columns(
    source: Source, dtype: str, data: str, n: int, k: int, name: str = "b", *, most: int | None = None
) -> Floats:
    """W (or A) of an exact kind, ``[n, k]``, to go with :func:`integer_rows`; of magnitude up to ``most``."""
    limit = 1 if dtype == "float32" else largest_integer(dtype, k)
    most = limit if most is None else min(limit, most)
    w = source.integers(name, (n, k), -most, most)
    half = k // 2
    if data == "cancelling" and half:
        w[:, half : 2 * half] = -w[:, :half]
        w[:, 2 * half :] = 0
    elif data == "cancelling":
        # Nothing cancels in a single product.
        w = np.sign(w)
    return w.astype(np.float64)


def random_rows(source: Source, data: str, rows: int, k: int, name: str = "a") -> Floats:
    """x of any other kind, before rounding."""
    x = source.normal(name, (rows, k))
    if data in ("positive", "overflow"):
        return np.abs(x)
    if data == "wide":
        return _scaled(source, x, name, -5, 5)
    if data == "outliers" and k:
        x[:, _hot(source, k)] *= 32
    return x * _ramp(k) if data == "ramp" else x


def random_columns(source: Source, data: str, n: int, k: int, name: str = "b") -> Floats:
    """W (or A) of any other kind, before rounding."""
    w = source.normal(name, (n, k))
    if data in ("positive", "overflow"):
        return np.abs(w)
    if data == "wide":
        # Never larger, so that what follows stays within 16 bits.
        return _scaled(source, w, name, -10, 0)
    return w * _ramp(k) if data == "ramp" else w


def spoil(source: Source, x: Operand, *, infinities: bool = True) -> Operand:
    """A third of the rows of ``x: [rows, k]`` get one NaN or infinity."""
    values = np.array(x.values, dtype=np.float64)
    rows, k = values.shape
    if not k:
        return x
    special = np.array([np.nan, np.inf, -np.inf] if infinities else [np.nan])
    chosen = special[source.integers("special", (rows,), 0, len(special) - 1)]
    where = source.integers("special column", (rows,), 0, k - 1)
    hit = np.flatnonzero(source.integers("special row", (rows,), 0, 2) == 0)
    values[hit, where[hit]] = chosen[hit]
    return Operand(values, x.dtype)


def overflowing(x: Floats, w: Floats, dtype: str) -> tuple[Floats, Floats]:
    """Positive operands scaled by powers of two, such that products lie around the largest number of ``dtype``; every
    other row of w is negative."""
    top = float(np.log2(FORMATS[dtype].max))
    mean = (x @ w.T).mean() if x.size and w.size else 1.0
    shift = round(top - np.log2(mean)) if mean > 0 else 0
    first = shift // 2
    sign = 1.0 - 2.0 * (np.arange(w.shape[0])[:, None] % 2)
    right = np.asarray(sign * np.ldexp(w, shift - first), dtype=np.float64)
    return np.ldexp(x, first), right


def _scaled(source: Source, x: Floats, name: str, low: int, high: int) -> Floats:
    return np.ldexp(x, source.integers(f"scale {name}", (x.shape[0], 1), low, high))


def _ramp(k: int) -> Floats:
    fall: Floats = np.ldexp(np.ones(k), -(np.arange(k) * 8 // max(k, 1)))
    return fall


def _hot(source: Source, k: int) -> npt.NDArray[np.int64]:
    return source.choose("hot", k, max(k // 64, 1))
