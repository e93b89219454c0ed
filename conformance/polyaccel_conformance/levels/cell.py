"""Cells: what a row of a required table asks for, one value or range at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyaccel.backend import OPERATORS, STATIONS, OperatorSpec
from polyaccel.backend.levels import DEVICES, HALF, LEVELS, Level, Requirement, Span, Value
from polyaccel_conformance.harness.layouts import LAYOUTS

HALVES = ("bfloat16", "float16")
"""What :data:`HALF` may stand for, preferred first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One thing that must be covered: cases of ``operator`` in ``dtype`` whose ``axis`` holds ``value`` or lies in it.

    ``axis`` is empty for any case at all, ``dtype`` for operators without; ``where`` restricts to cases with values.
    """

    operator: str
    dtype: str = ""
    axis: str = ""
    value: Value | Span = True
    where: tuple[tuple[str, Value], ...] = ()
    needs: str = ""

    @property
    def group(self) -> str:
        """The cell without its value: what cells are listed under."""
        words = [self.operator, *(f"{name.rpartition('.')[2]}={value}" for name, value in self.where), self.dtype]
        return " ".join([*filter(None, words), *([self.axis.rpartition(".")[2]] if self.axis else [])])

    def __str__(self) -> str:
        return f"{self.group} {self.value}" if self.axis else self.group


def cells(level: Level, half: str, ranks: int = 1) -> tuple[Cell, ...]:
    """Every cell of a level with ``half`` as its 16-bit type, in the order of its table.

    Rows that need several devices ask for every world size from 2 to ``ranks``.
    """
    if LEVELS.get(level.name) is level:
        return _of_contract(level.name, half, ranks)
    return _expanded(level, half, ranks)


@functools.cache
def _of_contract(name: str, half: str, ranks: int) -> tuple[Cell, ...]:
    return _expanded(LEVELS[name], half, ranks)


def _expanded(level: Level, half: str, ranks: int) -> tuple[Cell, ...]:
    found: dict[Cell, None] = {}
    for row in level.table:
        for dtype in row.dtypes or ("",):
            found |= dict.fromkeys(_cells(row, half if dtype == HALF else dtype, ranks))
    return tuple(found)


def _cells(row: Requirement, dtype: str, ranks: int) -> Iterator[Cell]:
    where = tuple(sorted(row.where.items()))

    def cell(axis: str, value: Value | Span) -> Cell:
        return Cell(operator=row.operator, dtype=dtype, axis=axis, value=value, where=where, needs=row.needs)

    yield cell("", True)
    for axis, values in row.each.items():
        for value in values:
            yield cell(axis, value)
    spec = specification(row.operator)
    if row.layouts:
        for argument in spec.arguments:
            if argument.kind == "tensor" and argument.dtypes:
                for name in dict.fromkeys(name for layout in argument.layouts for name in LAYOUTS[layout]):
                    yield cell(f"layouts.{argument.name}", name)
    if row.attributes:
        for argument in spec.arguments:
            # An attribute with one value has no axis.
            for listed in argument.values if len(argument.values) > 1 else ():
                if isinstance(listed, int | str | bool):
                    yield cell(f"attributes.{argument.name}", listed)
    if row.needs == DEVICES:
        for size in range(2, ranks + 1):
            yield cell("ranks", size)


def specification(operator: str) -> OperatorSpec:
    """Raises KeyError for a name that the contract does not have."""
    return OPERATORS[operator] if operator in OPERATORS else STATIONS[operator]


def summary(found: Iterable[Cell]) -> str:
    """Cells in few words: values of one group together, consecutive integers as ranges."""
    groups: dict[str, list[Value | Span]] = {}
    for cell in found:
        values = groups.setdefault(cell.group, [])
        if cell.axis:
            values.append(cell.value)
    return "; ".join(f"{group} {_values(values)}".rstrip() for group, values in groups.items())


def restriction(refused: Sequence[Cell], required: Sequence[Cell]) -> str:
    """What is refused of what is required, for a title: an operator and dtype of which every cell is refused by name
    alone, of others the axes where some of it is, without the cell that stands for any case at all."""
    lacking, said = set(refused), []
    for key in dict.fromkeys(map(_kind, refused)):
        some = [cell for cell in refused if _kind(cell) == key]
        whole = all(cell in lacking for cell in required if _kind(cell) == key)
        said += [cell for cell in some if (not cell.axis if whole else cell.axis)] or some
    return summary(said)


def _kind(cell: Cell) -> tuple[object, ...]:
    return cell.operator, cell.dtype, cell.where


def _values(values: list[Value | Span]) -> str:
    spans: list[Span] = []
    others: list[str] = []
    for value in values:
        if isinstance(value, Span):
            spans.append(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            spans.append(Span(value, value))
        else:
            others.append(str(value))
    joined: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.low, s.high)):
        if joined and span.low <= joined[-1].high + 1:
            joined[-1] = Span(joined[-1].low, max(joined[-1].high, span.high))
        else:
            joined.append(span)
    return ", ".join([*map(str, joined), *others])


Index = Mapping[tuple[str, str], Mapping[str, tuple[Cell, ...]]]


def index(found: Iterable[Cell]) -> Index:
    """By operator and dtype, then by axis."""
    table: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in found:
        table.setdefault((cell.operator, cell.dtype), {}).setdefault(cell.axis, []).append(cell)
    return {key: {axis: tuple(group) for axis, group in axes.items()} for key, axes in table.items()}
