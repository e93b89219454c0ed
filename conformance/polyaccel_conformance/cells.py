"""Cells of the coverage table: operator x dtype x layout of an argument x range of a size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.results import CellCount, CellKey

EDGES = (0, 1, 2, 16, 128, 1024, 4096, 16384)
"""Lower ends of the ranges; the last one has no upper end."""


def bucket(size: int) -> str:
    """The range that a size lies in: ``0``, ``1``, ``2..15``, ``16..127``, ..., ``16384..``."""
    low = max(edge for edge in EDGES if edge <= max(size, 0))
    place = EDGES.index(low)
    if place + 1 == len(EDGES):
        return f"{low}.."
    high = EDGES[place + 1] - 1
    return f"{low}" if high == low else f"{low}..{high}"


def cells_of(case: Case) -> Iterator[CellKey]:
    """Every cell that a case counts in."""
    layouts = [f"{name}={layout}" for name, layout in sorted(case.layouts.items())] or ["-"]
    sizes = [(name, size) for name, size in sorted(case.dims.items()) if isinstance(size, int)]
    ranges = [f"{name}={bucket(size)}" for name, size in sizes] or ["-"]
    for layout in layouts:
        for extent in ranges:
            yield CellKey(operator=case.operator, dtype=case.dtype, layout=layout, range=extent)


@dataclass(slots=True)
class _Count:
    cases: int = 0
    failed: int = 0
    not_promised: int = 0
    headroom: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)


def count_cells(results: Iterable[CaseResult]) -> tuple[CellCount, ...]:
    """The coverage table of these results, sorted by cell."""
    counts: dict[CellKey, _Count] = {}
    for result in results:
        worst = max(result.headroom.values(), default=0.0)
        for cell in cells_of(result.case):
            count = counts.setdefault(cell, _Count())
            count.cases += 1
            count.failed += result.wrong
            count.not_promised += result.excused
            count.headroom = max(count.headroom, worst)
            count.kinds[result.kind] = count.kinds.get(result.kind, 0) + 1
    return tuple(
        CellCount(
            cell=cell,
            cases=c.cases,
            failed=c.failed,
            not_promised=c.not_promised,
            kinds=dict(sorted(c.kinds.items())),
            headroom=c.headroom,
        )
        for cell, c in sorted(counts.items())
    )
