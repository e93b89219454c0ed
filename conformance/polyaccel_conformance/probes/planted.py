"""What all planted problems share: running one, and giving it other operands than those it drew."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from polyaccel.backend import AdapterRows
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Trial
from polyaccel_conformance.words import Source

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SEED = 20_260_103
LENGTH = 64
"""Products of a sum where the case does not say."""

ADAPTED: Mapping[str, Choice] = MappingProxyType(
    {
        "structure.slices": "one",
        "structure.ranks": "equal",
        "structure.segments": "one",
        "structure.mix": "one",
        "structure.history": "fresh",
        "structure.others": False,
        "structure.decode": False,
    }
)
"""Axes of what has adapters."""


def plain(operator: str, dtype: str, axes: Mapping[str, Choice]) -> Case:
    """A case on plain data."""
    return Case.of(operator, {"dtype": dtype, "data": "normal", **axes}, SEED)


def station_axes(rows: int, k: int, more: Mapping[str, Choice]) -> dict[str, Choice]:
    """Of a station on float weights, without bias and adapters."""
    sizes: dict[str, Choice] = {"dims.tokens": rows, "dims.k": k, "dims.rank": 1}
    bare: dict[str, Choice] = {"structure.segments": "none", "structure.bias": False, "structure.weight": "float"}
    return {**ADAPTED, **sizes, **bare, **more}


def source() -> Source:
    """Of arrangements that are the same in every probe."""
    return Source(SEED)


def run(bench: Bench, problem: Problem, output: str) -> Floats:
    """One output of a problem, on the host.

    Raises:
        PolyaccelError: the backend's.
    """
    trial = Trial(bench, problem)
    try:
        return trial.ask().outputs[output].values.astype(np.float64)
    finally:
        trial.close()


def different(b: Floats) -> tuple[Floats, Ints]:
    """The different rows of ``b: [rows, k]``, and which of them each row is."""
    # Rows may be long and are mostly the same: numpy would sort them all.
    keys = [row.tobytes() for row in b]
    known = {key: i for i, key in enumerate(keys)}
    if len(known) == 1:
        return b[:1], np.zeros(len(b), dtype=np.int64)
    rows, index = np.unique(b[list(known.values())], axis=0, return_inverse=True)
    numbers = dict(zip(known, index.reshape(-1).tolist(), strict=True))
    return rows, np.array([numbers[key] for key in keys], dtype=np.int64)


def picked(y: Floats, index: Ints) -> Floats:
    """Of each row of ``y: [rows, columns]`` its own column."""
    found: Floats = y[np.arange(len(index)), index]
    return found


def every_row(count: int, slot: int) -> AdapterRows:
    """Triples of rows that all use one slot, unweighted."""
    rows = np.arange(count, dtype=np.int32)
    return AdapterRows.build(rows, np.full(count, slot, dtype=np.int32), np.ones(count, dtype=np.float32))


def stored(values: npt.ArrayLike, dtype: str) -> Operand:
    """Values that the dtype holds."""
    return Operand.rounded(values, dtype)
