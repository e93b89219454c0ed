"""Which cells a case covers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from polyaccel.backend.levels import DEVICES, Span
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.levels.cell import Cell, Index
from polyaccel_conformance.levels.facts import facts


def covered(case: Case, table: Index) -> Iterator[Cell]:
    """The cells of ``table`` that ``case`` lies in."""
    axes: Mapping[str, Choice] | None = None
    for dtype in (case.dtype, ""):
        for axis, group in table.get((case.operator, dtype), {}).items():
            if axes is None:
                axes = {**case.axes(), **facts(case)}
            values = (True,) if axis == "" else _values(axes, axis)
            for cell in group:
                if cell.needs == DEVICES and case.ranks < 2:
                    continue
                if _hits(cell, values) and all(_holds(axes, name, value) for name, value in cell.where):
                    yield cell


def beyond(case: Case, table: Index) -> bool:
    """Whether ``case`` lies outside of every range that ``table`` asks for along some axis, such as a head of 300 where
    heads up to 256 are asked for: no level says how a backend runs it."""
    axes: Mapping[str, Choice] | None = None
    for dtype in (case.dtype, ""):
        for axis, group in table.get((case.operator, dtype), {}).items():
            spans = [cell.value for cell in group if isinstance(cell.value, Span)]
            if not spans:
                continue
            if axes is None:
                axes = {**case.axes(), **facts(case)}
            values = _values(axes, axis)
            if values and not any(value in span for value in values for span in spans):
                return True
    return False


def _values(axes: Mapping[str, Choice], axis: str) -> tuple[Choice, ...]:
    # A layout that is not drawn is the contiguous one.
    default = "contiguous" if axis.startswith("layouts.") else None
    value = axes.get(axis, default)
    if isinstance(value, tuple):
        return value
    return () if value is None else (value,)


def _hits(cell: Cell, values: Iterable[Choice]) -> bool:
    if isinstance(cell.value, Span):
        return any(value in cell.value for value in values)
    return any(value == cell.value and type(value) is type(cell.value) for value in values)


def _holds(axes: Mapping[str, Choice], name: str, wanted: Choice) -> bool:
    return wanted in _values(axes, name)
