"""What the problems of row-wise operators share: data, permitted formats, settled roundings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from polyaccel.backend import OperatorSpec
from polyaccel_conformance.formats import FORMATS, Format
from polyaccel_conformance.words import Source

Floats = npt.NDArray[np.float64]

SIZES = (1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 256, 1023)
"""Tile edges, their neighbours and primes."""

TOKENS = (1, 0, 2, 3, 7, 16, 17, 33)

RANDOM_KINDS = ("normal", "wide", "outliers", "nonfinite")

SETTLED = 2.0**-14
"""Relative error that float32 arithmetic stays below in exact cases; no rounded value changes within it."""


def coarsest(spec: OperatorSpec, name: str, dtype: str) -> Format:
    """The permitted format of an intermediate result with the fewest bits; names of arguments stand for ``dtype``."""
    permitted = [FORMATS.get(known, FORMATS[dtype]) for known in spec.numerics.intermediates[name]]
    return min(permitted, key=lambda found: found.bits)


def draw(source: Source, name: str, shape: Sequence[int], kind: str) -> Floats:
    """Normal numbers; ``wide``: rows scaled by 2^-5..2^5; ``outliers``: a few columns 32 times larger."""
    shape = tuple(shape)
    values = source.normal(name, shape)
    if kind == "wide":
        values = values * 2.0 ** source.integers(f"{name} scale", (*shape[:-1], 1), -5, 5)
    elif kind == "outliers" and shape[-1]:
        values[..., source.choose(f"{name} hot", shape[-1], max(shape[-1] // 64, 1))] *= 32
    return values


def poison_row(source: Source, x: Floats) -> Floats:
    """A copy of ``x: [..., n]`` with one NaN in one row."""
    x = x.copy()
    if x.size:
        x.reshape(-1)[int(source.integers("poisoned", (1,), 0, x.size - 1)[0])] = np.nan
    return x


def settled(values: Floats, to: Format) -> npt.NDArray[np.bool_]:
    """Whether a value rounds the same after any relative error up to :data:`SETTLED`."""
    settled: npt.NDArray[np.bool_] = to.round(values * (1 - SETTLED)) == to.round(values * (1 + SETTLED))
    return settled


def first_of(candidates: Floats, good: npt.NDArray[np.bool_], fallback: float) -> Floats:
    """``candidates, good: [n, choices]``: the first good one of each row, or the fallback."""
    chosen = candidates[np.arange(len(candidates)), np.argmax(good, axis=1)]
    return np.where(good.any(axis=1), chosen, fallback)


def shuffled(source: Source, name: str, values: Floats, rows: int) -> Floats:
    """``[rows, n]``: each row the same values in another order."""
    order = np.argsort(source.words(name, rows * len(values)).reshape(rows, len(values)), axis=1, kind="stable")
    return values[order]


def completing(square: float) -> float:
    """eps such that ``square + eps`` is a power of four."""
    target = 4.0
    while target <= square:
        target *= 4
    return target - square
